"""Regions as a plan cuts them: read as they say, they are pieces of the whole pass."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.geometry import Region
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.sweep import Sweep
from tilepipe.models.rehearsal import whole_graph
from tilepipe.models.spec import find_profile
from tilepipe.models.windows import whole
from tilepipe.options import Options
from tilepipe.planning.checks import find_limit
from tilepipe.planning.regions import regions_of
from tilepipe.testing import zoo

if TYPE_CHECKING:
    from torch import Tensor

    from tilepipe.geometry import Shape
    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.planning.regions import Regions

KNOWN: dict[str, tuple[Model, Profile]] = {}


def known(name: str) -> tuple[Model, Profile]:
    if name not in KNOWN:
        model = zoo.build(name)
        KNOWN[name] = model, find_profile(model)
    return KNOWN[name]


def cut(
    name: str, shape: Shape, size: Shape, boundary: str = "network"
) -> tuple[Regions, Tensor, Tensor]:
    """Return the regions of a plan, what the network is given, and the whole pass over it."""
    model, profile = known(name)
    limit = find_limit(model, profile, shape, Options(boundary=boundary))
    box = whole(profile, shape, limit)
    graph = whole_graph(model, profile, box, torch.float64)
    assert graph is not None
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(1, model.channels, *box.shape, generator=generator, dtype=torch.float64)
    with torch.inference_mode():
        return regions_of(profile, graph, box, size), image, model.module(image)


def answer(regions: Regions, image: Tensor, truth: Tensor, name: str, shape: Shape) -> Tensor:
    """Return what all regions give, each from just the rows that it says it reads."""
    found = torch.full_like(truth, torch.nan)
    spans = [regions.along(axis, 0, n) for axis, n in enumerate(shape)]
    evaluator = RegionEvaluator(regions.graph, known(name)[0].module)
    back = [-n for n in regions.origin]
    for chosen in itertools.product(*spans):
        a, b, c, d = zip(*chosen, strict=True)
        box, given_rows = regions.output_box(Region(c, d)), Region(a, b).shift(back)

        def read(rows: Region, given_rows: Region = given_rows) -> Tensor:
            assert rows == given_rows
            return image[(..., *rows.slices)]

        with torch.inference_mode():
            found[(..., *box.slices)] = evaluator(box, read)
    return found


def assert_equal(found: Tensor, truth: Tensor, box: Region) -> None:
    difference = (found - truth)[(..., *box.slices)].abs().max()
    assert difference <= 1e-12 * (truth.max() - truth.min())


@pytest.mark.parametrize("name", zoo.SIZED)
@pytest.mark.parametrize(
    "shape", [(40, 2497), (141, 137), pytest.param((64, 4227), marks=pytest.mark.long)]
)
def test_regions_off_the_lattice_are_pieces_of_the_whole_pass(name: str, shape: Shape) -> None:
    regions, image, truth = cut(name, shape, (64, 256))
    box = regions.output_box(Region.whole(shape))
    assert_equal(answer(regions, image, truth, name, shape), truth, box)


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


NAMES = [*zoo.FLAT, *zoo.SOLID, *zoo.SIZED]
CROSSED = [(name, boundary) for name in NAMES for boundary in ("mirror", "network")
           if boundary == "mirror" or name in (*zoo.PADDED, *zoo.SIZED)]  # fmt: skip


def cross(name: str, boundary: str, shape: Shape, size: Shape, slab: int) -> None:
    """Compare boxes and sweeps along each axis with the whole pass."""
    regions, image, truth = cut(name, shape, size, boundary)
    box = regions.output_box(Region.whole(shape))
    assert_equal(answer(regions, image, truth, name, shape), truth, box)
    evaluator = RegionEvaluator(regions.graph, known(name)[0].module)
    for axis in range(len(shape)):
        with torch.inference_mode():
            slabs = Sweep(evaluator, box, axis).run(slab, lambda rows: image[(..., *rows.slices)])
            found = torch.cat([one for _, one in slabs], 2 + axis)
        assert (found - truth[(..., *box.slices)]).abs().max() <= 1e-12 * (
            truth.max() - truth.min()
        )


@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        ("same unet", "network"), ("residual", "network"), ("bicubic", "network"),
        ("trilinear", "network"), ("valid unet", "mirror"), ("even", "mirror"),
        ("resizing", "mirror"), ("resizing nearest", "network"), ("upscoring", "network"),
    ],
)  # fmt: skip
def test_plans_of_odd_sizes_are_pieces_of_the_whole_pass(name: str, boundary: str) -> None:
    if known(name)[1].axes == 2:
        cross(name, boundary, (131, 77), (50, 41), 24)
    else:
        cross(name, boundary, (13, 27, 22), (13, 10, 15), 7)


@pytest.mark.long
@pytest.mark.parametrize(("name", "boundary"), CROSSED)
@settings(max_examples=12, derandomize=True)
@given(data=st.data())
def test_plans_of_any_size_are_pieces_of_the_whole_pass(
    name: str, boundary: str, data: st.DataObject
) -> None:
    axes = known(name)[1].axes
    most, edge = (300, 200) if axes == 2 else (40, 30)
    shape = data.draw(st.tuples(*[st.integers(1, most)] * axes))
    size = data.draw(st.tuples(*[st.integers(most // 10, edge)] * axes))
    cross(name, boundary, shape, size, data.draw(st.integers(1, 48)))
