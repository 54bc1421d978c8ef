"""Regions as a plan cuts them: read as they say, they are pieces of the whole pass."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch

from tests import zoo
from tilepipe.checks import find_limit
from tilepipe.compute import RegionEvaluator
from tilepipe.geometry import Region
from tilepipe.network import export
from tilepipe.options import Options
from tilepipe.profile import find_profile
from tilepipe.regions import regions_of
from tilepipe.sweep import Sweep
from tilepipe.windows import whole

if TYPE_CHECKING:
    from torch import Tensor

    from tilepipe.geometry import Shape
    from tilepipe.model import Model
    from tilepipe.profile import Profile
    from tilepipe.regions import Regions

KNOWN: dict[str, tuple[Model, Profile]] = {}


def known(name: str) -> tuple[Model, Profile]:
    if name not in KNOWN:
        model = zoo.build(name)
        KNOWN[name] = model, find_profile(model)
    return KNOWN[name]


def cut(name: str, shape: Shape, size: Shape) -> tuple[Regions, Tensor, Tensor]:
    """Return regions with the network's own boundary, an image and the whole pass over it."""
    model, profile = known(name)
    limit = find_limit(model, profile, shape, Options(boundary="network"))
    assert limit is not None
    box = whole(profile, shape, limit)
    graph = export(model.on_meta(), (1, model.channels, *box.shape))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.channels, *limit, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        return regions_of(profile, graph, box, size), image, model.module(image)


@pytest.mark.parametrize("name", zoo.SIZED)
@pytest.mark.parametrize("shape", [(40, 2497), (64, 4227), (141, 137)])
def test_regions_off_the_lattice_are_pieces_of_the_whole_pass(name: str, shape: Shape) -> None:
    regions, image, truth = cut(name, shape, (64, 256))
    spans = [regions.along(axis, 0, n) for axis, n in enumerate(shape)]
    evaluator = RegionEvaluator(regions.graph, known(name)[0].module)
    for chosen in itertools.product(*spans):
        a, b, c, d = zip(*chosen, strict=True)
        box, seen = regions.output_box(Region(c, d)), Region(a, b)
        with torch.inference_mode():
            found = evaluator(box, lambda _, at=seen: image[(..., *at.slices)])
        difference = (found - truth[(..., *Region(c, d).slices)]).abs().max()
        assert difference <= 1e-12 * (truth.max() - truth.min()), str(box)


@pytest.mark.parametrize("name", zoo.SIZED)
def test_sweeps_off_the_lattice_are_pieces_of_the_whole_pass(name: str) -> None:
    shape = (2497, 75)
    regions, image, truth = cut(name, shape, shape)
    evaluator = RegionEvaluator(regions.graph, known(name)[0].module)
    sweep = Sweep(evaluator, regions.output_box(Region.whole(shape)), 0)
    with torch.inference_mode():
        slabs = sweep.run(128, lambda rows: image[(..., *rows.slices)])
        found = torch.cat([slab for _, slab in slabs], 2)
    assert (found - truth).abs().max() <= 1e-12 * (truth.max() - truth.min())
