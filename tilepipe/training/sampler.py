"""Where which classes lie: counted once, block by block, so that patches can be drawn by class.

A block is a few whole chunks; the labels of one block are in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks, Region, Shape
from tilepipe.training.targets import IGNORE, MARGIN, class_map
from tilepipe.volumes.borders import read_mirrored

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from tilepipe.training.dataset import TrainingVolume
    from tilepipe.volumes.borders import Readable

STAY = 16
"""Patches that are drawn from a block while the cache holds it, where it cannot hold all."""
TRIES = 8
"""Single voxels of a block that are read and compared before the whole block is read."""
SMALL = 2**15
"""Blocks of at most so many voxels are read whole at once."""


@dataclass(frozen=True, slots=True)
class ClassReader:
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
    """How many voxels of each class every block of the training regions holds.

    ``cached`` is the number of blocks whose chunks fit into the cache.
    """

    def __init__(
        self,
        volumes: Sequence[TrainingVolume],
        reader: ClassReader,
        *,
        balance: bool,
        cached: int,
        seed: int,
    ) -> None:
        self._volumes, self._reader, self._cached, self._seed = volumes, reader, cached, seed
        self._balance = balance
        self._parts = [
            (index, region, Blocks.of(volume.labels.shape, volume.image.volume.chunks, region))
            for index, volume in enumerate(volumes)
            for region in volume.regions
        ]
        self._ends = np.cumsum([len(blocks) for _, _, blocks in self._parts])
        self.table = np.zeros((int(self._ends[-1]), 0), np.int64)
        """Voxels of each class, block by block."""

    def count(
        self, *, classes: int | None, progress: Callable[[int, int], None] | None = None
    ) -> None:
        """Read all labels once. None counts as many classes as there are, two at least.

        Raises `BadRequest` where nothing is labelled, or a label is no class.
        """
        rows = len(self.table)
        table = np.zeros((rows, classes or 2), np.int64)
        for row in range(rows):
            index, _, block = self._place(row)
            voxels = np.bincount(self._read(index, block).ravel(), minlength=256)[:IGNORE]
            highest = int(np.flatnonzero(voxels).max(initial=0))
            if highest >= table.shape[1]:
                if classes is not None:
                    raise BadRequest(
                        f"labels hold the class {highest} in {block}, but classes (={classes}) end"
                        f" before it; give --classes {highest + 1}, --ignore {highest}, or another"
                        " target"
                    )
                table = np.pad(table, ((0, 0), (0, highest + 1 - table.shape[1])))
            table[row] = voxels[: table.shape[1]]
            if progress is not None:
                progress(row + 1, rows)
        self.take(table)

    def take(self, table: NDArray[np.int64]) -> None:
        """Take a table that was counted before, of the same labels and regions."""
        if len(table) != len(self.table):
            raise BadRequest("the counts of an earlier run are of other volumes; begin anew")
        totals = table.sum(axis=0)
        if not totals.any():
            raise BadRequest("labels: no voxel of the training regions is labelled; name others")
        self.table = table
        self.counts: list[int] = totals.tolist()
        """Voxels of each class in the training regions."""
        present = totals > 0
        shares = present / present.sum() if self._balance else totals / totals.sum()
        self._worth = shares / np.maximum(totals, 1)
        """Of one voxel of a class: its share of all patches."""
        self._of_block = np.cumsum(table @ self._worth)

    def draw(self, number: int, rng: np.random.Generator) -> tuple[int, Region, Shape]:
        """Return the pair, the region and the voxel round which sample ``number`` lies.

        Law: over many samples each labelled voxel of a class is as likely as any other; with
        balance each class is as likely as any other. Where not all blocks fit the cache, some are
        open at a time, each for `STAY` samples.
        """
        if len(self.table) <= self._cached:
            row = self._block(rng)
        else:
            slot = int(rng.integers(self._cached))
            turn = (number + slot * STAY) // (self._cached * STAY)
            row = self._block(np.random.default_rng((self._seed, 1, slot, turn)))
        index, region, _ = self._place(row)
        chances = self.table[row] * self._worth
        drawn = int(rng.choice(len(chances), p=chances / chances.sum()))
        return index, region, self._voxel(row, drawn, rng)

    def _place(self, row: int) -> tuple[int, Region, Region]:
        """Return the pair, the region and the block of a row."""
        part = int(np.searchsorted(self._ends, row, side="right"))
        index, region, blocks = self._parts[part]
        return index, region, blocks[row - int(self._ends[part]) + len(blocks)]

    def _voxel(self, row: int, drawn: int, rng: np.random.Generator) -> Shape:
        """Return a voxel of a class, each of the block's as likely as any other.

        Where the block is large and the class not rare in it, a few voxels are tried before the
        whole block is read.
        """
        index, _, block = self._place(row)
        count = self.table[row, drawn]
        tries = TRIES if block.size > SMALL and count * TRIES > block.size else 0
        for _ in range(tries):
            voxel = tuple(int(n) for n in rng.integers(block.start, block.stop))
            if count == block.size or self._read(index, _only(voxel)).item() == drawn:
                return voxel
        places = np.flatnonzero(self._read(index, block) == drawn)
        place = np.unravel_index(places[rng.integers(len(places))], block.shape)
        return tuple(a + int(n) for a, n in zip(block.start, place, strict=True))

    def _read(self, index: int, block: Region) -> NDArray[np.uint8]:
        volume = self._volumes[index]
        return self._reader.read(volume.labels, volume.mask, block)

    def _block(self, rng: np.random.Generator) -> int:
        at = np.searchsorted(self._of_block, rng.random() * self._of_block[-1], side="right")
        return min(int(at), len(self.table) - 1)


def _only(voxel: Shape) -> Region:
    return Region(voxel, tuple(n + 1 for n in voxel))


def _check_classes(labels: NDArray[np.generic], ignore: int | None, region: Region) -> None:
    if labels.dtype.kind == "f":
        raise BadRequest(f"labels of type {labels.dtype} must be integers; convert them to uint8")
    classes = labels if ignore is None else labels[labels != ignore]
    if classes.size and not 0 <= int(classes.min()) <= int(classes.max()) < IGNORE:
        wrong = int(classes.min()) if int(classes.min()) < 0 else int(classes.max())
        raise BadRequest(
            f"labels hold {wrong} in {region}, which is no class in 0:{IGNORE}; give"
            f" --ignore {wrong}, or --target mask or foreground"
        )
