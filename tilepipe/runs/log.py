"""The log of a run: which tile was finished when, where and how long it took.

A line of about 45 bytes is appended for each tile; each writer has a log of its own. The log is for
people and for what `tilepipe inspect` shows; which tiles are finished, the ledger knows. A line
``worker 0 host:pid`` gives a worker its number in the lines that follow. A line
``time tile worker read compute write starved attempts nonfinite`` is a tile: the time is in whole
seconds since 1970, and what the tile took in milliseconds.
"""

from __future__ import annotations

import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilepipe.storage.appending import append

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.engines import TileResult
    from tilepipe.storage.appending import Appending
    from tilepipe.storage.location import Place
    from tilepipe.storage.names import LedgerFiles

RECENT = 300
"""Seconds over which a rate is taken."""


class LogWriter:
    """The log of one writer, to which it appends the tiles that it finishes."""

    def __init__(self, path: Place, check: Callable[[], None]) -> None:
        """``check`` raises OSError where nothing more may be written."""
        self._path, self._check = path, check
        self._file: Appending | None = None
        self._workers: dict[str, int] = {}

    def add(self, result: TileResult) -> None:
        """Enter a tile that has just been finished."""
        if self._file is None:
            self._file = append(self._path, self._check)
            self._file.write(b"\n")  # the last line may be torn
        number = self._workers.get(result.worker)
        if number is None:
            number = self._workers[result.worker] = len(self._workers)
            self._file.write(f"worker {number} {result.worker}\n".encode())
        took = (
            result.read_seconds,
            result.compute_seconds,
            result.write_seconds,
            result.starved_seconds,
        )
        shown = " ".join(f"{max(seconds, 0) * 1000:.0f}" for seconds in took)
        self._file.write(
            f"{time.time():.0f} {result.index} {number} {shown}"
            f" {result.attempts} {result.nonfinite}\n".encode()
        )

    def sync(self) -> None:
        """Force all of it to where others see it."""
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        """Close the log; it may not be written to any more."""
        if self._file is not None:
            self._file.close()
            self._file = None


@dataclass(slots=True)
class WorkerTotals:
    """What one worker has done in all; times are in seconds."""

    tiles: int = 0
    recent: int = 0
    """Tiles of the last `RECENT` seconds."""
    begun: float = 0.0
    """When its first tile was begun, since 1970."""
    ended: float = 0.0
    """When its last tile was finished, since 1970."""
    read: float = 0.0
    compute: float = 0.0
    write: float = 0.0
    starved: float = 0.0
    """How long its device waited for data."""

    @property
    def seconds(self) -> float:
        """Return the seconds from the beginning of its first tile to the end of its last."""
        return self.ended - self.begun

    def add(
        self, ended: float, *, read: float, compute: float, write: float, starved: float
    ) -> None:
        """Enter a tile."""
        begun = ended - read - compute - write
        self.begun = min(self.begun, begun) if self.tiles else begun
        self.ended = max(self.ended, ended)
        self.tiles += 1
        self.read += read
        self.compute += compute
        self.write += write
        self.starved += starved


@dataclass(slots=True)
class LogSummary:
    """What the logs of all runs of an output say, taken together."""

    workers: dict[str, WorkerTotals] = field(default_factory=dict)
    """By name, ``host:process``."""
    retries: int = 0
    nonfinite: dict[int, int] = field(default_factory=dict)
    """Values that were not finite, of the tiles that had any."""
    began: float = 0.0
    """When the first of the recent tiles was begun, since 1970."""
    now: float = 0.0

    @property
    def recent(self) -> int:
        """Return the tiles of the last `RECENT` seconds."""
        return sum(totals.recent for totals in self.workers.values())

    @property
    def rate(self) -> float:
        """Return tiles per second, over the last `RECENT` seconds or since the run began."""
        return self.recent / max(1.0, min(RECENT, self.now - self.began)) if self.recent else 0.0


def read_logs(files: LedgerFiles, *, now: float | None = None) -> LogSummary:
    """Read the logs of all writers of a ledger; a line that is torn is left out.

    Memory grows with the workers, not with the tiles.
    """
    summary = LogSummary(now=time.time() if now is None else now)
    writers: dict[str, dict[int, str]] = {}
    for path in files.every_log():
        names = writers.setdefault(path.name.partition(".")[0], {})
        with path.open("rb") as file:
            for line in file:
                with suppress(ValueError, KeyError):  # torn
                    _enter(summary, names, line.decode(errors="replace").split())
    return summary


def _enter(summary: LogSummary, names: dict[int, str], words: list[str]) -> None:
    """Enter a line of a log; ``names`` are the workers that lines before it have numbered."""
    if len(words) == 3 and words[0] == "worker":
        names[int(words[1])] = words[2]
        return
    if not words:
        return
    ended, tile, number, read, compute, write, starved, attempts, nonfinite = map(int, words)
    totals = summary.workers.setdefault(names[number], WorkerTotals())
    totals.add(
        ended,
        read=read / 1000,
        compute=compute / 1000,
        write=write / 1000,
        starved=starved / 1000,
    )
    if ended > summary.now - RECENT:
        begun = ended - (read + compute + write) / 1000
        summary.began = min(summary.began, begun) if summary.recent else begun
        totals.recent += 1
    summary.retries += attempts - 1
    if nonfinite:
        summary.nonfinite[tile] = nonfinite
