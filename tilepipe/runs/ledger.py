"""Which tiles are finished, kept beside the output with the plan that they belong to.

Law: a tile in the ledger has been written wholly. Killing a run at any moment loses no more than
the tiles in flight. Several tasks may write at once, from several machines: each appends to files
of its own, and who reads merges them. There are no locks (see `tilepipe.runs.lease`).

Files, in ``TARGET/.tilepipe``: ``plan.json`` (whole or absent); of each writer ``done`` (appended,
one line of fixed width for each tile), ``log`` (see `tilepipe.runs.log`), ``failed.json`` where
tiles failed, ``lock`` while it runs. Task 3 of an array has ``done-3``, ``log-3`` and so on. In an
object store, where nothing can be appended to, ``done`` and ``log`` are rows of objects
(`tilepipe.storage.objects.Parts`), and a kill may also cost the tiles of the last `FLUSH` seconds.
"""

from __future__ import annotations

import hashlib
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
from tilepipe.runs.lease import Claim, Owner, is_held, living, take_dead
from tilepipe.runs.log import Log, read_progress
from tilepipe.storage.contents import LEDGER
from tilepipe.storage.location import append, find, locate, replace, sync_file

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

    from tilepipe.engines import TileResult
    from tilepipe.storage.location import Appending, Place

log = logging.getLogger(__name__)

DIGITS = 12
"""Of a tile's index in ``done``; with the line's end the width of a record is one more."""
BATCH = 1 << 16
"""Records of ``done`` that are read at once."""
LOOK = 0.2
"""Seconds between two looks at whether another task has created the target."""


