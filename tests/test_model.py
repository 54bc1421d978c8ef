"""Model files of every kind, and that none of them runs code."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

from tilepipe.errors import BadRequest
from tilepipe.graph.operations import TABLE
from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.model import load_model, wrap
from tilepipe.models.spec import context, find_profile
from tilepipe.models.unet import UNet
from tilepipe.models.vocabulary import ATEN
from tilepipe.testing import networks

if TYPE_CHECKING:
    from pathlib import Path

RESTORING = "tilepipe.testing.networks:Restoring"

SMALL = {"ndim": 2, "base": 2, "depth": 3}
FACTORY = "tilepipe.models.unet:UNet"


def small() -> UNet:
    return UNet(ndim=2, base=2, depth=3)


def test_a_checkpoint_is_all_that_is_needed(tmp_path: Path) -> None:
    network, path = small(), tmp_path / "unet.pt"
    save_checkpoint(path, network, architecture=SMALL, normalize="zscore", labels=["a", "b"],
                    provenance={"seed": 1})  # fmt: skip
    model = load_model(path)
    assert (model.kind, model.axes, model.channels) == ("checkpoint", 2, 1)
    assert (model.normalize, model.labels) == ("zscore", ("a", "b"))
    image = torch.rand(1, 1, 92, 92)
    assert torch.equal(model.module(image), network.eval()(image))


def test_a_state_dict_with_its_factory(tmp_path: Path) -> None:
    network, path = small(), tmp_path / "weights.pt"
    wrapped = {"state_dict": {f"module.{k}": v for k, v in network.state_dict().items()}}
    torch.save(wrapped, path)
    model = load_model(path, network=FACTORY, network_args=SMALL)
    image = torch.rand(1, 1, 92, 92)
    assert torch.equal(model.module(image), network.eval()(image))
    other = load_model(path, network=FACTORY, network_args=SMALL, head=0)
    assert other.digest == model.digest


def test_a_factory_in_a_file(tmp_path: Path) -> None:
    code = (
        "from tilepipe.models.unet import UNet\n"
        "def make(base): return UNet(ndim=2, base=base, depth=3)"
    )
    (tmp_path / "nets.py").write_text(code)
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    model = load_model(
        tmp_path / "weights.pt", network=f"{tmp_path}/nets.py:make", network_args={"base": 2}
    )
    assert model.kind == "state dict"


def test_an_exported_program_of_dynamic_sizes(tmp_path: Path) -> None:
    network = UNet(ndim=2, base=2, depth=3, padding="same").eval()
    sides = {2: 4 * torch.export.Dim("h", min=1), 3: 4 * torch.export.Dim("w", min=1)}
    program = torch.export.export(network, (torch.rand(1, 1, 64, 64),), dynamic_shapes=(sides,))
    torch.export.save(program, tmp_path / "network.pt2")
    model = load_model(tmp_path / "network.pt2")
    assert (model.kind, model.fixed, model.channels) == ("exported program", None, 1)
    profile = find_profile(model)
    assert profile.context.step == (4, 4)
    assert (profile.fixed, profile.troubles) == (False, ())


def test_an_exported_program_of_one_size(tmp_path: Path) -> None:
    program = torch.export.export(small().eval(), (torch.rand(1, 1, 92, 92),))
    torch.export.save(program, tmp_path / "network.pt2")
    model = load_model(tmp_path / "network.pt2")
    assert model.fixed == (92, 92)
    profile = find_profile(model)
    assert (profile.fixed, profile.smallest) == (True, (92, 92))
    assert profile.context.before == (20, 20)


def test_one_of_several_outputs(tmp_path: Path) -> None:
    torch.save(networks.Restoring().state_dict(), tmp_path / "weights.pt")
    one, two = (load_model(tmp_path / "weights.pt", network=RESTORING, head=n) for n in (0, 1))
    image = torch.rand(1, 1, 9, 9, 9)
    assert torch.equal(one.module(image) * 2, two.module(image))
    assert one.digest != two.digest
    assert (one.outputs, two.outputs, two.head) == (2, 2, 1)
    with pytest.raises(BadRequest, match=r"head \(=2\) must be below the 2 outputs"):
        load_model(tmp_path / "weights.pt", network=RESTORING, head=2)
    network = networks.Restoring()
    assert context(two, head=1) == context(two) == context(network, head=1) == context(network)
    with pytest.raises(BadRequest, match=r"head \(=0\) must be that of the loaded model \(=1\)"):
        context(two, head=0)
    with pytest.raises(BadRequest, match=r"head \(=-1\) must not be negative"):
        context(network, head=-1)


class Choosy(nn.Conv2d):
    """A network that refuses most sizes, or all, in its own words."""

    def __init__(self, number: int = 7) -> None:
        super().__init__(1, 1, 3, padding=1)
        self.number = number

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Take widths of the multiples of a number."""
        if image.shape[-1] % self.number:
            raise ValueError("seven is the number")
        return super().forward(image)


