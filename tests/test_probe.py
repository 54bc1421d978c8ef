"""Networks whose graph cannot be read: what is measured of them, and what is tried."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilepipe as tp
from tests.support import assert_close, noise, read, write_volume
from tilepipe.errors import BadRequest
from tilepipe.models.heads import tensors_of
from tilepipe.models.model import load_model
from tilepipe.models.spec import find_profile
from tilepipe.models.trial import Trial, try_windows
from tilepipe.options import Options
from tilepipe.testing import networks

if TYPE_CHECKING:
    from pathlib import Path


def traced(network: nn.Module, path: Path, *, side: int = 64, channels: int = 1) -> Path:
    """Write TorchScript of a network with random weights, which may give several tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        example = torch.rand(1, channels, side, side)
        torch.jit.save(torch.jit.trace(network.eval(), example, strict=False), path)
    return path


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Probe no images larger than the networks here need."""
    monkeypatch.setattr("tilepipe.models.probe.LARGEST", {2: 128, 3: 64})
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "size",
    [{"levels": 4, "convolutions": 1}, pytest.param({"levels": 5}, marks=pytest.mark.long)],
    ids=["small", "fills what is probed"],
)
@pytest.mark.parametrize("align", [True, False])
def test_a_traced_nested_unet_is_exact_unless_its_corners_are_aligned(
    size: dict[str, int], align: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The context of the larger one left nothing to compare in the image that is probed."""
    if size["levels"] == 5:
        monkeypatch.setattr("tilepipe.models.probe.LARGEST", {2: 256})
    model = traced(networks.Nested(align=align, **size), tmp_path / "script.pt")
    source = write_volume(tmp_path / "v.zarr", noise(90, 110), "yx")
    if align:
        with pytest.raises(BadRequest, match=r"windows differ from one pass .*; give its state"):
            tp.plan(source, model=model, output=tmp_path / "o")
        return
    profile = find_profile(load_model(model))
    assert profile.troubles == ()
    trial = try_windows(load_model(model), profile)
    assert trial.voxels > 5000
    assert trial.difference < 1e-12


def test_a_trial_that_compares_nothing_is_a_trouble() -> None:
    assert "could not be compared with one pass: no voxel" in Trial(0, 0.0, 1e-6).trouble
    assert Trial(5, 1e-9, 1e-6).trouble == ""


class Constant(nn.Module):
    """An answer that is the same for every image of noise, whatever the network reads."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x).clamp(1e9, 1e9)


def test_an_answer_that_does_not_vary_shows_nothing(tmp_path: Path) -> None:
    profile = find_profile(load_model(traced(Constant(), tmp_path / "script.pt")))
    assert "the same everywhere" in profile.troubles[0]


class Resizing(nn.Module):
    """Takes every size, but samples by the size of the whole where it is odd."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.max_pool2d(self.one(x), 2)
        return self.two(F.interpolate(y, size=x.shape[-2:], mode="bilinear"))


