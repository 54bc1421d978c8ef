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
from tilepipe.volumes.quantiles import order_statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from tilepipe.volumes.volume import Volume

PIECE = 2**20
"""Values whose moments are taken at once."""
ROUGH = 256
"""Grey values this many spreads from 0 lose digits that count when they are cut to float32."""


@dataclass(frozen=True, slots=True)
class Normalization:
    """The map of grey values, ready to be applied; one entry per channel."""

    center: tuple[float, ...]
    scale: tuple[float, ...]
    base: tuple[int, ...] = ()
    """Whole numbers taken off first of integers of 64 bits, of which a float holds 53; of other
    types none."""

    def apply(self, image: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return ``(image - base - center) * scale`` for an image of shape (channels, ...)."""
        across = (-1,) + (1,) * (image.ndim - 1)
        # Wide types lose digits if they are cut to float32 before the centre is taken off.
        narrow = image.dtype.itemsize <= 2 or image.dtype == np.float32
        narrow = narrow and all(
            abs(c * s) <= ROUGH and 1e-30 < abs(s) < 1e30
            for c, s in zip(self.center, self.scale, strict=True)
        )
        kind = np.dtype(np.float32 if narrow else np.float64)
        wide: NDArray[np.floating]
        if self.base:
            wide = np.stack([_above(*pair) for pair in zip(image, self.base, strict=True)])
        else:
            wide = image.astype(kind)
        with np.errstate(over="ignore"):
            if any(self.center):
                np.subtract(wide, np.asarray(self.center, kind).reshape(across), out=wide)
            if any(s != 1 for s in self.scale):
                np.multiply(wide, np.asarray(self.scale, kind).reshape(across), out=wide)
            grey = wide.astype(np.float32, copy=False)
        large = np.isinf(grey)
        if large.any() and image.dtype.kind == "f":
            large &= np.isfinite(image)  # what is infinite in the source stays so
        if large.any():
            grey[large] = np.copysign(np.finfo(np.float32).max, grey[large])
        return grey


def restore(plain: Mapping[str, Sequence[float]]) -> Normalization:
    """Return a normalization that was kept as JSON of its fields."""
    base = tuple(int(n) for n in plain.get("base", ()))
    return Normalization(tuple(plain["center"]), tuple(plain["scale"]), base)


def _above(values: NDArray[np.generic], base: int) -> NDArray[np.float64]:
    """Return integers less a whole number, of which no digit is lost that a float can hold."""
    whole: NDArray[np.integer] = values.astype(values.dtype, copy=False)
    number = whole.dtype.type(base)
    unsigned = f"u{whole.dtype.itemsize}"
    below = whole < number
    # Differences wrap round at the type's end; taken without a sign they are right again.
    differences = np.where(below, (number - whole).view(unsigned), (whole - number).view(unsigned))
    offsets: NDArray[np.float64] = differences.astype(np.float64)
    np.negative(offsets, out=offsets, where=below)
    return offsets


@dataclass(frozen=True, slots=True)
class NormalizationRule:
    """A way of normalising as it is spelled."""

    kind: str
    """``none``, ``scale``, ``percentile`` or ``zscore``."""
    first: float = 0.0
    second: float = 0.0

    @property
    def needs_pass(self) -> bool:
        """Return whether the whole volume must be read once before."""
        return self.kind in ("percentile", "zscore")


def parse(text: str) -> NormalizationRule:
    """Return the rule that a text spells.

    >>> parse("percentile:1,99.8")
    NormalizationRule(kind='percentile', first=1.0, second=99.8)
    """
    kind, colon, rest = text.partition(":")
    try:
        numbers = [float(part) for part in rest.split(",")] if colon else []
    except ValueError:
        numbers = [math.nan]
    counts = {"none": 0, "zscore": 0, "scale": 2, "percentile": 2}
    if kind not in counts or len(numbers) != counts[kind] or not all(map(math.isfinite, numbers)):
        raise BadRequest(f"normalize (={text}) must be none, zscore, scale:A,B or percentile:LO,HI")
    if kind == "scale" and numbers[0] == 0:
        raise BadRequest(f"normalize (={text}) must not scale by 0: every voxel would be equal")
    if kind == "percentile" and not 0 <= numbers[0] < numbers[1] <= 100:
        raise BadRequest(f"normalize (={text}) must hold 0 <= LO < HI <= 100")
    return NormalizationRule(kind, *numbers)


def resolve(
    rule: NormalizationRule, volume: Volume, progress: Callable[[int, int], None] | None = None
) -> Normalization:
    """Return the normalization of a volume, reading it as often as the rule needs it.

    zscore takes one pass; percentiles one for values that span up to 16 bits, at most two for
    types of 32, and for those of 64 mostly two, at most four (see the module `quantiles`).
    Law: equals ``numpy.percentile``, or ``numpy.mean`` and ``numpy.std``, of the whole in float64,
    and of integers of 64 bits what these would be without rounding. ``progress`` is called with the
    blocks done and their number, in each pass. Voxels that are not finite do not count. Bounded
    memory: one storage chunk, or about 16 MB, at a time. Raises BadRequest where grey values do
    not vary as the rule needs.
    """
    channels = volume.channels
    if rule.kind == "none":
        return Normalization((0.0,) * channels, (1.0,) * channels)
    if rule.kind == "scale":
        return Normalization((-rule.second / rule.first,) * channels, (rule.first,) * channels)
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        statistics = (_moments if rule.kind == "zscore" else _percentiles)(rule, volume, progress)
    base = tuple(int(channel.base) for channel in statistics) if _is_wide(volume.dtype) else ()
    center = [channel.center if base else channel.base + channel.center for channel in statistics]
    return Normalization(tuple(map(float, center)), tuple(1 / k.spread for k in statistics), base)


@dataclass(frozen=True, slots=True)
class _Statistics:
    """Statistics of one channel."""

    base: float
    """A value from which the centre is taken, so that no digit is lost; whole of integers."""
    center: float
    spread: float


def _is_wide(dtype: np.dtype[np.generic]) -> bool:
    return dtype.kind in "iu" and dtype.itemsize == 8


def _checked(statistics: _Statistics, about: str) -> _Statistics:
    """Refuse a spread that cannot be divided by; ``about`` begins the message."""
    if not math.isfinite(statistics.spread):
        why = "lie too far apart for a float of 64 bits"
    elif statistics.spread == 0 or not math.isfinite(1 / statistics.spread):
        why = "lie too close together for a float of 64 bits"
    else:
        return statistics
    raise BadRequest(f"{about} has grey values that {why}: use none or scale:A,B")


def _about(rule: NormalizationRule, channel: int) -> str:
    numbers = f":{rule.first:g},{rule.second:g}" if rule.kind == "percentile" else ""
    rule_text = f"normalize (={rule.kind}{numbers})"
    return f"{rule_text} needs a volume whose grey values vary; channel {channel}"


def _uniform(rule: NormalizationRule, channel: int, count: int, value: float) -> BadRequest:
    """Return the refusal of a channel that has one value, or none."""
    if not count:
        return BadRequest(
            f"{_about(rule, channel)} holds no finite value: mend the source, or choose other"
            " channels"
        )
    return BadRequest(f"{_about(rule, channel)} is constant, {value}: use none or scale:A,B")


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
            finite = np.isfinite(image)  # a copy is dear, and mostly not needed
            yield [
                values if among.all() else values.compress(among)
                for values, among in zip(image, finite, strict=True)
            ]
        else:
            yield list(image)
        if progress is not None:
            progress(done, len(grid))


def _moments(
    rule: NormalizationRule, volume: Volume, progress: Callable[[int, int], None] | None
) -> list[_Statistics]:
    """Return mean and standard deviation of each channel (Chan's pairwise update).

    Both are taken of the differences to the channel's first value: those of a constant are 0.
    """
    count = [0] * volume.channels
    first: list[float] = [0.0] * volume.channels
    mean, square, varies = (np.zeros(volume.channels) for _ in range(3))
    for block in _blocks(volume, progress):
        for channel, values in enumerate(block):
            if values.size and not count[channel]:
                first[channel] = values[0].item()
            for start in range(0, values.size, PIECE):
                piece = _offsets(values[start : start + PIECE], first[channel])
                n, m = piece.size, float(piece.mean())
                total = count[channel] + n
                delta = m - mean[channel]
                square[channel] += float(piece.var()) * n + delta**2 * count[channel] * n / total
                mean[channel] += delta * n / total
                count[channel] = total
                varies[channel] += piece.any()
    statistics = []
    for channel in range(volume.channels):
        if not varies[channel]:
            raise _uniform(rule, channel, count[channel], first[channel])
        spread = math.sqrt(square[channel] / count[channel])
        moments = _Statistics(first[channel], float(mean[channel]), spread)
        statistics.append(_checked(moments, _about(rule, channel)))
    return statistics


def _offsets(values: NDArray[np.generic], first: float) -> NDArray[np.float64]:
    """Return values less the first of them."""
    if _is_wide(values.dtype):
        return _above(values, int(first))
    offsets: NDArray[np.float64] = values.astype(np.float64)
    offsets -= first
    return offsets


def _percentiles(
    rule: NormalizationRule, volume: Volume, progress: Callable[[int, int], None] | None
) -> list[_Statistics]:
    """Return the lower percentile of each channel, and how far the upper one lies from it."""
    orders = order_statistics(
        lambda: _blocks(volume, progress),
        volume.dtype,
        volume.channels,
        (rule.first / 100, rule.second / 100),
    )
    statistics = []
    for channel, order in enumerate(orders):
        if not order.count or order.least == order.greatest:
            raise _uniform(rule, channel, order.count, order.least)
        (base, *_), (upper, *_) = order.neighbours
        low, high = (_between(*neighbours) for neighbours in order.neighbours)
        percentiles = _Statistics(base, low, (upper - base) + (high - low))
        if base == upper and percentiles.spread == 0:
            raise BadRequest(
                f"normalize (=percentile:{rule.first:g},{rule.second:g}) needs percentiles that"
                f" differ; those of channel {channel} are both {base + low:g}, although its values"
                f" go from {order.least:g} to {order.greatest:g}: take percentiles further apart,"
                " or zscore, or scale:A,B"
            )
        statistics.append(_checked(percentiles, _about(rule, channel)))
    return statistics


def _between(first: float, second: float, within: float) -> float:
    """Return how far above the first of two values a place between them lies."""
    return (second - first) * within
