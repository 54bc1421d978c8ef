"""Which tiles are finished, kept beside the output with the plan that they belong to.

Law: a tile in the ledger has been written wholly. Killing a run at any moment loses no more than
the tiles in flight. Several tasks may write at once, from several machines: each appends to files
of its own, and who reads merges them. There are no locks (see `tilepipe.runs.lease`).

Files, in ``OUTPUT/.tilepipe`` (`tilepipe.storage.names.LedgerFiles`): ``plan.json`` (whole or
absent); of each writer ``done`` (appended, one line of fixed width for each tile), ``log`` (see
`tilepipe.runs.log`), ``failed.json`` where tiles failed, ``lock`` while it runs. In an object
store, where nothing can be appended to, ``done`` and ``log`` are rows of objects (see
`tilepipe.storage.appending`), and a kill may also cost the tiles of the last `FLUSH` seconds.
"""

from __future__ import annotations

import json
import logging
import os
import time
from contextlib import ExitStack, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.engines import TileFailure
from tilepipe.errors import BadRequest
from tilepipe.runs.array import ArrayTask
from tilepipe.runs.fence import Fence, NotOwner, Right
from tilepipe.runs.lease import Lease, Owner, is_held, living, take_dead
from tilepipe.runs.log import LogWriter, read_logs
from tilepipe.storage.appending import append
from tilepipe.storage.location import replace, sync_file
from tilepipe.storage.names import writer_of_lock, writer_of_task

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from tilepipe.engines import TileResult
    from tilepipe.storage.appending import Appending
    from tilepipe.storage.location import Place
    from tilepipe.volumes.output import Output

log = logging.getLogger(__name__)

DIGITS = 12
"""Of a tile's index in ``done``; with the line's end the width of a record is one more."""
BATCH = 1 << 16
"""Records of ``done`` that are read at once."""
LOOK = 0.2
"""Seconds between two looks at whether another task has created the output."""