class Rolled(nn.Module):
    """Reads the row at the other end of the image at its border, and one row off elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.one(x), 1, dims=2)


@pytest.mark.parametrize(
    ("network", "shape"), [(Resizing, (64, 81)), (Rolled, (64, 80))], ids=["odd", "rolled"]
)
def test_scripts_are_tried_at_the_networks_own_border(
    network: type[nn.Module], shape: tuple[int, int], tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(network().eval()), tmp_path / "script.pt")
    source = write_volume(tmp_path / "v.zarr", noise(*shape), "yx")
    options = Options(boundary="network")
    with pytest.raises(BadRequest, match=r"boundary \(=network\) cannot be tiled exactly on 64,"):
        tp.plan(source, model=tmp_path / "script.pt", output=tmp_path / "o", options=options)
    if network is Resizing:  # and on its lattice, and mirrored
        source = write_volume(tmp_path / "even.zarr", noise(64, 82), "yx")
        tp.plan(source, model=tmp_path / "script.pt", output=tmp_path / "o", options=options)
    tp.plan(source, model=tmp_path / "script.pt", output=tmp_path / "o")


class Patterned(nn.Module):
    """Adds what repeats every four columns, which no NaN shows."""

    def __init__(self, kernel: int) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, kernel, padding=kernel // 2)

    def forward(self, x: Tensor) -> Tensor:
        columns = torch.arange(x.shape[3], device=x.device)
        return self.one(x) + columns % 4 * 0.1


@pytest.mark.parametrize("boundary", ["mirror", "network"])
@pytest.mark.parametrize("kernel", [3, 9], ids=["context 1", "context 4"])
def test_a_pattern_of_columns_is_seen_by_windows_that_begin_on_every_phase(
    kernel: int, boundary: str, tmp_path: Path
) -> None:
    model = traced(Patterned(kernel), tmp_path / "script.pt")
    source = write_volume(tmp_path / "v.zarr", noise(60, 136), "yx")
    options = Options(boundary=boundary, tile=(30, 30), chunks=(30, 30))
    with pytest.raises(BadRequest, match="the answer depends on the size or the place"):
        tp.plan(source, model=model, output=tmp_path / "o", options=options)


class Heads(nn.Module):
    """Two outputs: windows give one exactly; the other knows the whole, or places."""

    def __init__(self, form: str, exact: int) -> None:
        super().__init__()
        self.form, self.exact = form, exact
        self.one, self.two = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)

    def forward(self, x: Tensor) -> object:
        y = self.one(x)
        if self.form == "no rule":
            y = torch.special.bessel_j0(y)
        good = self.two(y)
        place = torch.ones_like(x).cumsum(3) / x.shape[3]
        bad = good + (x.mean() if self.form == "nested" else place)
        first, second = (good, bad) if self.exact == 0 else (bad, good)
        if self.form == "dict":
            return {"b": first, "a": second}
        return (first, (second,)) if self.form == "nested" else (first, second)


@pytest.mark.parametrize("exact", [0, 1])
@pytest.mark.parametrize("form", ["tuple", "nested", "dict", "no rule"])
def test_the_output_that_is_written_is_the_one_that_is_probed_and_tried(
    form: str, exact: int, tmp_path: Path
) -> None:
    """Each can be asked for, and is exact or refused by itself: no other output matters to it."""
    network, image = Heads(form, exact).eval(), noise(24, 40, dtype="float32")
    source = write_volume(tmp_path / "v.zarr", image, "yx")
    options = Options(write="values", tile=(16, 16), chunks=(16, 16))
    if form == "no rule":
        model = tmp_path / "weights.pt"
        torch.save(network.state_dict(), model)
        arguments = {"form": form, "exact": exact}
        options = replace(options, network="tests.test_probe:Heads", network_args=arguments)
    else:
        model = traced(network, tmp_path / "script.pt")
    grown = 0 if form == "tuple" else 4
    good = replace(options, head=exact, boundary="mirror" if grown else "network")
    report = tp.segment(source, model=model, output=tmp_path / "good", options=good)
    assert report.plan.strategy == "windows"
    padded = F.pad(torch.from_numpy(image)[None, None], (grown,) * 4, mode="reflect")
    with torch.no_grad():
        whole = tensors_of(network(padded))[exact][0].numpy()
    assert_close(read(tmp_path / "good"), whole[:, grown : grown + 24, grown : grown + 40])
    bad = replace(good, head=1 - exact)
    why = "a single voxel reaches all" if form == "nested" else "windows differ from one pass"
    with pytest.raises(BadRequest, match=why):
        tp.plan(source, model=model, output=tmp_path / "bad", options=bad)
    assert tp.context(model if form != "no rule" else network, head=exact).step == (1, 1)
    with pytest.raises(BadRequest, match=why):
        tp.context(model if form != "no rule" else network, head=1 - exact)


class Cast(nn.Module):
    """Turns on autocast inside `forward`, by a context or by a decorator, or turns it off."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "decorated":
            return self._cast(x).float()
        if self.how == "set":
            torch.set_autocast_enabled("cpu", True)
            torch.set_autocast_dtype("cpu", torch.bfloat16)
            y = self.two(torch.relu(self.one(x)))
            torch.set_autocast_enabled("cpu", False)
            return y.float()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.how != "off"):
            y = self.two(torch.relu(self.one(x)))
        return y.float()

    @torch.autocast("cpu", dtype=torch.bfloat16)
    def _cast(self, x: Tensor) -> Tensor:
        y: Tensor = self.two(torch.relu(self.one(x)))
        return y


@pytest.mark.parametrize("how", ["context", "decorated", "set", "off"])
def test_autocast_inside_a_network_is_kept(how: str, tmp_path: Path) -> None:
    """Tiles are what the network says, not what it says less its autocast."""
    network = Cast(how).eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    options = Options(
        network="tests.test_probe:Cast", network_args={"how": how}, write="values", tile=(32, 32)
    )
    image = noise(70, 60, dtype="float32")
    source, model = write_volume(tmp_path / "v.zarr", image, "yx"), tmp_path / "weights.pt"
    report = tp.segment(source, model=model, output=tmp_path / "o.zarr", options=options)
    padded = F.pad(torch.from_numpy(image)[None, None], (8, 8, 8, 8), mode="reflect")
    truth = network(padded)[0, :, 8:-8, 8:-8].detach().numpy()
    plain = Cast("off").eval()
    plain.load_state_dict(network.state_dict())
    lost = plain(padded)[0, :, 8:-8, 8:-8].detach().numpy()
    found = read(tmp_path / "o.zarr")
    if how == "off":
        assert report.plan.strategy in ("regions", "sweep")
        assert_close(found, truth)
        return
    assert report.plan.strategy == "windows"
    assert "torch.autocast (cpu, bfloat16)" in " ".join(report.plan.notices)
    differs, would_differ = abs(found - truth), abs(lost - truth)
    assert (differs > 0).mean() < 0.02  # where bfloat16 was rounded the other way
    assert (would_differ > 0).mean() > 0.5


def test_a_program_with_autocast_is_refused_by_name(tmp_path: Path) -> None:
    sides = {2: torch.export.Dim("h", min=8), 3: torch.export.Dim("w", min=8)}
    program = torch.export.export(
        Cast("context").eval(), (torch.rand(1, 1, 64, 64),), dynamic_shapes=(sides,)
    )
    torch.export.save(program, tmp_path / "network.pt2")
    with pytest.raises(BadRequest, match=r"torch.autocast \(cpu, bfloat16\) inside.*--precision"):
        load_model(tmp_path / "network.pt2")
