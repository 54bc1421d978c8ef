"""Index arithmetic: known values, agreement with NaN probing, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import tilepipe as tp
from tests.support import assert_close, noise, read, write_volume
from tilepipe.errors import BadRequest
from tilepipe.geometry import Context
from tilepipe.graph.graph import export, lattice, walk
from tilepipe.models.model import load_model, wrap
from tilepipe.models.spec import find_profile
from tilepipe.options import Options
from tilepipe.testing import networks, refusals, zoo

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def test_the_papers_network_needs_92_voxels_before_and_96_after() -> None:
    profile = find_profile(wrap(zoo.paper_unet()))
    assert profile.context == Context((92, 92), (96, 96), (16, 16))
    assert profile.smallest == (188, 188)
    assert profile.shrink == (184, 184)


def test_an_arbitrary_voxel_of_the_papers_network_reaches_107() -> None:
    graph = export(wrap(zoo.paper_unet()).on_meta(), (1, 1, 572, 572))
    reach = [walk(graph, 0, i, i + 1) for i in range(16)]
    assert max(i + 92 - start for i, (start, _) in enumerate(reach)) == 107
    assert max(stop - 1 - i - 92 for i, (_, stop) in enumerate(reach)) == 107


def test_axes_differ() -> None:
    profile = find_profile(wrap(zoo.anisotropic_unet_3d()))
    assert profile.context == Context((6, 20, 20), (6, 20, 20), (1, 4, 4))
    assert profile.smallest == (13, 44, 44)


@pytest.mark.parametrize("name", ["same unet", "bilinear", "nearest", "residual", "even", "modern"])
def test_graph_and_probe_agree(name: str, tmp_path: Path) -> None:
    """What the graph says by arithmetic is what NaN shows, but for weights of zero."""
    model = zoo.build(name)
    known = find_profile(model)
    script = torch.jit.trace(model.module, torch.rand(1, model.channels, 96, 96).double())
    torch.jit.save(script, tmp_path / "network.pt")
    found = find_profile(load_model(tmp_path / "network.pt"))
    assert found.method == "probe"
    assert (found.context, found.shrink) == (known.context, known.shrink)
    assert found.troubles == ()


@pytest.mark.parametrize(
    ("network", "layer"),
    [
        (refusals.GroupNormed, "group normalisation over the whole image (layer norm, GroupNorm)"),
        (refusals.Squeezing, "mean over the whole image"),
        (zoo.align_corners, "align_corners=True samples by the size of the whole image"),
    ],
)
def test_what_no_tiling_makes_exact_is_named(network: Callable[[], nn.Module], layer: str) -> None:
    profile = find_profile(wrap(network()))
    assert (profile.troubles + profile.off_lattice)[0].startswith(layer)


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("kernel of its size", "pooling over the whole image"),
        ("kernel of its width", "pooling over the whole image"),
        ("squeezed and expanded", "pooling over the whole image"),
        ("attention", "attention over the whole image (layer attention, MultiheadAttention)"),
        ("attention by hand", "attention over the whole image"),
    ],
)
def test_what_reads_the_whole_image_is_said(how: str, reason: str) -> None:
    """And no context of 0 for it, and no step as long as the image."""
    profile = find_profile(wrap(refusals.WholeImageReading(how)))
    assert profile.troubles[0].startswith(reason)
    assert "constant" not in " ".join(profile.troubles)
    assert profile.context.step == (16, 16)
    assert min(*profile.context.before, *profile.context.after) > 0


def test_pooling_that_covers_the_image_by_chance_has_a_context() -> None:
    """Eight levels halve 256 voxels to one, and 512 to two."""

    class Deep(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv2d(1, 2, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.one(x)
            for _ in range(8):
                y = torch.nn.functional.max_pool2d(y, 2)
            return torch.nn.functional.interpolate(y, scale_factor=256.0)

    profile = find_profile(wrap(Deep()))
    assert (profile.troubles, profile.context) == ((), Context((0, 0), (0, 0), (256, 256)))


def test_networks_of_one_size_are_run_at_that_size(tmp_path: Path) -> None:
    torch.save(refusals.Placed().state_dict(), tmp_path / "weights.pt")
    model = load_model(tmp_path / "weights.pt", network="tilepipe.testing.refusals:Placed")
    profile = find_profile(model)
    assert (profile.fixed, profile.smallest) == (True, (96, 96))
    assert profile.troubles[0].startswith("attention over the whole image")
    source = write_volume(tmp_path / "v.zarr", noise(100, 130), "yx")
    options = Options(network="tilepipe.testing.refusals:Placed", inexact=True)
    report = tp.segment(
        source, model=tmp_path / "weights.pt", output=tmp_path / "o.zarr", options=options
    )
    assert (report.failures, report.done) == ([], report.tiles)
    with pytest.raises(BadRequest, match="cannot be tiled exactly: attention over the whole"):
        tp.plan(
            source,
            model=tmp_path / "weights.pt",
            output=tmp_path / "p",
            options=Options(network="tilepipe.testing.refusals:Placed"),
        )


def test_the_volumes_channels_are_tried_where_weights_do_not_tell(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(networks.Folding().state_dict(), tmp_path / "weights.pt")
    options = Options(
        network="tilepipe.testing.networks:Folding", write="values", tile=(32, 32), chunks=(16, 16)
    )
    image = noise(3, 70, 60, dtype="float32")
    source = write_volume(tmp_path / "v.zarr", image, "cyx")
    report = tp.segment(
        source, model=tmp_path / "weights.pt", output=tmp_path / "o.zarr", options=options
    )
    assert report.plan.profile.channels == 3
    network = networks.Folding()
    network.load_state_dict(torch.load(tmp_path / "weights.pt"))
    truth = network(torch.from_numpy(image)[None])[0].detach().numpy()
    found = read(tmp_path / "o.zarr")
    assert_close(found[:, 4:-4, 4:-4], truth[:, 4:-4, 4:-4])


@pytest.mark.parametrize("network", [refusals.GroupNormed, refusals.Squeezing])
def test_probing_finds_that_there_is_no_context(
    network: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilepipe.models.probe.LARGEST", {2: 128})
    script = torch.jit.script(network().eval())
    torch.jit.save(script, tmp_path / "network.pt")
    assert (
        "a single voxel reaches all"
        in find_profile(load_model(tmp_path / "network.pt")).troubles[0]
    )


def test_an_operation_without_a_rule_is_probed(caplog: pytest.LogCaptureFixture) -> None:
    profile = find_profile(wrap(refusals.Rolling()))
    assert "operation roll has no rule" in caplog.text
    assert (profile.method, profile.troubles) == ("probe", ())
    assert profile.context == Context((2, 1), (0, 1), (1, 1))


def test_another_resolution_is_refused() -> None:
    with pytest.raises(BadRequest, match="another resolution"):
        find_profile(wrap(refusals.Shrinking()))


def test_sizes_that_do_not_divide_are_off_the_lattice() -> None:
    model = wrap(networks.Upsampling("bilinear", align=False))
    graph = export(model.on_meta(), (1, 1, 64, 64))
    assert lattice(graph) == ((8, 8), ())


def test_the_position_in_the_image_must_not_matter() -> None:
    class Placed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Conv2d(1, 2, 3, padding=1)
            self.place = torch.nn.Parameter(torch.rand(256, 256))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.one(x) + self.place
            return y

    profile = find_profile(wrap(Placed()))
    assert (profile.fixed, profile.smallest) == (True, (256, 256))
    assert "a constant of the image's size" in profile.troubles[0]
    assert "windows differ from one pass" in profile.troubles[0]


class Largest(nn.Module):
    """The larger of two tensors, which is no extreme of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = (nn.Conv2d(1, 2, 3, padding=1) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.min(torch.max(self.one(image), self.other(image)), 2 * self.one(image))


def test_the_larger_of_two_tensors_is_read_row_by_row() -> None:
    found = find_profile(wrap(Largest()))
    assert (found.troubles, found.context.before, found.context.after) == ((), (1, 1), (1, 1))
