"""What a plan accepts can be run; what cannot is refused in one line, or given in windows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilepipe as tp
from tests.support import noise, read, write_volume
from tests.test_regions import cut, known
from tilepipe.errors import BadRequest, TileError
from tilepipe.geometry import Region
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import export
from tilepipe.graph.readings import NoRule
from tilepipe.models.model import wrap
from tilepipe.models.rehearsal import rehearse
from tilepipe.options import Options
from tilepipe.testing import networks

if TYPE_CHECKING:
    from pathlib import Path

SCALE = "scale:0.00392156862745098,0"
PICKY = """
import torch
from torch import nn
import torch.nn.functional as F

class Picky(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.two = nn.Conv2d(4, 2, 3, padding=1)

    def forward(self, x):
        if type(x) is not torch.Tensor:
            raise TypeError("a plain tensor is needed")
        return F.interpolate(self.two(self.one(x)), size=x.shape[2:], mode="bilinear")
"""
"""A network that runs, and that `torch.export` refuses."""


def picky() -> nn.Module:
    space: dict[str, type[nn.Module]] = {}
    exec(PICKY, space)
    return space["Picky"]()


def write_picky(folder: Path) -> tuple[Path, str]:
    torch.manual_seed(0)
    (folder / "networks.py").write_text(PICKY)
    torch.save(picky().state_dict(), folder / "weights.pt")
    return folder / "weights.pt", f"{folder / 'networks.py'}:Picky"


@pytest.mark.parametrize(("shape", "accepted"), [((96, 64), True), ((97, 64), False)])
def test_probed_networks_keep_their_own_boundary_on_their_lattice_only(
    shape: tuple[int, int], accepted: bool, tmp_path: Path
) -> None:
    model, network = write_picky(tmp_path)
    image = noise(*shape)
    source = write_volume(tmp_path / "v.zarr", image, "yx", (32, 32))
    options = Options(
        network=network, boundary="network", normalize=SCALE, write="logits",
        tile=(32, 32), chunks=(32, 32),
    )  # fmt: skip
    if not accepted:
        with pytest.raises(BadRequest, match=r"cannot be tiled exactly on 97,64 voxels: windows"):
            tp.plan(source, model=model, options=options)
        return
    report = tp.segment(source, model=model, output=tmp_path / "o.zarr", options=options)
    assert report.plan.strategy == "windows"
    whole = picky()
    whole.load_state_dict(torch.load(model, weights_only=True))
    grey = torch.from_numpy(image.astype("float32"))[None, None] * 0.00392156862745098
    with torch.inference_mode():
        truth = whole(grey)[0].numpy()
    assert abs(read(tmp_path / "o.zarr") - truth).max() <= 1e-5 * (truth.max() - truth.min())


class Turning(nn.Module):
    """Convolves with the axes of the image turned."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, (1, 5), padding=(0, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x.transpose(2, 3)).transpose(2, 3)


class Keeping(nn.Module):
    """Pools adaptively to the size that there is, which changes nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.adaptive_avg_pool2d(self.one(x), x.shape[2:])


def test_axes_that_are_turned_are_not_computed_by_regions() -> None:
    model = wrap(Turning().eval())
    with pytest.raises(NoRule, match="axes are turned"):
        rehearse(export(model.on_meta(), (1, 1, 64, 48)), model.on_meta())


def test_pooling_that_changes_nothing_runs() -> None:
    model = wrap(Keeping().eval())
    graph = export(model.on_meta(), (1, 1, 64, 48))
    rehearse(graph, model.on_meta())
    image, box = torch.rand(1, 1, 64, 48), Region((10, 3), (50, 40))
    with torch.inference_mode():
        found = RegionEvaluator(graph, model.module)(box, lambda r: image[(..., *r.slices)])
        truth = model.module(image)[(..., *box.slices)]
    assert torch.allclose(found, truth, atol=1e-6)


class Widened(nn.Module):
    """Leaves the type that it is run in before its last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 3, padding=1), nn.Conv2d(2, 2, 3, padding=1)
        self.register_buffer("table", torch.rand(1, 2, 1, 1, dtype=torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).to(torch.float64).to(torch.float32))


def test_a_precision_that_the_network_leaves_is_seen_before_it_is_run() -> None:
    model = wrap(Widened().eval())
    graph = export(model.on_meta(), (1, 1, 64, 48))
    rehearse(graph, model.on_meta())
    with pytest.raises(NoRule, match="a region cannot be computed"):
        rehearse(graph, model.on_meta(torch.bfloat16))
    assert model.refusal((64, 48), torch.bfloat16)
    assert not model.refusal((64, 48))


def test_other_rows_than_are_read_are_refused() -> None:
    regions, image, _ = cut("resizing", (64, 80), (64, 80))
    evaluator = RegionEvaluator(regions.graph, known("resizing")[0].module)
    with pytest.raises(TileError, match="the network reads rows"):
        evaluator(Region((0, 0), (32, 32)), lambda rows: image)


@pytest.mark.parametrize("strategy", ["direct", "sweep"])
def test_networks_that_resize_are_segmented_with_their_own_boundary(
    strategy: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = networks.Resizing().eval()
    torch.save(network.state_dict(), tmp_path / "weights.pt")
    image = noise(40, 2497)
    source = write_volume(tmp_path / "v.zarr", image, "yx", (40, 128))
    options = Options(
        network="tilepipe.testing.networks:Resizing", boundary="network",
        normalize=SCALE, write="logits",
        tile=(40, 256), chunks=(40, 128), strategy=strategy,
    )  # fmt: skip
    output = tmp_path / "o.zarr"
    report = tp.segment(source, model=tmp_path / "weights.pt", output=output, options=options)
    assert report.failures == []
    grey = torch.from_numpy(image.astype("float32"))[None, None] * 0.00392156862745098
    with torch.inference_mode():
        truth = network(grey)[0].numpy()
    assert abs(read(output) - truth).max() <= 5e-5 * (truth.max() - truth.min())
