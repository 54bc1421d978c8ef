"""What a segmentation has done so far, and how fast."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tilepipe.runs.log import WorkerTotals

if TYPE_CHECKING:
    from tilepipe.engines import TileFailure, TileResult
    from tilepipe.planning.plan import Plan
    from tilepipe.runs.array import ArrayTask


@dataclass(slots=True)
class Report:
    """How far a segmentation is, and how fast it goes."""

    plan: Plan
    """What is done."""
    tiles: int
    """Tiles that were asked for: of the whole volume, or of a task's share."""
    before: int
    """Tiles that an earlier run had finished."""
    done: int = 0
    """Tiles finished by this run."""
    voxels: int = 0
    """Voxels of those."""
    nonfinite: int = 0
    """Values that were NaN or infinite in the source, and taken as 0 after normalization."""
    seconds: float = 0.0
    """How long this run has taken."""
    read_seconds: float = 0.0
    """How long tiles were read, all together."""
    compute_seconds: float = 0.0
    """How long tiles were computed, all together."""
    write_seconds: float = 0.0
    """How long tiles were written, all together."""
    narrowed: int = 0
    """Tiles that were computed in smaller parts than planned, since memory was short."""
    starved_seconds: float = 0.0
    """How long devices waited for data."""
    retries: int = 0
    """Attempts after the first, of the tiles that came to an end."""
    workers: dict[str, WorkerTotals] = field(default_factory=dict)
    """What each worker has done."""
    task: ArrayTask | None = None
    """The task of an array that this process is; None where it does all tiles."""
    adopted: list[int] = field(default_factory=list)
    """Numbers of the array's tasks that died, whose tiles were done here."""
    unfinished: int = 0
    """Tiles of the whole volume that nobody had finished at the end."""
    failures: list[TileFailure] = field(default_factory=list)
    """Tiles that were set aside, each with its cause."""
    job_seconds: float = 0.0
    """For how long jobs of SLURM have run, all together."""
    dashboard: str | None = None
    """Address of the Dask dashboard, where there is one."""

    @property
    def left(self) -> int:
        """Return how many tiles are neither finished nor set aside."""
        return self.tiles - self.before - self.done - len(self.failures)

    @property
    def device_seconds(self) -> float:
        """Return the seconds from the first tile of each worker to its last, all together."""
        return sum(totals.seconds for totals in self.workers.values())

    def enter(self, result: TileResult) -> None:
        """Count a tile that was finished."""
        self.done += 1
        self.voxels += result.voxels
        self.nonfinite += result.nonfinite
        self.read_seconds += result.read_seconds
        self.compute_seconds += result.compute_seconds
        self.write_seconds += result.write_seconds
        self.starved_seconds += result.starved_seconds
        self.narrowed += result.narrowed > 0
        self.workers.setdefault(result.worker, WorkerTotals()).add(
            time.time(),
            read=result.read_seconds,
            compute=result.compute_seconds,
            write=result.write_seconds,
            starved=result.starved_seconds,
        )