class Ledger:
    """The finished tiles of one output; with a lease on it, no other process can enter any."""

    def __init__(
        self, output: Output, plan: dict[str, object], *, tiles: int, lease: Lease | None
    ) -> None:
        self._output, self._lease = output, lease
        self._files = output.ledger
        self._fence = None if lease is None else Fence(_right(output, lease))
        self.plan = plan
        self.tiles = tiles
        self._writer = "" if lease is None else writer_of_lock(lease.name)
        self._file: Appending | None = None
        self._log: LogWriter | None = None
        self._finished = np.zeros(tiles, dtype=np.bool_)
        self.done = 0
        """Tiles known to be finished, by whomever; `refresh` looks again."""
        try:
            if lease is not None:
                path = self._files.done(self._writer)
                if isinstance(path, Path):
                    _mend(path)
                self._file = append(path, self._check_fence)
                self._log = LogWriter(self._files.log(self._writer), self._check_fence)
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def open(
        cls, output: Output, *, write: bool = True, task: ArrayTask | None = None
    ) -> Ledger | None:
        """Open the ledger of an output; None where there is none.

        Of an array's tasks each opens it for its ``task``, and all may write at once. Raises
        `BadRequest` where it cannot be read, or where another process writes it.
        """
        try:
            plan = json.loads(output.ledger.plan.read_text())
            tiles = plan["tiles"]
            if type(tiles) is not int or not 0 <= tiles < 10**DIGITS:
                raise ValueError(f"its number of tiles is {tiles}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRequest(
                f"output (={output}) has a ledger that cannot be read ({error}); replace the"
                " output with --overwrite"
            ) from error
        lease = take_lease(output, task=task) if write else None
        return cls(output, plan, tiles=tiles, lease=lease)

    def refresh(self) -> None:
        """Read again what all writers have finished."""
        for path in self._files.every_done():
            _read_done(path, self._finished)
        self.done = int(np.count_nonzero(self._finished))

    def __contains__(self, index: int) -> bool:
        return bool(self._finished[index])

    def remaining(self, among: range | None = None) -> Iterator[int]:
        """Yield the tiles, ``among`` these, that were not finished when each is reached."""
        tiles = range(self.tiles) if among is None else among
        return (index for index in tiles if not self._finished[index])

    def finished(self, among: range) -> int:
        """Return how many of these tiles are finished."""
        return int(np.count_nonzero(self._finished[among.start : among.stop]))

    def mark(self, index: int, result: TileResult | None = None) -> None:
        """Enter a tile that has been written wholly, and how, if that is known, in the log."""
        assert self._file is not None
        assert self._lease is not None
        assert self._log is not None
        if not 0 <= index < self.tiles:  # its record would hide all that come after
            raise IndexError(f"tile {index} is not one of {self.tiles}")
        self.check()
        if result is not None:
            self._log.add(result)
        self._file.write(b"%0*d\n" % (DIGITS, index))
        if not self._finished[index]:
            self._finished[index] = True
            self.done += 1

    @property
    def fence(self) -> Fence:
        """Return what lets this process write as long as the lease is held; see `right`."""
        assert self._fence is not None
        return self._fence

    @property
    def right(self) -> Right:
        """Return what workers need to write for this run; the ledger must be open for writing."""
        assert self._lease is not None
        return _right(self._output, self._lease)

    def check(self) -> None:
        """Raise `TileError` where nothing more can be entered: see `Lease.check`."""
        if self._lease is not None and self._fence is not None:
            self._lease.check()
            with suppress(OSError):  # out of reach just now: the lease's thread knows for how long
                self._fence.check()

    def _check_fence(self) -> None:
        """Raise OSError where this run may write nothing more."""
        assert self._fence is not None
        try:
            self._fence.check()
        except NotOwner as error:
            raise PermissionError(str(error)) from error

    def set_aside(self, failures: Sequence[TileFailure]) -> None:
        """Keep the tiles that failed in this run; none removes those of earlier runs.

        A task speaks for itself, any other run for all.
        """
        self.check()
        own = self._files.failed(self._writer)
        if not self._writer:
            for path in self._files.every_failed():
                if path != own:
                    path.unlink(missing_ok=True)
        if failures:
            replace(own, json.dumps([asdict(failure) for failure in failures]).encode())
        else:
            own.unlink(missing_ok=True)

    @property
    def failures(self) -> list[TileFailure]:
        """Return the tiles that the last run set aside, less those finished since, in order."""
        failures: dict[int, TileFailure] = {}
        for path in self._files.every_failed():
            with suppress(FileNotFoundError):
                entries = json.loads(path.read_text())
                failures |= {entry["index"]: TileFailure(**entry) for entry in entries}
        return [failures[index] for index in sorted(failures) if index not in self]

    def nonfinite(self) -> int:
        """Return how many values of the source were not finite, by the logs of all runs."""
        if self._log is not None:
            self._log.sync()
        return sum(read_logs(self._files).nonfinite.values())

    def adopt(self, task: ArrayTask) -> dict[int, Lease]:
        """Take the leases of those tasks of an array that began and died before they were done.

        A task that has not begun is not dead: its turn may come.
        """
        left: dict[Place, int] = {
            self._files.lock(writer_of_task(number)): number
            for number in range(1, task.count + 1)
            if next(self.remaining(ArrayTask(number, task.count).share(self.tiles)), None)
            is not None
        }
        return {left[path]: lease for path, lease in take_dead(left, task=str(task)).items()}

    def close(self) -> None:
        """Force what was entered to disk and let others write."""
        parts = (self._lease, self._log, self._file)
        self._file = self._log = self._lease = None
        with ExitStack() as stack:  # the others, too, where one fails
            for part in parts:
                if part is not None:
                    stack.callback(part.close)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except OSError as failure:
            if error is None:
                raise
            log.warning("what was finished last may be done again: %s", failure)


def _right(output: Output, lease: Lease) -> Right:
    return Right(output, lease.name, lease.token)


