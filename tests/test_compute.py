"""Any region of the whole-image graph, on the lattice or off it, is a piece of the whole pass."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.geometry import Region
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import export
from tilepipe.graph.readings import NoRule
from tilepipe.models.model import wrap
from tilepipe.testing import refusals, zoo

if TYPE_CHECKING:
    from torch import Tensor

    from tilepipe.graph.graph import Graph
    from tilepipe.models.model import Model

MODELS: dict[str, Model] = {}
GRAPHS: dict[tuple[str, tuple[int, ...]], Graph] = {}
SIZES = {
    "valid unet": [(108, 124)],
    "same unet": [(48, 64)],
    "paper unet": [(188, 204)],
    "milesial": [(37, 53), (64, 40), (41, 8)],
    "even": [(40, 61)],
    "modern": [(32, 52)],
    "valid unet 3d": [(48, 52, 44)],
    "anisotropic": [(15, 44, 52)],
    "same unet 3d": [(12, 16, 24)],
    "trilinear": [(11, 17, 24), (8, 9, 10)],
    "restoring": [(7, 11, 9)],
    "gated unet": [(60, 76)],
    "same gated unet": [(32, 44)],
    "residual unet": [(60, 76)],
    "both 3d": [(18, 48, 52)],
    "same both 3d": [(5, 18, 16)],
}
"""Sizes of the whole image; odd ones where the network takes them."""


def model_of(name: str) -> Model:
    if name not in MODELS:
        torch.manual_seed(0)
        more = {"milesial": zoo.align_corners, "paper unet": zoo.paper_unet}
        MODELS[name] = wrap(more[name]().double().eval()) if name in more else zoo.build(name)
    return MODELS[name]


def graph_of(name: str, shape: tuple[int, ...]) -> Graph:
    if (name, shape) not in GRAPHS:
        model = model_of(name)
        GRAPHS[name, shape] = export(model.on_meta(), (1, model.channels, *shape))
    return GRAPHS[name, shape]


@pytest.mark.parametrize("name", [*zoo.FLAT, *zoo.SOLID, "milesial", "paper unet"])
@settings(max_examples=6, derandomize=True)
@given(data=st.data())
def test_a_region_is_a_piece_of_the_whole_pass(name: str, data: st.DataObject) -> None:
    model = model_of(name)
    shape = data.draw(st.sampled_from(SIZES.get(name, [(64, 48), (37, 61), (33, 40)])))
    if model.output_shape(shape) is None:
        shape = tuple(n // 8 * 8 for n in shape)
    graph = graph_of(name, shape)
    image = torch.rand(1, model.channels, *shape, dtype=torch.float64)
    with torch.inference_mode():
        whole = model.module(image)
    edges = [sorted(data.draw(st.tuples(*[st.integers(0, n)] * 2))) for n in whole.shape[2:]]
    box = Region(
        tuple(min(a, n - 1) for (a, _), n in zip(edges, whole.shape[2:], strict=True)),
        tuple(max(b, min(a, n - 1) + 1) for (a, b), n in zip(edges, whole.shape[2:], strict=True)),
    )

    def read(region: Region) -> Tensor:
        return image[(slice(None), slice(None), *region.slices)]

    with torch.inference_mode():
        found = RegionEvaluator(graph, model.module)(box, read)
    truth = whole[(slice(None), slice(None), *box.slices)]
    assert found.shape == truth.shape
    assert (found - truth).abs().max() <= 1e-12 * (whole.max() - whole.min())


def test_what_has_no_finite_context_is_refused() -> None:
    model = wrap(refusals.GroupNormed())
    graph = export(model.on_meta(), (1, 1, 32, 32))
    with pytest.raises(NoRule, match="group normalisation"):
        RegionEvaluator(graph, model.module)
