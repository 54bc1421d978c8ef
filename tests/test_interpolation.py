"""Interpolation row by row is what the library makes of the whole, whatever the two sizes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.graph.interpolation import sample
from tilepipe.graph.rules import AxisRule, Sampling

LENGTHS = st.integers(1, 3000)
TYPES = [torch.float32, torch.float64, torch.bfloat16]


def piece(
    tensor: torch.Tensor, sampling: Sampling, rule: AxisRule, start: int, stop: int
) -> torch.Tensor:
    """Interpolate rows from just those that the rule says they read."""
    low, high = (int(np.clip(n, 0, sampling.size_in - 1)) for n in (
        rule.need(start, stop)[0], rule.need(start, stop)[1] - 1
    ))  # fmt: skip
    return sample(tensor[:, :, low : high + 1], sampling, 2, (start, stop), (low, high + 1))


@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@settings(max_examples=150, derandomize=True)
@given(size_in=LENGTHS, size_out=LENGTHS, factor=st.floats(0.3, 9), data=st.data())
def test_nearest_rows_are_those_of_the_library(
    mode: str, size_in: int, size_out: int, factor: float, data: st.DataObject
) -> None:
    scale = factor if data.draw(st.booleans()) and int(size_in * factor) else None
    given_size = {"size": size_out} if scale is None else {"scale_factor": scale}
    image = torch.arange(size_in, dtype=torch.float32)[None, None]
    truth = F.interpolate(image, mode=mode, **given_size)
    sampling = Sampling(mode, size_in, truth.shape[2], scale, align=False)
    rule = sampling.rule()
    assert rule is not None
    edges = data.draw(st.tuples(*[st.integers(0, truth.shape[2] - 1)] * 2))
    for start, stop in ((0, truth.shape[2]), (min(edges), max(edges) + 1)):
        found = piece(image, sampling, rule, start, stop)
        assert torch.equal(found, truth[:, :, start:stop])


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("mode", ["nearest", "nearest-exact"])
@pytest.mark.parametrize("sizes", [(133, 4227), (529, 4227), (41, 41 * 47), (7, 287), (97, 211)])
def test_types_are_rounded_as_the_library_rounds_them(
    dtype: torch.dtype, mode: str, sizes: tuple[int, int]
) -> None:
    rows = torch.arange(sizes[0])
    image = torch.stack([rows % 128, rows // 128]).to(dtype)[None]
    sampling = Sampling(mode, *sizes, None, align=False)
    rule = sampling.rule()
    assert rule is not None
    found = piece(image, sampling, rule, 0, sizes[1])
    assert torch.equal(found, F.interpolate(image, sizes[1], mode=mode))


@pytest.mark.parametrize(("mode", "align"), [("linear", False), ("linear", True),
                                             ("cubic", False), ("cubic", True)])  # fmt: skip
@settings(max_examples=60, derandomize=True)
@given(sizes=st.tuples(LENGTHS, LENGTHS), data=st.data())
def test_weights_are_those_of_the_library(
    mode: str, align: bool, sizes: tuple[int, int], data: st.DataObject
) -> None:
    generator = torch.Generator().manual_seed(sum(sizes))
    image = torch.rand(1, 1, sizes[0], 1, generator=generator, dtype=torch.float64)
    name = {"linear": "bilinear", "cubic": "bicubic"}[mode]
    sampling = Sampling(mode, *sizes, None, align)
    rule = sampling.rule()
    assert rule is not None
    edges = data.draw(st.tuples(*[st.integers(0, sizes[1] - 1)] * 2))
    start, stop = min(edges), max(edges) + 1
    for dtype, most in ((torch.float64, 1e-11), (torch.float32, 5e-4)):
        whole = F.interpolate(image.to(dtype), (sizes[1], 1), mode=name, align_corners=align)
        found = piece(image.to(dtype), sampling, rule, start, stop)
        assert (found - whole[:, :, start:stop]).abs().max() <= most


def test_rows_that_are_not_held_are_refused() -> None:
    sampling = Sampling("linear", 10, 25, None, align=False)
    with pytest.raises(RuntimeError, match=r"rows 4:5 are read; 0:4 are held"):
        sample(torch.rand(1, 1, 4, 1), sampling, 2, (9, 11), (0, 4))