def lay_plan(output: Output, plan: Mapping[str, object], *, tiles: int) -> dict[str, object]:
    """Begin the ledger of an output on which we hold a lease, and return its plan."""
    files = output.ledger
    content = {**plan, "tiles": tiles}
    for path in files.of_tiles():
        path.unlink()  # before the plan: no tile of another may ever seem to be of this one
    replace(files.plan, json.dumps(content).encode())
    if isinstance(files.folder, Path):
        for parent in (files.folder.parent, files.folder.parent.parent):
            sync_file(parent)  # of the names of folders that are new
    return content


def take_lease(output: Output, *, task: ArrayTask | None = None) -> Lease:
    """Take the lease of an output, be it to create it; with a task, that of its part of the work.

    The tasks of an array have a lease each; a run without a task needs the whole. Raises
    `BadRequest` where somebody who lives has one that is in the way.
    """
    files = output.ledger
    writer = "" if task is None else writer_of_task(task.number)
    lease = _take(output, files.lock(writer), task)
    if isinstance(lease, Owner):
        raise _held(output, lease)
    others = files.task_locks() if task is None else [files.lock()]
    before = sum(map(is_held, others))
    if owners := living(others, clear=True):
        lease.close()
        raise _held(output, next(iter(owners.values())))
    lease.after_dead |= before > 0
    return lease


def take_first_lease(output: Output, task: ArrayTask) -> Lease | None:
    """Take the lease of a whole output for a task of an array that creates it.

    Returns None where another task has begun to.
    """
    lease = _take(output, output.ledger.lock(), task)
    if isinstance(lease, Owner):
        return None
    if is_begun(output):
        lease.close()
        return None
    return lease


def _take(output: Output, path: Place, task: ArrayTask | None) -> Lease | Owner:
    try:
        output.ledger.folder.mkdir(parents=True, exist_ok=True)
        return Lease.take(path, task="" if task is None else str(task))
    except OSError as error:
        raise BadRequest(f"output (={output}) cannot be written: {error}") from error


def await_first(output: Output) -> None:
    """Wait while another task of the array creates the output.

    Raises `BadRequest` where it is a run of no array that writes it.
    """
    path = output.ledger.lock()
    while owner := living([path], clear=True).get(path):
        if not owner.task:
            raise _held(output, owner)
        log.info("waiting for %s to create %s", owner, output)
        time.sleep(LOOK)


def is_leased(output: Output) -> bool:
    """Return whether there is a lease on the whole output, be it of the dead."""
    return is_held(output.ledger.lock())


def is_begun(output: Output) -> bool:
    """Return whether there is a ledger."""
    return output.ledger.plan.is_file()


def _held(output: Output, owner: Owner) -> BadRequest:
    return BadRequest(
        f"output (={output}) is being written by another run ({owner}); wait for it or name"
        " another output"
    )


def _read_done(path: Place, finished: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> int:
    """Enter the tiles that one writer finished; return the bytes that are whole records.

    What comes behind a record that was not wholly written is left out.
    """
    tiles, width, size = len(finished), DIGITS + 1, 0
    scale = 10.0 ** np.arange(DIGITS - 1, -1, -1)  # float64 holds twelve digits exactly
    with path.open("rb") as file:
        while content := file.read(BATCH * width):
            records = np.frombuffer(content, np.uint8, len(content) // width * width)
            records = records.reshape(-1, width)
            digits = records[:, :-1] - ord("0")  # what comes before "0" wraps to more than 9
            good = (records[:, -1] == ord("\n")) & (digits < 10).all(axis=1)
            count = len(good) if good.all() else int(good.argmin())
            indices = (digits[:count] @ scale).astype(np.int64)
            finished[indices[indices < tiles]] = True
            size += count * width
            if count * width < len(content):
                break
    return size


def _mend(path: Path) -> None:
    """Cut off what was not wholly written, before more is appended."""
    if path.exists():
        whole = _read_done(path, np.zeros(0, dtype=np.bool_))
        if whole < path.stat().st_size:
            os.truncate(path, whole)