def fingerprint(content: Mapping[str, object]) -> str:
    """Return the sha256 of the content as canonical JSON.

    >>> fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """The finished tiles of one target; with a claim on it, no other process can write so."""

    def __init__(
        self, folder: Place, plan: dict[str, object], *, tiles: int, claim: Claim | None
    ) -> None:
        self._folder, self._claim = folder, claim
        self._fence = None if claim is None else Fence(_right(folder, claim))
        self.plan = plan
        self.tiles = tiles
        self._name = "" if claim is None else claim.name.removeprefix("lock")
        self._file: Appending | None = None
        self._log: Log | None = None
        self._finished = np.zeros(tiles, dtype=np.bool_)
        self.done = 0
        """Tiles known to be finished, by whomever; `refresh` looks again."""
        try:
            if claim is not None:
                path = folder / f"done{self._name}"
                if isinstance(path, Path):
                    _mend(path)
                self._file = append(path, self._leave)
                self._log = Log(folder / f"log{self._name}", self._leave)
            self.refresh()
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(
        cls,
        target: str | Path,
        plan: Mapping[str, object],
        *,
        tiles: int,
        claim: Claim | None = None,
    ) -> Ledger:
        """Begin a ledger for a new target, open for writing; what an older one held is forgotten.

        ``claim`` is on the target, where it was taken already. Raises `BadRequest` where another
        process writes it.
        """
        claim = claim or claimed(target)
        try:
            content = lay_plan(target, plan, tiles=tiles)
        except BaseException:
            claim.close()
            raise
        return cls(folder_of(target), content, tiles=tiles, claim=claim)

    @classmethod
    def open(
        cls, target: str | Path, *, write: bool = True, task: ArrayTask | None = None
    ) -> Ledger | None:
        """Open the ledger of a target; None where there is none.

        Of an array's tasks each opens it for its ``task``, and all may write at once. Raises
        `BadRequest` where it cannot be read, or where another process writes it.
        """
        folder = folder_of(target)
        try:
            plan = json.loads((folder / "plan.json").read_text())
            tiles = plan["tiles"]
            if type(tiles) is not int or not 0 <= tiles < 10**DIGITS:
                raise ValueError(f"its number of tiles is {tiles}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadRequest(
                f"output (={target}) has a ledger that cannot be read ({error}); replace the"
                " output with --overwrite"
            ) from error
        claim = claimed(target, task=task) if write else None
        return cls(folder, plan, tiles=tiles, claim=claim)

    def refresh(self) -> None:
        """Read again what all writers have finished."""
        for path in find(self._folder, "done"):
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
        assert self._claim is not None
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
        """What lets this process write as long as the claim is held; see `right`."""
        assert self._fence is not None
        return self._fence

    @property
    def right(self) -> Right:
        """What workers need to write for this run; only of a ledger that is open for writing."""
        assert self._claim is not None
        return _right(self._folder, self._claim)

    def check(self) -> None:
        """Raise `TileError` where nothing more can be entered: see `Claim.check`."""
        if self._claim is not None and self._fence is not None:
            self._claim.check()
            with suppress(OSError):  # out of reach just now: the claim's thread knows for how long
                self._fence.check()

    def _leave(self) -> None:
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
        if not self._name:
            for path in find(self._folder, "failed-"):
                path.unlink(missing_ok=True)
        path = self._folder / f"failed{self._name}.json"
        if failures:
            replace(path, json.dumps([asdict(failure) for failure in failures]).encode())
        else:
            path.unlink(missing_ok=True)

    @property
    def failures(self) -> list[TileFailure]:
        """The tiles that the last run set aside, less those finished since, in order."""
        found: dict[int, TileFailure] = {}
        for path in find(self._folder, "failed"):
            if path.suffix != ".json":
                continue
            with suppress(FileNotFoundError):
                kept = json.loads(path.read_text())
                found |= {failure["index"]: TileFailure(**failure) for failure in kept}
        return [found[index] for index in sorted(found) if index not in self]

    def nonfinite(self) -> int:
        """Return how many values of the source were not finite, by the logs of all runs."""
        if self._log is not None:
            self._log.sync()
        return sum(read_progress(self._folder).nonfinite.values())

    def adopt(self, task: ArrayTask) -> dict[int, Claim]:
        """Claim the shares of an array's tasks that began and died before they were done.

        A task that has not begun is not dead: its turn may come.
        """
        left: dict[Place, int] = {
            self._folder / f"lock-{number}": number
            for number in range(1, task.count + 1)
            if next(self.remaining(ArrayTask(number, task.count).share(self.tiles)), None)
            is not None
        }
        return {left[path]: claim for path, claim in take_dead(left, task=str(task)).items()}

    def close(self) -> None:
        """Force what was entered to disk and let others write."""
        parts = (self._claim, self._log, self._file)
        self._file = self._log = self._claim = None
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


def _right(folder: Place, claim: Claim) -> Right:
    return Right(str(folder.parent), claim.name, claim.token)


def folder_of(target: str | Path) -> Place:
    """Return where the ledger of a target lies, or would."""
    return locate(target, "output") / LEDGER


def lay_plan(target: str | Path, plan: Mapping[str, object], *, tiles: int) -> dict[str, object]:
    """Begin the ledger of a target that is claimed, and return its plan."""
    folder = folder_of(target)
    content = {**plan, "tiles": tiles}
    for path in folder.iterdir():
        if not path.name.startswith(("lock", "plan.json")):
            path.unlink()  # before the plan: no tile of another may ever seem to be of this one
    replace(folder / "plan.json", json.dumps(content).encode())
    if isinstance(folder, Path):
        for parent in (folder.parent, folder.parent.parent):
            sync_file(parent)  # of the names of folders that are new
    return content


def claimed(target: str | Path, *, task: ArrayTask | None = None) -> Claim:
    """Claim a target, be it to create it; with a task, that part of the work on it.

    The tasks of an array have a claim each; a run without a task needs the whole. Raises
    `BadRequest` where one lives that is in the way.
    """
    folder = folder_of(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        name = "lock" if task is None else f"lock-{task.number}"
        claim = Claim.take(folder / name, task="" if task is None else str(task))
    except OSError as error:
        raise BadRequest(f"output (={target}) cannot be written: {error}") from error
    if isinstance(claim, Owner):
        raise _held(target, claim)
    others = (
        [path for path in find(folder, "lock-") if "." not in path.name]
        if task is None
        else [folder / "lock"]
    )
    before = sum(map(is_held, others))
    if found := living(others, clear=True):
        claim.close()
        raise _held(target, next(iter(found.values())))
    claim.after_dead |= before > 0
    return claim


def claimed_first(target: str | Path, task: ArrayTask) -> Claim | None:
    """Claim a target for a task of an array that creates it; None where another has begun to."""
    folder = folder_of(target)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claim = Claim.take(folder / "lock", task=str(task))
    except OSError as error:
        raise BadRequest(f"output (={target}) cannot be written: {error}") from error
    if isinstance(claim, Owner):
        return None
    if is_begun(target):
        claim.close()
        return None
    return claim


def await_first(target: str | Path) -> None:
    """Wait while another task of the array creates the target.

    Raises `BadRequest` where it is a run of no array that writes it.
    """
    path = folder_of(target) / "lock"
    while owner := living([path], clear=True).get(path):
        if not owner.task:
            raise _held(target, owner)
        log.info("waiting for %s to create %s", owner, target)
        time.sleep(LOOK)


def is_claimed(target: str | Path) -> bool:
    """Whether there is a claim on the whole target, be it of the dead."""
    return is_held(folder_of(target) / "lock")


def is_begun(target: str | Path) -> bool:
    """Whether there is a ledger."""
    return (folder_of(target) / "plan.json").is_file()


def _held(target: str | Path, owner: Owner) -> BadRequest:
    return BadRequest(
        f"output (={target}) is being written by another run ({owner}); wait for it or name"
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
