"""Engines: what runs tiles, which they know by index; they know no torch and no Zarr.

Every engine is a generator ``run(job, tiles)`` that takes tiles as it needs them, never holds
more than a bounded window of them, and yields what became of each exactly once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

RETRIES = 2
"""How often a tile that failed is tried again before it is set aside."""


@dataclass(frozen=True, slots=True)
class TileResult:
    """A tile whose voxels are in the target."""

    index: int
    voxels: int
    nonfinite: int
    """Values of the source that were not finite."""
    read_seconds: float
    compute_seconds: float
    write_seconds: float
    worker: str
    narrowed: int = 0
    """How often the network's share was halved since memory was short; 0 as planned."""
    starved_seconds: float = 0.0
    """How long the device waited for this tile's data."""
    attempts: int = 1
    """How often it was begun; engines count."""


@dataclass(frozen=True, slots=True)
class TileFailure:
    """A tile that is set aside."""

    index: int
    cause: str
    """One line."""
    attempts: int


class Opened(Protocol):
    """A job in one process."""

    def __call__(self, index: int) -> TileResult:
        """Process a tile; may be called from several threads at once."""

    def close(self) -> None:
        """Let nothing be written any more; what is being written has ended when this returns."""


class Job(Protocol):
    """Work on tiles, small enough to be sent to every worker."""

    @property
    def key(self) -> str:
        """The name of this work; no other work has the same at the same time."""

    @property
    def slots(self) -> int:
        """Tiles in flight in a process: one is read, one computed, one written."""

    def open(self) -> Opened:
        """Return what processes tiles in this process."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a worker is gone with the tiles that it held."""

    cause: str
    blame: bool
    """Whether a tile may be the reason, so that this counts as an attempt."""


class Fleet(Protocol):
    """Workers that come and go, and that somebody else than Dask replaces."""

    def check(self) -> None:
        """Raise the error for which the run must end, if there is one."""

    def waiting(self) -> str:
        """Return what the run waits for while it has no workers."""

    def lost(self, worker: str) -> Lost | None:
        """Return why a worker is gone, or None where that is not known."""


def one_line(error: BaseException) -> str:
    """Return an error with its causes as one line.

    >>> one_line(ValueError("no such chunk"))
    'ValueError: no such chunk'
    """
    text = " ".join(str(error).split())
    line = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return line if len(line) <= 300 else line[:297] + "..."