def test_what_a_network_says_against_a_size_is_passed_on() -> None:
    with pytest.raises(BadRequest, match="seven is the number"):
        find_profile(wrap(Choosy(7000)))


def test_whatever_a_network_raises_is_passed_on_in_one_line() -> None:
    class Lacking(nn.Conv2d):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            raise ImportError("no module named einops\nsee the manual")

    with pytest.raises(BadRequest, match=r"no module named einops$"):
        find_profile(wrap(Lacking(1, 1, 3)))


def test_a_step_is_what_the_network_accepts() -> None:
    """Its operations would allow a step of 1; deep supervision is often like that."""
    profile = find_profile(wrap(Choosy()))
    assert (profile.context.step, profile.smallest, profile.fixed) == ((7, 7), (7, 7), False)


def test_a_network_in_memory_is_no_model_file() -> None:
    with pytest.raises(BadRequest, match=r"model \(=Choosy\) must be a file"):
        load_model(Choosy())  # type: ignore[arg-type]


class Harmful:
    """What a hostile pickle does when it is read."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (os.environ["HARM"],)


@pytest.fixture
def harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HARM", str(tmp_path / "harm"))
    return tmp_path / "harm"


def test_a_pickled_module_is_refused_with_the_way_out(tmp_path: Path) -> None:
    torch.save(small(), tmp_path / "module.pt")
    with pytest.raises(BadRequest, match=r"holds a pickled object .* save network.state_dict\(\)"):
        load_model(tmp_path / "module.pt")


def test_a_pickle_is_not_run(tmp_path: Path, harm: Path) -> None:
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Harmful()))
    torch.save({"weights": Harmful()}, tmp_path / "worse.pt")
    for name in ("evil.pt", "worse.pt"):
        with pytest.raises(BadRequest, match=r"pickled object|cannot be read|no tensors"):
            load_model(tmp_path / name)
    assert not harm.exists()


def program_with(tmp_path: Path, change: dict[str, bytes]) -> Path:
    """Return an exported program with some of its members replaced."""
    program = torch.export.export(small().eval(), (torch.rand(1, 1, 92, 92),))
    good, bad = io.BytesIO(), tmp_path / "bad.pt2"
    torch.export.save(program, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            content = next((c for end, c in change.items() if name.endswith(end)), old.read(name))
            new.writestr(name, content)
    return bad


def test_a_pickle_in_a_program_is_not_run(tmp_path: Path, harm: Path) -> None:
    bad = program_with(tmp_path, {"sample_inputs/model.pt": pickle.dumps(Harmful())})
    with pytest.raises(BadRequest, match=r"unpickling runs code|cannot be read"):
        load_model(bad)
    assert not harm.exists()


@pytest.mark.parametrize(
    "poison",
    [
        {"config": {"a": {"path_name": "weight_0", "use_pickle": True}}},
        {"config": {"a": {"path_name": "opaque_obj_0", "use_pickle": False}}},
        {"nodes": [{"target": "torch.os.system", "inputs": [], "outputs": []}]},
        {"size": {"expr_str": "__import__('os').system('true')"}},
        {"size": {"expr_str": "exit()"}},
        {"nodes": [{"target": "torch.ops.aten.from_file.default", "inputs": []}]},
        {"nodes": [{"target": "torch.ops.aten.set_.source_Storage", "inputs": []}]},
        {"nodes": [{"target": "torch.ops.aten.resize_.default", "inputs": []}]},
        {"nodes": [{"target": "torch.ops.aten.rand.default", "inputs": []}]},
        {"nodes": [{"target": "torch.ops._c10d_functional.all_reduce.default", "inputs": []}]},
        {"nodes": [{"target": "torch.ops.higher_order.aoti_call_delegate", "inputs": []}]},
        {"nodes": [{"target": "_operator.attrgetter", "inputs": []}]},
        {"nodes": [{"target": "_operator.call", "inputs": []}]},
        {"inputs": [{"arg": {"as_operator": "torch.os.system"}}]},
    ],
)
def test_a_program_may_hold_tensors_and_arithmetic_only(
    tmp_path: Path, poison: dict[str, object]
) -> None:
    bad = program_with(tmp_path, {"weights_config.json": json.dumps(poison).encode()})
    with pytest.raises(BadRequest, match="it is not loaded"):
        load_model(bad)


def rewritten(tmp_path: Path, targets: dict[str, object]) -> Path:
    """Return a program of one convolution, with its call replaced by others."""
    program = torch.export.export(nn.Conv2d(1, 1, 3).eval(), (torch.rand(1, 1, 92, 92),))
    good, bad = io.BytesIO(), tmp_path / "bad.pt2"
    torch.export.save(program, good)
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(bad, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name.endswith("models/model.json"):
                saved = json.loads(content)
                saved["graph_module"]["graph"]["nodes"].insert(0, targets)
                content = json.dumps(saved).encode()
            new.writestr(name, content)
    return bad


def test_inspecting_a_program_creates_no_file(tmp_path: Path) -> None:
    call = {
        "target": "torch.ops.aten.from_file.default",
        "inputs": [
            {"name": "filename", "arg": {"as_string": str(tmp_path / "made")}, "kind": 1},
            {"name": "shared", "arg": {"as_bool": True}, "kind": 1},
            {"name": "size", "arg": {"as_int": 64}, "kind": 1},
        ],
        "outputs": [{"as_tensor": {"name": "mapped"}}],
        "metadata": {},
        "is_hop_single_tensor_return": None,
        "name": "mapped",
    }
    bad = rewritten(tmp_path, call)
    with pytest.raises(BadRequest, match=r"holds a call of torch.ops.aten.from_file.def"):
        load_model(bad)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("member", "says"),
    [
        ("archive/data/aotinductor/model/code.so", "compiled code"),
        ("archive/models/MODEL.json", "two members of one name"),
    ],
)
def test_a_program_holds_no_code_and_no_member_twice(
    member: str, says: str, tmp_path: Path
) -> None:
    bad = program_with(tmp_path, {})
    with zipfile.ZipFile(bad, "a") as archive:
        archive.writestr(member, b"{}")
    with pytest.raises(BadRequest, match=f"holds {says}; it is not loaded"):
        load_model(bad)


def test_every_operation_with_a_rule_may_be_called() -> None:
    named = {name for kind in TABLE for name in kind.names.split()}
    assert named - ATEN == {"getitem"}
    there = {name for name in ATEN if hasattr(torch.ops.aten, name)}
    in_place = {name for name in ATEN - there if hasattr(torch.ops.aten, f"{name}_")}
    dunder = {name for name in ATEN - there if hasattr(torch.ops.aten, f"{name}__")}
    assert len(there | in_place | dunder) > 0.98 * len(ATEN)  # torch itself takes some away


class Windowed(nn.Module):
    """Operations without a rule, of which a program may hold any that only computes."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.mix = nn.Conv2d(1, 4, 3, padding=1), nn.Parameter(torch.rand(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Roll, sort and sum up along the channels, and take them by windows."""
        y = torch.roll(self.one(x), 1, dims=1).sort(dim=1).values
        y = y + torch.einsum("bchw,cd->bdhw", y, self.mix)
        return y.unfold(1, 2, 1).mean(dim=-1).diff(dim=1)


