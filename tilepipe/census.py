"""Where which classes lie: counted once, block by block, so that patches can be drawn by class.

A block is a few whole chunks; the labels of one block are in memory at a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape, TileGrid
from tilepipe.targets import IGNORE, MARGIN, class_map
from tilepipe.volume import read_mirrored

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray

    from tilepipe.volume import Readable

STAY = 16
"""Patches that are drawn from a block while its chunks are kept, where not all can be kept."""
TRIES = 8
"""Voxels of a block that are looked at before all of them are."""
SMALL = 2**15
"""Voxels that are looked at all at once."""


@dataclass(frozen=True, slots=True)
class Labels:
    """What is counted: labels, what is learned from them, and where."""

    volume: Readable
    mask: Readable | None
    """Where it is 0 the labels say nothing."""
    chunks: Shape
    regions: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Kind:
    """How labels become classes."""

    target: str
    ignore: int | None
    in_plane: bool
    axes: int
    """Axes of the network: along those before them planes do not see one another."""

    def read(self, volume: Readable, mask: Readable | None, region: Region) -> NDArray[np.uint8]:
        """Return the classes of a region inside the volume, ``(*region.shape)``."""
        classes = self._classes(volume, region)
        if mask is not None:
            classes[mask.read(region)[0] == 0] = IGNORE
        return classes

    def _classes(self, volume: Readable, region: Region) -> NDArray[np.uint8]:
        if self.target == "values":
            return np.zeros(region.shape, np.uint8)
        leading = len(region.start) - self.axes
        grow = (0,) * leading + (MARGIN,) * self.axes
        labels = read_mirrored(volume, region.grow(grow, grow))[0]
        if self.target == "classes":
            _check_classes(labels, self.ignore, region)
        inner = tuple(slice(m, m + n) for m, n in zip(grow, region.shape, strict=True))[leading:]
        planes = labels.reshape(-1, *labels.shape[leading:])
        classes = [
            class_map(plane, self.target, ignore=self.ignore, in_plane=self.in_plane)[inner]
            for plane in planes
        ]
        return np.stack(classes).reshape(region.shape)


class Census:
    """How many voxels of each class every block of the training regions holds."""

    def __init__(
        self,
        labels: Sequence[Labels],
        kind: Kind,
        *,
        classes: int | None,
        balance: bool,
        kept: int,
        seed: int,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """``kept`` is the number of blocks whose chunks fit into the cache; None counts classes.

        Raises `BadRequest` where nothing is labelled, or a label is no class.
        """
        self.labels, self._kind, self._seed = labels, kind, seed
        self._places = [
            (index, region, block)
            for index, item in enumerate(labels)
            for region in item.regions
            for block in blocks(item.volume.shape, item.chunks, region)
        ]
        self._counts = np.zeros((len(self._places), classes or IGNORE), np.int64)
        for row, (index, _, block) in enumerate(self._places):
            self._counts[row] = self._count(index, block, classes or IGNORE)
            if progress is not None:
                progress(row + 1, len(self._places))
        if classes is None:
            held = np.flatnonzero(self._counts.sum(axis=0))
            self._counts = self._counts[:, : max(2, int(held.max(initial=0)) + 1)]
        self.counts: list[int] = self._counts.sum(axis=0).tolist()
        """Voxels of each class in the training regions."""
        if not sum(self.counts):
            raise BadRequest("labels: no voxel of the training regions is labelled; name others")
        there = self._counts.sum(axis=0) > 0
        wanted = there / there.sum() if balance else self._counts.sum(axis=0) / sum(self.counts)
        share = self._counts / np.maximum(self._counts.sum(axis=0), 1) * wanted
        self._shares = share  # of a patch's chance: block by class
        self._of_block = np.cumsum(share.sum(axis=1))
        self._kept = kept

    def draw(self, number: int, rng: np.random.Generator) -> tuple[int, Region, Shape]:
        """Return the pair, the region and the voxel round which sample ``number`` lies.

        Law: over many samples each labelled voxel of a class is as likely as any other; with
        balance each class is as likely as any other. Where not all blocks fit the cache, some are
        open at a time, each for `STAY` samples.
        """
        if len(self._places) <= self._kept:
            row = self._block(rng)
        else:
            slot = int(rng.integers(self._kept))
            turn = (number + slot * STAY) // (self._kept * STAY)
            row = self._block(np.random.default_rng((self._seed, 1, slot, turn)))
        index, region, _ = self._places[row]
        chances = self._shares[row] / self._shares[row].sum()
        wanted = int(rng.choice(len(chances), p=chances))
        return index, region, self._voxel(row, wanted, rng)

    def _voxel(self, row: int, wanted: int, rng: np.random.Generator) -> Shape:
        """Return a voxel of a class, each of the block's as likely as any other.

        Where the block is large and the class not rare in it, a few voxels are tried before the
        whole block is read.
        """
        index, _, block = self._places[row]
        count = self._counts[row, wanted]
        tries = TRIES if block.size > SMALL and count * TRIES > block.size else 0
        for _ in range(tries):
            voxel = tuple(int(n) for n in rng.integers(block.start, block.stop))
            if count == block.size or self._read(index, _only(voxel)).item() == wanted:
                return voxel
        found = np.flatnonzero(self._read(index, block) == wanted)
        place = np.unravel_index(found[rng.integers(len(found))], block.shape)
        return tuple(a + int(n) for a, n in zip(block.start, place, strict=True))

    def _read(self, index: int, block: Region) -> NDArray[np.uint8]:
        return self._kind.read(self.labels[index].volume, self.labels[index].mask, block)

    def _block(self, rng: np.random.Generator) -> int:
        at = np.searchsorted(self._of_block, rng.random() * self._of_block[-1], side="right")
        return min(int(at), len(self._places) - 1)

    def _count(self, index: int, block: Region, classes: int) -> NDArray[np.int64]:
        found = np.bincount(self._read(index, block).ravel(), minlength=256)
        if found[classes:IGNORE].any():
            wrong = classes + int(np.flatnonzero(found[classes:IGNORE])[0])
            raise BadRequest(
                f"labels hold the class {wrong} in {block}, but classes (={classes}) end before it;"
                f" give --classes {wrong + 1}, --ignore {wrong}, or another target"
            )
        return found[:classes]


def _only(voxel: Shape) -> Region:
    return Region(voxel, tuple(n + 1 for n in voxel))


def _check_classes(labels: NDArray[np.generic], ignore: int | None, region: Region) -> None:
    if labels.dtype.kind == "f":
        raise BadRequest(f"labels of type {labels.dtype} must be integers; convert them to uint8")
    said = labels if ignore is None else labels[labels != ignore]
    if said.size and not 0 <= int(said.min()) <= int(said.max()) < IGNORE:
        wrong = int(said.min()) if int(said.min()) < 0 else int(said.max())
        raise BadRequest(
            f"labels hold {wrong} in {region}, which is no class in 0:{IGNORE}; give"
            f" --ignore {wrong}, or --target mask or foreground"
        )


def blocks(shape: Shape, chunks: Shape, region: Region) -> Iterator[Region]:
    """Yield the parts of a region that lie in one block of chunks each, of about a million voxels.

    >>> [str(b) for b in blocks((4000, 700), (512, 700), Region((100, 0), (2000, 700)))]
    ['100:1024,0:700', '1024:2000,0:700']
    """
    size = list(chunks)
    while math.prod(size) < 2**19:
        grow = [axis for axis, n in enumerate(shape) if size[axis] < n]
        if not grow:
            break
        axis = min(grow, key=lambda a: size[a])
        size[axis] *= 2
    low = tuple(a // n for a, n in zip(region.start, size, strict=True))
    stop = tuple(-(-b // n) for b, n in zip(region.stop, size, strict=True))
    counts = tuple(b - a for a, b in zip(low, stop, strict=True))
    for tile in TileGrid(counts, (1,) * len(counts)):
        place = tuple(a + n for a, n in zip(tile.write.start, low, strict=True))
        start = tuple(p * n for p, n in zip(place, size, strict=True))
        block = Region(start, tuple(a + n for a, n in zip(start, size, strict=True)))
        yield block.intersect(region)
