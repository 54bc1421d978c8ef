"""Grey values: from the source's to the network's, the same for the whole volume.

All four ways are one map for each channel: ``(value - center) * scale``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import TileGrid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tilepipe.volume import Volume

BINS = 65536
"""Of the histogram from which percentiles are read; exact for integers of up to 16 bits."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """The map of grey values, ready to be applied; one entry per channel."""

    center: tuple[float, ...]
    scale: tuple[float, ...]

    def apply(self, image: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return ``(image - center) * scale`` for an image of shape (channels, ...)."""
        across = (-1,) + (1,) * (image.ndim - 1)
        # Wide types lose digits if they are cut to float32 before the centre is taken off.
        narrow = image.dtype.itemsize <= 2 or image.dtype == np.float32
        kind = np.dtype(np.float32 if narrow else np.float64)
        wide: NDArray[np.floating] = image.astype(kind)
        if any(self.center):
            np.subtract(wide, np.asarray(self.center, kind).reshape(across), out=wide)
        if any(s != 1 for s in self.scale):
            np.multiply(wide, np.asarray(self.scale, kind).reshape(across), out=wide)
        return wide.astype(np.float32, copy=False)


@dataclass(frozen=True, slots=True)
class Rule:
    """A way of normalising as it is spelled."""

    kind: str
    """``none``, ``scale``, ``percentile`` or ``zscore``."""
    first: float = 0.0
    second: float = 0.0

    @property
    def needs_pass(self) -> bool:
        """Whether the whole volume must be read once before."""
        return self.kind in ("percentile", "zscore")


def parse(text: str) -> Rule:
    """Return the rule that a text spells.

    >>> parse("percentile:1,99.8")
    Rule(kind='percentile', first=1.0, second=99.8)
    """
    kind, colon, rest = text.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if colon else []
    except ValueError:
        numbers = [math.nan]
    wanted = {"none": 0, "zscore": 0, "scale": 2, "percentile": 2}
    if kind not in wanted or len(numbers) != wanted[kind] or not all(map(math.isfinite, numbers)):
        raise BadRequest(f"normalize (={text}) must be none, zscore, scale:A,B or percentile:LO,HI")
    if kind == "scale" and numbers[0] == 0:
        raise BadRequest(f"normalize (={text}) must not scale by 0: every voxel would be equal")
    if kind == "percentile" and not 0 <= numbers[0] < numbers[1] <= 100:
        raise BadRequest(f"normalize (={text}) must hold 0 <= LO < HI <= 100")
    return Rule(kind, *numbers)


def resolve(
    rule: Rule, volume: Volume, progress: Callable[[int, int], None] | None = None
) -> Normalization:
    """Return the normalization of a volume, reading it once or twice where the rule needs it.

    ``progress`` is called with the blocks done and their number. Voxels that are not finite do
    not count. Bounded memory: one storage chunk, or about 16 MB, at a time.
    """
    channels = volume.channels
    if rule.kind == "none":
        return Normalization((0.0,) * channels, (1.0,) * channels)
    if rule.kind == "scale":
        return Normalization((-rule.second / rule.first,) * channels, (rule.first,) * channels)
    if rule.kind == "zscore":
        mean, deviation = _moments(volume, progress)
        return _checked(rule, mean, deviation)
    low, high = _percentiles(volume, (rule.first, rule.second), progress)
    return _checked(rule, low, [b - a for a, b in zip(low, high, strict=True)])


def _checked(rule: Rule, center: list[float], spread: list[float]) -> Normalization:
    flat = [channel for channel, width in enumerate(spread) if not width > 0]
    if flat:
        raise BadRequest(
            f"normalize (={rule.kind}) needs a volume whose grey values vary; channel {flat[0]}"
            " is constant: use none or scale:A,B"
        )
    return Normalization(tuple(center), tuple(1 / width for width in spread))


def _blocks(
    volume: Volume, progress: Callable[[int, int], None] | None
) -> Iterator[list[NDArray[np.generic]]]:
    """Yield the finite voxels of each channel, block by block."""
    voxels = max(1, (16 << 20) // (volume.dtype.itemsize * volume.channels))
    block = list(volume.chunks)
    for axis in reversed(range(len(block))):
        room = max(1, voxels // math.prod(block))
        block[axis] = min(volume.shape[axis], block[axis] * room)
    grid = TileGrid(volume.shape, tuple(block))
    for done, tile in enumerate(grid, start=1):
        image = volume.read(tile.write).reshape(volume.channels, -1)
        if image.dtype.kind == "f":
            yield [channel[np.isfinite(channel)] for channel in image]
        else:
            yield list(image)
        if progress is not None:
            progress(done, len(grid))


def _moments(
    volume: Volume, progress: Callable[[int, int], None] | None
) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each channel (Chan's pairwise update)."""
    count = np.zeros(volume.channels)
    mean, square = np.zeros(volume.channels), np.zeros(volume.channels)
    for block in _blocks(volume, progress):
        for channel, values in enumerate(block):
            if not values.size:
                continue
            n, m = values.size, float(values.mean(dtype=np.float64))
            s = float(values.var(dtype=np.float64)) * n
            total = count[channel] + n
            delta = m - mean[channel]
            square[channel] += s + delta**2 * count[channel] * n / total
            mean[channel] += delta * n / total
            count[channel] = total
    return mean.tolist(), np.sqrt(square / np.maximum(count, 1)).tolist()


def _percentiles(
    volume: Volume, wanted: tuple[float, float], progress: Callable[[int, int], None] | None
) -> tuple[list[float], list[float]]:
    """Return two percentiles of each channel from a histogram of `BINS` bins."""
    kind = volume.dtype
    if kind.kind in "iu" and kind.itemsize <= 2:
        bins = 2 ** (8 * kind.itemsize)
        first = -bins / 2 if kind.kind == "i" else 0.0
        edges = [(first, first + bins)] * volume.channels
    else:
        low, high = np.full(volume.channels, np.inf), np.full(volume.channels, -np.inf)
        for block in _blocks(volume, progress):
            for channel, values in enumerate(block):
                if values.size:
                    low[channel] = min(low[channel], float(values.min()))
                    high[channel] = max(high[channel], float(values.max()))
        edges = [(a, b) if b > a else (a, a + 1) for a, b in zip(low, high, strict=True)]
        edges = [(a, b) if math.isfinite(a) else (0.0, 1.0) for a, b in edges]
        bins = BINS
    counts = np.zeros((volume.channels, bins), dtype=np.int64)
    for block in _blocks(volume, progress):
        for channel, values in enumerate(block):
            counts[channel] += np.histogram(values, bins=bins, range=edges[channel])[0]
    found = [
        [_quantile(counts[channel], edges[channel], percent / 100) for percent in wanted]
        for channel in range(volume.channels)
    ]
    if kind.kind in "iu" and kind.itemsize <= 2:
        found = [[math.floor(value) for value in pair] for pair in found]
    return [pair[0] for pair in found], [pair[1] for pair in found]


def _quantile(counts: NDArray[np.int64], edges: tuple[float, float], fraction: float) -> float:
    """Return where a fraction of the counted values lies below, linear within a bin."""
    total = np.cumsum(counts)
    rank = fraction * max(int(total[-1]) - 1, 0)
    place = int(np.searchsorted(total, rank, side="right"))
    place = min(place, len(counts) - 1)
    before = int(total[place - 1]) if place else 0
    within = (rank - before) / max(int(counts[place]), 1)
    return edges[0] + (place + within) * (edges[1] - edges[0]) / len(counts)
