"""Interpolation along one axis, row by row, from the rows and with the weights of the library."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from tilepipe.errors import TileError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.rules import Sampling

_WHOLE = {
    ("linear", 3): "linear",
    ("linear", 4): "bilinear",
    ("linear", 5): "trilinear",
    ("cubic", 4): "bicubic",
}
"""What the library calls a mode, by the dimensions of a tensor, where it depends on them."""


def library_mode(mode: str, ndim: int) -> str:
    """Return what the library calls a mode of sampling, for a tensor of so many dimensions.

    >>> library_mode("linear", 4), library_mode("nearest", 4)
    ('bilinear', 'nearest')
    """
    return _WHOLE.get((mode, ndim), mode)


def sample(tensor: Tensor, sampling: Sampling, d: int, rows: Rows, held: Rows) -> Tensor:
    """Return the output rows ``rows`` of a dimension of which ``tensor`` holds the rows ``held``.

    All are rows of the whole axis. Law: what is returned is a piece of what
    ``torch.nn.functional.interpolate`` gives for all rows.
    """
    if sampling.same:
        return tensor
    if sampling.align and rows == (0, sampling.size_out):
        shape, mode = list(tensor.shape), library_mode(sampling.mode, tensor.ndim)
        shape[d] = sampling.size_out
        return F.interpolate(tensor, shape[2:], mode=mode, align_corners=True)
    double, last = tensor.dtype == torch.float64, sampling.size_in - 1
    if "nearest" in sampling.mode:
        return _rows_of(tensor, d, sampling.nearest(*rows, double=double), held)
    places, lows = sampling.places(*rows, double=double), sampling.lows(*rows)
    before = lows
    if sampling.mode == "linear":  # before the first row, the library takes that
        places, before = places.clip(0, None), lows.clip(0, last)
    share = torch.from_numpy((places - before).astype(places.dtype))
    share = share.to(tensor.device, tensor.dtype).reshape(-1, *(1,) * (tensor.ndim - 1 - d))
    if sampling.mode == "linear":
        low, high = (_rows_of(tensor, d, (lows + n).clip(0, last), held) for n in (0, 1))
        return torch.lerp(low, high, share)
    total = None
    for n, weight in zip((-1, 0, 1, 2), _cubic(share), strict=True):
        part = _rows_of(tensor, d, (lows + n).clip(0, last), held).mul_(weight)
        total = part if total is None else total.add_(part)
    assert total is not None
    return total


def _rows_of(tensor: Tensor, d: int, rows: NDArray[np.int64], held: Rows) -> Tensor:
    if rows.min() < held[0] or rows.max() >= held[1]:
        raise TileError(
            f"rows {rows.min()}:{rows.max() + 1} are read; {held[0]}:{held[1]} are held"
        )
    return tensor.index_select(d, torch.from_numpy(rows - held[0]).to(tensor.device))


def _cubic(share: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the weights of the four rows round places so far behind the second, as the library."""
    a = -0.75

    def near(x: Tensor) -> Tensor:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: Tensor) -> Tensor:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return far(share + 1), near(share), near(1 - share), far(2 - share)
