"""Which tiles are finished, kept beside the output with the plan that they belong to.

Law: a tile in the ledger has been written wholly. Killing a run at any moment loses no more than
the tiles in flight. Files, in ``TARGET/.tilepipe``: ``plan.json`` (whole or absent), ``done``
(appended, one line of fixed width for each tile), ``failed.json`` and ``lock``.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np

from tilepipe.engines import TileFailure
from tilepipe.errors import BadRequest
from tilepipe.target import LEDGER

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from types import TracebackType

DIGITS = 12
"""Of a tile's index in ``done``; with the line's end the width of a record is one more."""
BATCH = 1 << 16
"""Records of ``done`` that are read at once."""
SYNC_SECONDS = 1.0
"""How often what was appended is forced to disk."""


def fingerprint(content: Mapping[str, object]) -> str:
    """Return the sha256 of the content as canonical JSON.

    >>> fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    True
    """
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


class Ledger:
    """The finished tiles of one target; with ``write`` no other process can open it so."""

    def __init__(self, folder: Path, plan: dict[str, object], *, tiles: int, write: bool) -> None:
        self._folder = folder
        self.plan = plan
        self.tiles = tiles
        self._lock = _locked(folder) if write else None
        self._file = None
        self._synced = time.monotonic()
        try:
            self._finished = _read_done(folder / "done", tiles, mend=write)
            self.done = int(np.count_nonzero(self._finished))
            self._file = (folder / "done").open("ab") if write else None
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, target: str | Path, plan: Mapping[str, object], *, tiles: int) -> Ledger:
        """Begin a ledger for a new target, open for writing; what an older one held is forgotten.

        Raises `BadRequest` where another process writes it.
        """
        folder = Path(target) / LEDGER
        folder.mkdir(exist_ok=True)
        content = {**plan, "tiles": tiles}
        ledger = cls(folder, content, tiles=tiles, write=True)
        ledger._forget()  # before the plan: no tile of another plan may ever seem to be of this one
        _replace(folder / "plan.json", content)
        return ledger

    @classmethod
    def open(cls, target: str | Path, *, write: bool = True) -> Ledger | None:
        """Open the ledger of a target; None where there is none.

        Raises `BadRequest` where it cannot be read, or where another process writes it.
        """
        folder = Path(target) / LEDGER
        try:
            plan = json.loads((folder / "plan.json").read_text())
            tiles = plan["tiles"]
            if type(tiles) is not int or not 0 <= tiles < 10**DIGITS:
                raise ValueError(f"its number of tiles is {tiles}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BadRequest(
                f"output (={target}) has a ledger that cannot be read ({error}); replace the"
                " output with --overwrite"
            ) from error
        return cls(folder, plan, tiles=tiles, write=write)

    def _forget(self) -> None:
        os.truncate(self._folder / "done", 0)
        self.set_aside([])
        self._finished[:] = False
        self.done = 0

    def __contains__(self, index: int) -> bool:
        return bool(self._finished[index])

    def remaining(self) -> Iterator[int]:
        """Yield the tiles that were not finished when each is reached, in order."""
        return (index for index in range(self.tiles) if not self._finished[index])

    def mark(self, index: int) -> None:
        """Enter a tile that has been written wholly."""
        assert self._file is not None
        if not 0 <= index < self.tiles:  # its record would hide all that come after
            raise IndexError(f"tile {index} is not one of {self.tiles}")
        self._file.write(b"%0*d\n" % (DIGITS, index))
        self._file.flush()
        if not self._finished[index]:
            self._finished[index] = True
            self.done += 1
        if time.monotonic() - self._synced > SYNC_SECONDS:
            os.fsync(self._file.fileno())
            self._synced = time.monotonic()

    def set_aside(self, failures: Sequence[TileFailure]) -> None:
        """Keep the tiles that failed in this run; none removes those of earlier runs."""
        if failures:
            _replace(self._folder / "failed.json", [asdict(failure) for failure in failures])
        else:
            (self._folder / "failed.json").unlink(missing_ok=True)

    @property
    def failures(self) -> list[TileFailure]:
        """The tiles that the last run set aside, less those finished since."""
        try:
            kept = json.loads((self._folder / "failed.json").read_text())
        except FileNotFoundError:
            return []
        failures = (TileFailure(**failure) for failure in kept)
        return [failure for failure in failures if failure.index not in self]

    def close(self) -> None:
        """Force what was entered to disk and let others write."""
        if self._file is not None:
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Ledger:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def check_idle(target: str | Path) -> None:
    """Raise `BadRequest` where another process writes this target, before it is replaced."""
    folder = Path(target) / LEDGER
    if (folder / "lock").exists():
        os.close(_locked(folder))


def _locked(folder: Path) -> int:
    """Take the folder's lock; it is let go when the process ends, however that is."""
    handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 32).decode(errors="replace").strip()
        os.close(handle)
        raise BadRequest(
            f"output (={folder.parent}) is being written by another run (process {owner}); wait"
            " for it or name another output"
        ) from None
    except OSError as error:
        os.close(handle)
        raise BadRequest(
            f"output (={folder.parent}) must lie where files can be locked: {error}; name another"
        ) from error
    os.ftruncate(handle, 0)
    os.pwrite(handle, str(os.getpid()).encode(), 0)
    return handle


def _read_done(path: Path, tiles: int, *, mend: bool) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Read the finished tiles; a record that was not wholly written is cut off."""
    finished = np.zeros(tiles, dtype=np.bool_)
    width, size = DIGITS + 1, 0
    scale = 10.0 ** np.arange(DIGITS - 1, -1, -1)  # float64 holds twelve digits exactly
    if not path.exists():
        return finished
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
    if mend and size < path.stat().st_size:
        os.truncate(path, size)
    return finished


def _replace(path: Path, content: object) -> None:
    """Write JSON so that the file is the old one or the new one, never a part."""
    partial = path.with_name(path.name + ".new")
    with partial.open("w") as file:
        json.dump(cast("dict[str, object]", content), file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)  # of the name itself
    finally:
        os.close(handle)
