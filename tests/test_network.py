"""Index arithmetic: known values, agreement with NaN probing, and what is refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests import zoo
from tilepipe.errors import BadRequest
from tilepipe.geometry import Context
from tilepipe.model import load_model, wrap
from tilepipe.network import export, lattice, walk
from tilepipe.profile import find_profile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn


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
        (zoo.GroupNormed, "group normalisation over the whole image (layer norm, GroupNorm)"),
        (zoo.Squeezing, "mean over the whole image"),
        (zoo.align_corners, "align_corners=True samples by the size of the whole image"),
    ],
)
def test_what_no_tiling_makes_exact_is_named(network: Callable[[], nn.Module], layer: str) -> None:
    profile = find_profile(wrap(network()))
    assert (profile.troubles + profile.off_lattice)[0].startswith(layer)


@pytest.mark.parametrize("network", [zoo.GroupNormed, zoo.Squeezing])
def test_probing_finds_that_there_is_no_context(
    network: Callable[[], nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tilepipe.probe.LARGEST", {2: 128})
    script = torch.jit.script(network().eval())
    torch.jit.save(script, tmp_path / "network.pt")
    assert (
        "a single voxel reaches all"
        in find_profile(load_model(tmp_path / "network.pt")).troubles[0]
    )


def test_an_operation_without_a_rule_is_probed(caplog: pytest.LogCaptureFixture) -> None:
    profile = find_profile(wrap(zoo.Rolling()))
    assert "operation roll has no rule" in caplog.text
    assert (profile.method, profile.troubles) == ("probe", ())
    assert profile.context == Context((2, 1), (0, 1), (1, 1))


def test_another_resolution_is_refused() -> None:
    with pytest.raises(BadRequest, match="another resolution"):
        find_profile(wrap(zoo.Shrinking()))


def test_sizes_that_do_not_divide_are_off_the_lattice() -> None:
    model = wrap(zoo.Upsampling("bilinear", align=False))
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
