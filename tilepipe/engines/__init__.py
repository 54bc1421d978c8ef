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
    """What is known of a tile whose voxels are in the output."""

    index: int
    """Place of the tile in the grid."""
    voxels: int
    """Voxels that the tile answers for."""
    nonfinite: int
    """Values of the source that were NaN or infinite."""
    read_seconds: float
    """How long the tile's voxels were read."""
    compute_seconds: float
    """How long the network computed."""
    write_seconds: float
    """How long the answer was written."""
    worker: str
    """Name of the process that computed the tile."""
    narrowed: int = 0
    """How often the tile was halved since memory was short; 0 where it was computed as planned."""
    starved_seconds: float = 0.0
    """How long the device waited for the tile's voxels."""
    attempts: int = 1
    """How often the tile was begun; the engine counts that."""


@dataclass(frozen=True, slots=True)
class TileFailure:
    """What is known of a tile that is set aside."""

    index: int
    """Place of the tile in the grid."""
    cause: str
    """Why the last attempt failed, in one line."""
    attempts: int
    """How often the tile was begun."""


class Opened(Protocol):
    """A job that one process has opened."""

    def __call__(self, index: int) -> TileResult:
        """Process a tile; several threads may call this at once."""

    def close(self) -> None:
        """End all writing; what is being written has ended when this returns."""


class Job(Protocol):
    """Work on tiles, in a form that is small enough to be sent to every worker."""

    @property
    def key(self) -> str:
        """The name of this work, which no other work has at the same time."""

    @property
    def slots(self) -> int:
        """How many tiles a process works on at once: one is read, one computed, one written."""

    def open(self) -> Opened:
        """Open the model, the volume and the output in this process."""


@dataclass(frozen=True, slots=True)
class Lost:
    """Why a worker is gone with the tiles that it held."""

    cause: str
    """Why the worker is gone, in words that name the remedy."""
    blame: bool
    """Whether a tile may be the reason, so that the loss counts as one of its attempts."""


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
