"""Work for an engine of which some tiles fail, take long, or kill their process.

An engine of one's own is a generator ``run(job, tiles, retries=...)`` as `tilepipe.engines` says.
`check_engine` runs it, and `FileJob` lets a test ask for more:

    from tilepipe.testing.engines import FileJob, check_engine, outcomes_by_index

    def test_my_engine_gives_every_tile_one_outcome(tmp_path):
        check_engine(my_engine.run, tmp_path)

    def test_my_engine_outlives_a_worker(tmp_path):
        job = FileJob(str(tmp_path), killing=(6,))
        assert sorted(outcomes_by_index(my_engine.run(job, range(40)))) == list(range(40))
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from tilepipe.engines import RETRIES, TileFailure, TileResult

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tilepipe.engines import Job

TILES = 30
"""How many tiles `check_engine` runs."""


class Engine(Protocol):
    """What runs tiles."""

    def __call__(
        self, job: Job, tiles: Iterable[int], *, retries: int = ...
    ) -> Iterator[TileResult | TileFailure]:
        """Yield what became of each tile, once."""


@dataclass(frozen=True)
class FileJob:
    """Work that notes each tile in a file of a folder, and fails where it is told to.

    Every process that opens it writes to the same folder, so that a test sees what any of them did.
    """

    folder: str
    """Where the notes lie; see `notes`."""
    slots: int = 2
    """Tiles that a process may have in flight."""
    always: tuple[int, ...] = ()
    """Tiles that fail at every attempt."""
    once: tuple[int, ...] = ()
    """Tiles that fail at the first attempt."""
    killing: tuple[int, ...] = ()
    """Tiles that kill their process at the first attempt."""
    deadly: tuple[int, ...] = ()
    """Tiles that kill their process at every attempt."""
    seconds: float = 0.0
    """How long each tile takes."""
    since: int = 0
    """The first tile that takes so long; those before take no time."""
    broken: bool = False
    """Whether it cannot be opened."""

    @property
    def key(self) -> str:
        """The name of this work."""
        return f"key of {self.folder}"

    def open(self) -> _Opened:
        """Return what processes tiles in this process."""
        if self.broken:
            raise OSError("no such\nmodel")
        return _Opened(self)


class _Opened:
    def __init__(self, job: FileJob) -> None:
        self.job, self.folder = job, Path(job.folder)
        self.lock, self.running, self.place = threading.Lock(), 0, f"{os.getpid()}"
        self.note("opened", self.place)

    def close(self) -> None:
        self.note("closed", self.place)

    def note(self, kind: str, text: object) -> None:
        with (self.folder / kind).open("a") as file:
            file.write(f"{text}\n")

    def is_first(self, index: int) -> bool:
        """Whether this tile is tried for the first time, in any process."""
        try:
            (self.folder / f"tried-{index}").touch(exist_ok=False)
        except FileExistsError:
            return False
        return True

    def __call__(self, index: int) -> TileResult:
        with self.lock:
            self.running += 1
            self.note("running", self.running)
        try:
            return self.process(index)
        finally:
            with self.lock:
                self.running -= 1

    def process(self, index: int) -> TileResult:
        class Homeless(Exception):
            """Of a class that cannot travel to another process."""

        job = self.job
        time.sleep(job.seconds * (index >= job.since))
        if index in job.always:
            raise Homeless(f"tile {index}\nis bad")
        if index in job.once and self.is_first(index):
            raise OSError("once")
        if index in job.deadly or (index in job.killing and self.is_first(index)):
            self.note("deaths", index)
            os.kill(os.getpid(), signal.SIGKILL)
        self.note("done", index)
        return TileResult(index, 8, 0, 0.1, 0.2, 0.3, self.place)


def notes(folder: Path, kind: str) -> list[str]:
    """Return what the processes of a `FileJob` noted, in order.

    Args:
        folder: The folder of the job.
        kind: ``done`` for tiles that were finished, ``opened`` and ``closed`` for processes,
            ``running`` for how many tiles a process had in flight at each beginning, ``deaths`` for
            tiles that killed their process.

    Returns:
        The notes; empty where there are none of this kind.
    """
    path = folder / kind
    return path.read_text().split() if path.exists() else []


def outcomes_by_index(
    outcomes: Iterable[TileResult | TileFailure],
) -> dict[int, TileResult | TileFailure]:
    """Return what became of each tile.

    Args:
        outcomes: What an engine yields; it is run to its end.

    Returns:
        The outcomes by the tile's index.

    Raises:
        AssertionError: A tile has two outcomes.
    """
    by_index: dict[int, TileResult | TileFailure] = {}
    for outcome in outcomes:
        assert outcome.index not in by_index, f"tile {outcome.index} has two outcomes"
        by_index[outcome.index] = outcome
    return by_index


def check_engine(run: Engine, folder: Path, *, retries: int = RETRIES) -> None:
    """Fail unless an engine gives each tile one outcome, and tries again what fails.

    Args:
        run: The engine, which starts its workers itself or has them already.
        folder: An empty folder that all workers can write to.
        retries: How often a tile that fails is to be tried again.

    Raises:
        AssertionError: A tile has no outcome or two, or a wrong one.
    """
    job = FileJob(str(folder), always=(0, 7, 29), once=(3, 4))
    outcomes = outcomes_by_index(run(job, range(TILES), retries=retries))
    assert sorted(outcomes) == [*range(TILES)]
    failed = {index for index, outcome in outcomes.items() if isinstance(outcome, TileFailure)}
    assert failed == {*job.always} | ({*job.once} if retries == 0 else set())
    for index in job.always:
        cause = f"Homeless: tile {index} is bad"
        assert outcomes[index] == TileFailure(index, cause, retries + 1)
    assert Counter(map(int, notes(folder, "done"))) == Counter({*range(TILES)} - failed)
