"""Random numbers and smooth fields as functions of a seed and of coordinates alone."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.geometry import Region

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Return the splitmix64 finaliser of each number."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


def random_bits(seed: int, layer: int, *axes: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return 64 random bits for each point; ``axes`` are its coordinates, of one shape."""
    key = np.array([seed % 2**64, layer], np.uint64) + np.uint64(1)
    first, second = _mix(_mix(key) + key)  # mixed, or a seed would be another one's shift
    bits = np.full(axes[0].shape, first ^ (second >> np.uint64(1)), np.uint64)
    for axis in axes:
        bits = _mix(bits + axis.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    return bits


def uniform(seed: int, layer: int, cells: NDArray[np.int64], *, draws: int) -> NDArray[np.float64]:
    """Return ``draws`` numbers in ``0:1`` for each row of ``cells``."""
    bits = random_bits(seed, layer, *cells.T)[:, None]
    step = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(0xD1342543DE82EF95)
    return (_mix(bits + step) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _smooth(points: NDArray[np.int64], size: int) -> tuple[NDArray[np.int64], Doubles]:
    """Return the lattice point before each of ``points`` and the weight of the one after it."""
    before = points // size
    t = (points - before * size) / size
    return before, t * t * (3 - 2 * t)


def field(region: Region, size: int, seed: int, *, layer: int) -> Floats:
    """Return a smooth random field in ``0:1``: hashed lattice points ``size`` apart, interpolated.

    In 3D it does not change along z, as light does not.
    """
    (y0, x0), (y1, x1) = region.start[-2:], region.stop[-2:]
    y, y_weight = _smooth(np.arange(y0, y1), size)
    x, x_weight = _smooth(np.arange(x0, x1), size)
    grid = np.meshgrid(np.arange(y[0], y[-1] + 2), np.arange(x[0], x[-1] + 2), indexing="ij")
    points = (random_bits(seed, layer, *grid) >> np.uint64(40)).astype(np.float32)
    points *= np.float32(2.0**-24)
    for weight, place in ((y_weight, y - y[0]), (x_weight, x - x[0])):
        after = weight.astype(np.float32)[:, None]
        points = (points[place] + (points[place + 1] - points[place]) * after).T
    return points


def field_at(points: NDArray[np.int64], size: int, seed: int, *, layer: int) -> Doubles:
    """Return a smooth random field in ``0:1`` at each row of ``points``, in all axes."""
    before, weight = _smooth(points, size)
    total = np.zeros(len(points))
    for corner in product((0, 1), repeat=points.shape[1]):
        value = (random_bits(seed, layer, *(before + corner).T) >> np.uint64(11)).astype(np.float64)
        for axis, after in enumerate(corner):
            value *= weight[:, axis] if after else 1 - weight[:, axis]
        total += value * 2.0**-53
    return total
