"""The law of the identity: a run goes on with the same bytes, or is refused by what differs."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr
from torch import nn

from tests.support import noise, read, write_volume
from tilepipe.errors import BadRequest
from tilepipe.options import Options
from tilepipe.planning.identity import ALGORITHM, APART, check_same
from tilepipe.planning.parts import Source
from tilepipe.planning.plan import plan
from tilepipe.segmentation.segment import plan_segment, segment
from tilepipe.storage.names import LEDGER

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.segmentation.report import Report

NETWORK = """
from torch import nn

class Two(nn.Module):
    def __init__(self, slope=0.0):
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)
        self.act = nn.LeakyReLU(slope)
        self.heads = nn.ModuleList([nn.Conv2d(2, 1, 3, padding=1) for _ in range(2)])

    def forward(self, image):
        seen = self.act(self.first(image))
        return self.heads[0](seen), self.heads[1](seen)
"""


@dataclass(frozen=True)
class Begun:
    """An output of which one tile is done, and what an undisturbed run gives."""

    source: Path
    model: Path
    output: Path
    options: Options
    chunks: dict[str, bytes]

    def go_on(self, output: Path, options: Options, **others: Any) -> Report:
        shutil.copytree(self.output, output, dirs_exist_ok=True)
        asked = {"source": self.source, "model": self.model, **others}
        return segment(
            asked.pop("source"), output=output, options=options, engine="serial", **asked
        )


def chunk_files(output: Path) -> dict[str, bytes]:
    found = ((path.relative_to(output), path) for path in (output / "0").rglob("*"))
    return {str(name): path.read_bytes() for name, path in found if path.is_file()}


def write_pyramid(path: Path, levels: list[np.ndarray[Any, Any]]) -> None:
    def scale(level: int) -> list[dict[str, object]]:
        return [{"type": "scale", "scale": [1.0, 2.0**level, 2.0**level]}]

    image = {
        "axes": [{"name": name, "type": "space", "unit": "micrometer"} for name in "zyx"],
        "datasets": [
            {"path": str(level), "coordinateTransformations": scale(level)}
            for level in range(len(levels))
        ],
    }
    group = zarr.create_group(path, attributes={"ome": {"version": "0.5", "multiscales": [image]}})
    for level, voxels in enumerate(levels):
        group.create_array(str(level), data=voxels, chunks=(1, 16, 16))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Begun:
    folder = tmp_path_factory.mktemp("begun")
    (folder / "net.py").write_text(NETWORK)
    space: dict[str, Any] = {}
    exec(NETWORK, space)
    torch.manual_seed(0)
    torch.save(space["Two"]().state_dict(), folder / "net.pt")
    write_pyramid(folder / "image.zarr", [noise(2, 32, 32), noise(2, 32, 32, seed=1)])
    case = Begun(
        source=folder / "image.zarr",
        model=folder / "net.pt",
        output=folder / "o",
        options=Options(
            network=f"{folder}/net.py:Two", tile=(1, 16, 16), chunks=(1, 16, 16), threads=1
        ),
        chunks={},
    )

    def stop(report: Report) -> None:
        raise KeyboardInterrupt

    def run(output: Path, **more: Any) -> None:
        segment(
            case.source, model=case.model, output=output, options=case.options,
            engine="serial", **more,
        )  # fmt: skip

    run(folder / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(case.output, progress=stop)
    return replace(case, chunks=chunk_files(folder / "whole"))


REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "axes": ({"axes": "tyx"}, "axes zyx, not tyx"),
    "level": ({"level": 1}, "level 0, not 1"),
    "network_args": ({"network_args": {"slope": 0.5}}, "network_args {}, not {'slope': 0.5}"),
    "head": ({"head": 1}, "head 0, not 1"),
    "write": ({"write": "probabilities"}, "write labels, not probabilities"),
    "threshold": ({"threshold": 0.25}, "threshold 0.5, not 0.25"),
    "normalize": ({"normalize": "scale:2,0"}, "normalize none, not scale:2,0"),
    "boundary": ({"boundary": "network"}, "boundary mirror, not network"),
    "tile": ({"tile": (1, 32, 16)}, "tile 1,16,16, not 1,32,16"),
    "threads": ({"threads": 2}, "threads 1, not 2"),
    "precision": ({"precision": "bfloat16"}, "precision float32, not bfloat16"),
    "chunks": ({"chunks": (1, 8, 16)}, "chunks 1,16,16, not 1,8,16"),
    "shards": ({"shards": (1, 16, 16)}, "shards none, not 1,16,16"),
    "ome_version": ({"ome_version": "0.4"}, "ome_version 0.5, not 0.4"),
    "inexact": ({"inexact": True}, "inexact False, not True"),
    "channels": ({"channels": (0,)}, "channels none, not 0"),
}
"""By option, another value of it, and what the refusal says of it."""
GOES_ON: dict[str, tuple[dict[str, object], ...]] = {
    "axes": ({"axes": "zyx"}, {"axes": "ZYX"}),
    "network": ({"network": "MOVED/net.py:Two"}, {"network": "RELATIVE/net.py:Two"}),
    "network_args": ({"network_args": {}},),
    "threshold": ({"threshold": 0.5},),
    "normalize": ({"normalize": "none"},),
    "tile": ({"tile": None},),
    "activation": ({"activation": "sigmoid"},),
    "series": ({"series": 0},),
    "durable": ({"durable": True}, {"durable": False}),
    "memory": ({"memory": 1_000_000_000}, {"memory": 2_000_000_000}),
    "threads": ({"threads": None},),
    "device": ({"device": "cpu"},),
    "strategy": ({"strategy": "direct"},),
    "chunks": ({"chunks": None},),
    "shards": (),  # below
}
"""By option, values that come to the same."""
ELSEWHERE = {"device": ({"device": "cuda"}, "device cpu, not cuda")}
"""What only a machine of another kind can run: it is refused when the plans are compared."""


def test_every_option_is_tried() -> None:
    names = {field.name for field in fields(Options)}
    assert names == REFUSED.keys() | GOES_ON.keys() | ELSEWHERE.keys()
    apart = {name.removeprefix("options.") for name in APART if name.startswith("options.")}
    assert apart <= GOES_ON.keys()
    assert {name for name in names if name not in apart} <= REFUSED.keys()


@pytest.mark.parametrize("name", REFUSED)
def test_another_value_is_refused_by_name(begun: Begun, tmp_path: Path, name: str) -> None:
    changes, told = REFUSED[name]
    with pytest.raises(BadRequest) as caught:
        begun.go_on(tmp_path / "o", replace(begun.options, **changes))  # type: ignore[arg-type]
    said = str(caught.value)
    assert re.search(r"was begun with another plan \((.*)\); go on .* --overwrite$", said), said
    assert f"({told})" in said
    assert "\n" not in said
    assert chunk_files(tmp_path / "o") == chunk_files(begun.output)


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, all_ in GOES_ON.items() for changes in all_]
)
def test_what_comes_to_the_same_goes_on(
    begun: Begun, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    if name == "network":
        (tmp_path / "net.py").write_text(NETWORK)
        where = {"MOVED": str(tmp_path), "RELATIVE": os.path.relpath(begun.source.parent)}
        word, _, rest = changes["network"].partition("/")
        changes = {"network": f"{where[word]}/{rest}"}
    report = begun.go_on(tmp_path / "o", replace(begun.options, **changes))
    assert (report.before, report.failures) == (1, [])
    assert chunk_files(tmp_path / "o") == begun.chunks


def test_shards_that_are_kept_may_be_given_or_not(begun: Begun, tmp_path: Path) -> None:
    def stop(report: Report) -> None:
        raise KeyboardInterrupt

    def run(shards: tuple[int, ...] | None, **more: Any) -> Report:
        options = replace(begun.options, chunks=(1, 8, 8), shards=shards)
        return segment(
            begun.source, model=begun.model, output=tmp_path / "o", options=options,
            engine="serial", **more,
        )  # fmt: skip

    for shards in ((1, 16, 16), None, (1, 16, 16)):
        with pytest.raises(KeyboardInterrupt):
            run(shards, progress=stop)
    with pytest.raises(BadRequest, match=r"\(shards 1,16,16, not 1,8,8\)"):
        run((1, 8, 8))
    assert run(None).before == 3


def test_another_kind_of_device_is_refused(begun: Begun) -> None:
    changes, told = ELSEWHERE["device"]
    kept = json.loads((begun.output / LEDGER / "plan.json").read_text())["identity"]
    other = plan(
        begun.source,
        model=begun.model,
        options=replace(begun.options, **changes),  # type: ignore[arg-type]
        elsewhere=True,
        earlier=kept,
    )
    with pytest.raises(BadRequest, match=rf"\({told}\)"):
        check_same("o", kept, other.identity())


def test_the_same_files_by_other_ways_go_on(begun: Begun, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(begun.source.parent)
    shutil.copy(begun.model, tmp_path / "moved.pt")
    begun.go_on(tmp_path / "a", begun.options, source=tmp_path / "link" / begun.source.name)
    begun.go_on(tmp_path / "b", begun.options, source=os.path.relpath(begun.source))
    begun.go_on(tmp_path / "c", begun.options, model=tmp_path / "moved.pt")
    (tmp_path / "d").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "d")
    begun.go_on(tmp_path / "way", begun.options)
    for name in "abcd":
        assert chunk_files(tmp_path / name) == begun.chunks


def test_the_same_shape_by_other_axes_is_refused(tmp_path: Path) -> None:
    """Axes czyx and zcyx of a cube: shape, channels and type are alike, voxels are not."""
    torch.manual_seed(0)
    network = torch.jit.trace(nn.Conv2d(3, 2, 3, padding=1), torch.zeros(1, 3, 16, 16))
    torch.jit.save(network, tmp_path / "net.pt")
    image = zarr.create_array(tmp_path / "i.zarr", shape=(3, 3, 32, 32), dtype="u1")
    image[:] = noise(3, 3, 32, 32)

    def run(axes: str, **more: Any) -> Report:
        options = Options(axes=axes, tile=(1, 16, 16), chunks=(1, 16, 16), normalize="none")
        return segment(
            tmp_path / "i.zarr", model=tmp_path / "net.pt", output=tmp_path / "o",
            options=options, engine="serial", **more,
        )  # fmt: skip

    def stop(report: Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("zcyx", progress=stop)
    with pytest.raises(BadRequest, match=r"\(axes zcyx, not czyx\)"):
        run("czyx")
    with pytest.raises(BadRequest, match=r"\(axes zcyx, not tczyx\)|must name the 4 dimensions"):
        run("tczyx")
    assert run("zcyx").before == 1


def test_a_new_option_and_a_new_fact_of_the_source_are_part_of_it(begun: Begun) -> None:
    @dataclass(frozen=True, kw_only=True)
    class More(Options):
        extra: int = 1

    @dataclass(frozen=True, kw_only=True)
    class Longer(Source):
        extra: int = 1

    made = plan(begun.source, model=begun.model, options=begun.options)
    values = {f.name: getattr(made.options, f.name) for f in fields(Options)}
    known = {f.name: getattr(made.source, f.name) for f in fields(Source)}
    for name, one, other in (
        ("options", More(**values), More(**values, extra=2)),
        ("source", Longer(**known), Longer(**known, extra=2)),
    ):
        mine, theirs = (replace(made, **{name: value}).identity() for value in (one, other))
        assert mine != theirs
        with pytest.raises(BadRequest, match=r"\(extra 1, not 2\)"):
            check_same("o", mine, theirs)
        for kept, asked in ((made.identity(), mine), (mine, made.identity())):
            with pytest.raises(BadRequest, match="another version of tilepipe, for which extra"):
                check_same("o", kept, asked)


def test_all_that_is_left_out_is_there_with_its_reason(begun: Begun) -> None:
    made = plan(begun.source, model=begun.model, options=begun.options).asdict()
    for name, reason in APART.items():
        outer, _, inner = name.partition(".")
        assert inner in made[outer] if inner else outer in made  # type: ignore[operator]
        assert reason


@pytest.mark.parametrize("algorithm", [None, ALGORITHM + 1])
def test_an_output_of_another_algorithm_is_refused(
    begun: Begun, tmp_path: Path, algorithm: int | None
) -> None:
    shutil.copytree(begun.output, tmp_path / "o")
    path = tmp_path / "o" / LEDGER / "plan.json"
    content = json.loads(path.read_text())
    content["identity"]["algorithm"] = algorithm
    content["plan"]["tilepipe"] = "0.0.7"
    path.write_text(json.dumps(content))
    with pytest.raises(BadRequest, match=r"begun by tilepipe 0\.0\.7 of another.*--overwrite$"):
        plan_segment(begun.source, model=begun.model, output=tmp_path / "o", options=begun.options)


@pytest.mark.parametrize(
    "value", [{"a": {1, 2}}, {"a": np.int64(1)}, {"a": float("nan")}, {1: 2}, {"a": {1: 2}}]
)
def test_arguments_of_a_network_are_what_json_holds(value: Any) -> None:
    with pytest.raises(BadRequest, match=r"^network_args \(=.*\) must be what JSON holds"):
        Options(network_args=value)


class Whole(nn.Module):
    """A network of whole numbers and halves, which float32 adds exactly in any order."""

    def __init__(self) -> None:
        super().__init__()
        random = np.random.default_rng(0)
        self.down = nn.Conv2d(1, 3, 3, padding=1)
        self.strided = nn.Conv2d(3, 3, 2, stride=2)
        self.middle = nn.Conv2d(3, 3, 3, padding=1, dilation=1)
        self.up = nn.ConvTranspose2d(3, 3, 2, stride=2)
        self.last = nn.Conv2d(6, 3, 3, padding=1)
        for parameter in self.parameters():
            values = random.integers(-1, 2, tuple(parameter.shape))
            parameter.data = torch.from_numpy(values).float()
        self.last.bias.data = torch.tensor([0.0, 1.0, 2.0]) / 1024  # so that no two are alike

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        first = torch.relu(self.down(image))
        lower = torch.relu(self.middle(self.strided(first)))
        pooled = nn.functional.max_pool2d(lower, 2)
        wide = nn.functional.interpolate(pooled, scale_factor=2.0, mode="bilinear")
        upper = self.up(lower + wide)
        answer: torch.Tensor = self.last(torch.cat([first, upper], 1))
        return answer


VOXELS = {1: "a27a04f4bf5973cd75d94f68921916f40a4dd17bbae2aae1604facd6ddcd7597"}
"""By the number of the algorithm, what it gives in exact arithmetic."""


def test_another_algorithm_has_another_number(tmp_path: Path) -> None:
    """Where this fails, bytes of outputs have changed: raise `ALGORITHM` and enter what it gives.

    Sums are exact here, so it is the same on every machine; of a change in rounding it knows
    nothing, and whoever makes one must know it.
    """
    program = torch.export.export(
        Whole().eval(),
        (torch.zeros(1, 1, 32, 32),),
        dynamic_shapes=({2: torch.export.Dim("y") * 4, 3: torch.export.Dim("x") * 4},),
    )
    torch.export.save(program, tmp_path / "net.pt2")
    image = np.random.default_rng(0).integers(0, 9, (75, 91), dtype=np.uint8)
    write_volume(tmp_path / "i.zarr", image, "yx", chunks=(32, 32))
    found = []
    for number, options in enumerate(
        (
            Options(write="logits", strategy="direct", tile=(16, 32), chunks=(16, 16)),
            Options(write="logits", strategy="sweep", boundary="network", normalize="scale:0.5,1"),
            Options(write="labels", normalize="percentile:0,100", threads=2),
        )
    ):
        report = segment(
            tmp_path / "i.zarr", model=tmp_path / "net.pt2", output=tmp_path / f"{number}",
            options=options, engine="serial",
        )  # fmt: skip
        assert report.failures == []
        found.append(read(tmp_path / f"{number}"))
    *logits, labels = found
    parts = [*(part * 1024 for part in logits), labels]
    whole = [np.rint(part).astype("<i4") for part in parts]
    assert max(np.abs(part).max() for part in whole) < 2**24
    assert all((part == exact).all() for part, exact in zip(parts, whole, strict=True))
    digest = hashlib.sha256(b"".join(part.tobytes() for part in whole)).hexdigest()
    assert digest == VOXELS[ALGORITHM]
