"""Swept slab by slab, a region is the same piece of the whole pass, and nothing is done twice."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from tests.test_compute import SIZES, graph_of, model_of
from tilepipe.geometry import Region
from tilepipe.graph.bounds import clip, extents, reads_along, rows_along
from tilepipe.graph.buffers import advance
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.footprint import ByteBuffers, voxel_bytes
from tilepipe.graph.fusion import course_of
from tilepipe.graph.graph import export
from tilepipe.graph.sweep import Sweep, TensorBuffers, steps
from tilepipe.models.cost import Liveness
from tilepipe.models.model import wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.windows import whole
from tilepipe.planning.regions import regions_of
from tilepipe.testing import zoo

NAMES = [*zoo.FLAT, *zoo.SOLID, "milesial", "paper unet"]


def draw_shape(data: st.DataObject, name: str) -> tuple[int, ...]:
    shape = data.draw(st.sampled_from(SIZES.get(name, [(64, 48), (37, 61), (33, 40)])))
    if model_of(name).output_shape(shape) is None:
        shape = tuple(n // 8 * 8 for n in shape)
    return shape


def draw_rows(data: st.DataObject, length: int) -> tuple[int, int]:
    start = data.draw(st.integers(0, length - 1))
    return start, data.draw(st.integers(start + 1, length))


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, derandomize=True)
@given(data=st.data())
def test_a_swept_region_is_a_piece_of_the_whole_pass(name: str, data: st.DataObject) -> None:
    model, shape = model_of(name), draw_shape(data, name)
    graph = graph_of(name, shape)
    image = torch.rand(1, model.channels, *shape, dtype=torch.float64)
    with torch.inference_mode():
        whole = model.module(image)
    rows = [draw_rows(data, n) for n in whole.shape[2:]]
    box = Region(tuple(a for a, _ in rows), tuple(b for _, b in rows))
    axis, slab = data.draw(st.integers(0, len(shape) - 1)), data.draw(st.integers(1, 24))
    seen: list[tuple[int, int]] = []

    def read(region: Region) -> Tensor:
        seen.append((region.start[axis], region.stop[axis]))
        return image[(slice(None), slice(None), *region.slices)]

    with torch.inference_mode():
        found = list(Sweep(RegionEvaluator(graph, model.module), box, axis).run(slab, read))
    assert [a for (a, _), _ in found] == [rows[axis][0], *(b for (_, b), _ in found[:-1])]
    assert all(one[1] == two[0] for one, two in itertools.pairwise(seen))
    truth = whole[(slice(None), slice(None), *box.slices)]
    answer = torch.cat([value for _, value in found], 2 + axis)
    assert answer.shape == truth.shape
    assert (answer - truth).abs().max() <= 1e-12 * (whole.max() - whole.min())


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=7, derandomize=True)
@given(data=st.data())
def test_every_row_is_computed_once_from_rows_that_are_there(
    name: str, data: st.DataObject
) -> None:
    shape = draw_shape(data, name)
    graph = graph_of(name, shape)
    axis = data.draw(st.integers(0, len(shape) - 1))
    start, stop = draw_rows(data, graph.out_shape[2 + axis])
    needed = rows_along(graph, axis, start, stop)
    done = {node: low for node, (low, _) in needed.items()}
    keep = dict(done)
    for step in steps(graph, axis, start, stop, data.draw(st.integers(1, 24))):
        for node, (low, high) in step.new.items():
            assert low == done[node] < high
            done[node] = high
        for item in graph.nodes:
            if item.node in step.new:
                for source, rows in reads_along(graph, item, axis, step.new[item.node]):
                    low, high = clip(rows, extents(graph, source)[axis])
                    assert keep[source] <= low
                    assert high <= done[source]
        assert all(keep[node] <= step.keep[node] <= done[node] for node in done)
        keep = dict(step.keep)
    assert done == {node: high for node, (_, high) in needed.items()}


@pytest.mark.parametrize(("name", "size"), [("paper unet", 16 * 40 + 188), ("same unet", 800)])
def test_steps_are_alike_and_as_large_in_the_middle_as_at_the_start(name: str, size: int) -> None:
    graph = graph_of(name, (size, 188 if name == "paper unet" else 32))
    sizes = [
        {node: high - low for node, (low, high) in step.new.items()}
        for step in steps(graph, 0, 0, graph.out_shape[2], 64)
    ]
    middle = [one for one in sizes[3:-2] if graph.output in one]
    assert len(middle) >= 3
    assert all(one == middle[0] for one in middle)
    assert all(one.get(graph.source, 0) <= middle[0][graph.source] for one in sizes)


@pytest.mark.parametrize("slab", [16, pytest.param(64, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name",
    ["valid unet", "same unet", "bilinear", "nearest", "bicubic", "residual", "even", "milesial",
     "valid unet 3d", "anisotropic", "same unet 3d", "trilinear", "restoring",
     "gated unet", "residual unet", "both 3d", "same both 3d"],
)  # fmt: skip
def test_memory_is_predicted_within_a_quarter(name: str, slab: int) -> None:
    network = zoo.align_corners() if name == "milesial" else {**zoo.FLAT, **zoo.SOLID}[name]()
    model = wrap(network.eval())
    profile, shape = find_profile(model), ((400, 300) if model.axes == 2 else (64, 60, 50))
    box = whole(profile, shape, None)
    graph = export(model.on_meta(), (1, model.channels, *box.shape))
    regions = regions_of(profile, graph, box, shape)
    spans = [regions.along(axis, 0, n) for axis, n in enumerate(shape)]
    sweep = Sweep(
        RegionEvaluator(graph, model.module),
        regions.output_box(Region((0,) * model.axes, shape)),
        0,
    )
    alive = Liveness(torch.zeros(1))
    with torch.no_grad(), alive:
        slabs = sweep.run(slab, lambda rows: _channels_last(rows, model.channels))
        while next(slabs, None) is not None:
            pass
    assert 0.8 * alive.peak <= regions.swept(spans, 0, slab).peak <= 1.25 * alive.peak


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] * (name in ("bicubic", *zoo.SOLID)))
        for name in (*zoo.FLAT, *zoo.SOLID)
        if name != "valid unet 3d"
    ]
    + ["valid unet 3d"],
)
def test_the_bytes_that_are_counted_are_those_of_the_tensors_that_are_held(name: str) -> None:
    model = zoo.build(name)
    profile, shape = find_profile(model), ((96, 80) if model.axes == 2 else (40, 36, 28))
    box = whole(profile, shape, None)
    graph = export(model.on_meta(), (1, model.channels, *box.shape))
    out = Region.whole(graph.out_shape[2:])
    evaluator, widths = RegionEvaluator(graph, model.module), dict[fx.Node, int]()
    for axis in range(model.axes):
        rows = [rows_along(graph, a, 0, n) for a, n in enumerate(out.stop)]
        for node in (graph.source, *(item.node for item in graph.nodes)):
            across = [n[node][1] - n[node][0] for a, n in enumerate(rows) if a != axis]
            widths[node] = voxel_bytes(graph, node) * math.prod(across)
        evaluator.outermost = axis
        tensors = TensorBuffers(
            evaluator, out, axis, lambda rows: _channels_last(rows, model.channels).double()
        )
        counted, held, peak = ByteBuffers(graph, widths), 0, 0
        for step in steps(graph, axis, 0, out.stop[axis], 16):
            with torch.inference_mode():
                advance(course_of(graph), step, tensors)
            advance(course_of(graph), step, counted)
            held = 0
            for node, pieces in tensors.pieces.items():
                bytes_ = [(p.first, p.last, _bytes_of(p.value)) for p in pieces]
                assert bytes_ == [tuple(p) for p in counted.pieces[node]], node
                held += sum(size for _, _, size in bytes_)
            assert held == counted.alive
            assert _memory_of(tensors) <= 2 * held
            peak = max(peak, held)
            tensors.pieces[graph.output].clear()
            while counted.pieces[graph.output]:
                counted.free(counted.pieces[graph.output].pop())
        assert 0 < peak <= counted.peak


def _memory_of(buffers: TensorBuffers) -> int:
    """Return the bytes of the memory in which tensors lie, of which they may be a part."""
    values = [piece.value for pieces in buffers.pieces.values() for piece in pieces]
    tensors = [t for v in values for t in (v if isinstance(v, tuple | list) else [v])]
    storages = [t.untyped_storage() for t in tensors if isinstance(t, Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _bytes_of(value: object) -> int:
    parts = value if isinstance(value, tuple | list) else [value]
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def _channels_last(rows: Region, channels: int) -> Tensor:
    axes = len(rows.shape)
    return torch.zeros((*rows.shape, channels)).permute(axes, *range(axes))[None]
