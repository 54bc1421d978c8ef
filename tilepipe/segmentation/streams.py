"""What goes into a sweep and what comes out of it, in rows: read ahead, written behind."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

import numpy as np

from tilepipe.geometry import Region

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import Executor, Future

    from numpy.typing import NDArray

    class RegionWriter(Protocol):
        """An array into which regions of whole write units are written."""

        def write(self, region: Region, array: NDArray[np.generic]) -> None:
            """Write all channels of a region."""


class RowReader:
    """The rows of one tile, in order; the next block is read by another thread meanwhile."""

    def __init__(
        self,
        box: Region,
        *,
        axis: int,
        parts: list[tuple[int, int]],
        load: Callable[[Region], NDArray[np.float32]],
        pool: Executor,
    ) -> None:
        """``load`` gives a region of the ``box`` with ``axis`` in front; ``parts`` cover it."""
        self._box, self._axis, self._load, self._pool = box, axis, load, pool
        self._parts = iter(parts)
        self._held: list[tuple[int, NDArray[np.float32]]] = []
        self._next: Future[NDArray[np.float32]] | None = None
        self._start = box.start[axis]
        self.waited = 0.0
        """Seconds that the network waited for rows."""
        self._ahead()

    def _ahead(self) -> None:
        part = next(self._parts, None)
        if part is None:
            self._next = None
            return
        start, stop = list(self._box.start), list(self._box.stop)
        start[self._axis], stop[self._axis] = part
        self._start = part[0]
        self._next = self._pool.submit(self._load, Region(tuple(start), tuple(stop)))

    def rows(self, start: int, stop: int) -> NDArray[np.float32]:
        """Return rows along the axis, which is in front; rows before them are let go."""
        while not self._held or self._held[-1][0] + len(self._held[-1][1]) < stop:
            if self._next is None:
                raise IndexError(f"rows {start}:{stop} lie outside the tile")
            began, first = time.perf_counter(), self._start
            self._held.append((first, self._next.result()))
            self.waited += time.perf_counter() - began
            self._ahead()
        self._held = [(a, block) for a, block in self._held if a + len(block) > start]
        parts = [block[max(start - a, 0) : stop - a] for a, block in self._held if a < stop]
        return parts[0] if len(parts) == 1 else np.concatenate(parts)


class RowWriter:
    """The rows of one tile's answer, in order; whole write units are written by another thread."""

    def __init__(
        self, output: RegionWriter, write: Region, *, axis: int, unit: int, pool: Executor
    ) -> None:
        """``write`` is the tile's region, ``unit`` the rows of a write unit along ``axis``."""
        self._output, self._write, self._axis, self._pool = output, write, axis, pool
        self._unit = unit
        self._parts: list[NDArray[np.generic]] = []
        self._done = self._have = write.start[axis]
        self._writing: Future[float] | None = None
        self._seconds = 0.0
        self.waited = 0.0
        """Seconds that the network waited for the rows before to be written."""

    def add(self, rows: NDArray[np.generic]) -> None:
        """Take the next rows, of shape (channels, *axes) or of the axes alone."""
        dim = self._axis + rows.ndim - len(self._write.start)
        self._parts.append(rows)
        self._have += rows.shape[dim]
        last = self._have == self._write.stop[self._axis]
        until = self._have if last else self._have // self._unit * self._unit
        if until <= self._done:
            return
        whole = self._parts[0] if len(self._parts) == 1 else np.concatenate(self._parts, axis=dim)
        ready, left = np.split(whole, [until - self._done], axis=dim)
        self._parts = [left.copy()] if until < self._have else []
        start, stop = list(self._write.start), list(self._write.stop)
        start[self._axis], stop[self._axis] = self._done, until
        self._wait()
        self._writing = self._pool.submit(self._put, Region(tuple(start), tuple(stop)), ready)
        self._done = until

    def _put(self, region: Region, rows: NDArray[np.generic]) -> float:
        began = time.perf_counter()
        self._output.write(region, np.ascontiguousarray(rows))
        return time.perf_counter() - began

    def _wait(self) -> None:
        if self._writing is not None:
            began = time.perf_counter()
            self._seconds += self._writing.result()
            self.waited += time.perf_counter() - began

    def finish(self) -> float:
        """Wait until all is written; return the seconds that writing took."""
        waited = self.waited
        self._wait()
        self._writing, self.waited = None, waited
        return self._seconds