def test_a_program_without_rules_is_loaded_and_run_in_windows(tmp_path: Path) -> None:
    sides = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(
        Windowed().eval(), (torch.rand(1, 1, 64, 64),), dynamic_shapes=(sides,)
    )
    torch.export.save(program, tmp_path / "network.pt2")
    profile = find_profile(load_model(tmp_path / "network.pt2"))
    assert (profile.method, profile.troubles) == ("probe", ())
    assert profile.context.before == (1, 1)


def truncated(path: Path) -> None:
    torch.save(small().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-500])


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda p: None, "there is nothing"),
        (lambda p: p.mkdir(), "there is a folder"),
        (lambda p: p.touch(), "is empty"),
        (lambda p: p.write_text("hello"), "must be a file of torch.save"),
        (truncated, "is an archive that is not whole"),
        (lambda p: torch.save({}, p), "holds no weights"),
        (lambda p: torch.save([1, 2], p), "holds a list"),
        (lambda p: torch.save(torch.ones(3), p), "holds a Tensor"),
        (lambda p: torch.save(small().state_dict(), p), "give it with --network"),
        (lambda p: torch.save({"tilepipe": 1, "architecture": {"name": "vgg"}}, p), "vgg"),
    ],
)
def test_bad_files_are_refused_in_one_line(make: object, says: str, tmp_path: Path) -> None:
    assert callable(make)
    make(tmp_path / "model.pt")
    with pytest.raises(BadRequest, match=says) as caught:
        load_model(tmp_path / "model.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("network", "arguments", "says"),
    [
        ("unet", {}, "must read package.module:factory"),
        ("no.such:UNet", {}, "cannot be built"),
        ("tilepipe.models.unet:NoNet", {}, "cannot be built"),
        ("missing.py:UNet", {}, "cannot be built"),
        (FACTORY, {"colour": 3}, "cannot be built"),
        ("tilepipe.geometry:ceil_to", {"value": 3, "multiple": 2}, "gave int"),
        (FACTORY, {"ndim": 2, "base": 4, "depth": 3}, "does not fit the network"),
    ],
)
def test_a_factory_that_does_not_fit_is_refused(
    network: str, arguments: dict[str, object], says: str, tmp_path: Path
) -> None:
    torch.save(small().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(BadRequest, match=says) as caught:
        load_model(tmp_path / "weights.pt", network=network, network_args=arguments)
    assert "\n" not in str(caught.value)


def test_a_model_without_convolutions_is_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(nn.Sequential(nn.ReLU())), tmp_path / "relu.pt")
    with pytest.raises(BadRequest, match="no convolution"):
        load_model(tmp_path / "relu.pt")


class Resized(nn.Module):
    """Its factor is a number that is not written as a whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        small = nn.functional.avg_pool2d(image, 2)
        large = nn.functional.interpolate(small, scale_factor=2.0, mode="bicubic")
        found: torch.Tensor = self.last(large)
        return found


def test_programs_may_hold_numbers_that_are_not_whole(tmp_path: Path) -> None:
    size = {2: 2 * torch.export.Dim("h", min=8), 3: 2 * torch.export.Dim("w", min=8)}
    program = torch.export.export(
        Resized().eval(), (torch.rand(1, 1, 64, 64),), dynamic_shapes=(size,)
    )
    torch.export.save(program, tmp_path / "resized.pt2")
    assert load_model(tmp_path / "resized.pt2").channels == 1
