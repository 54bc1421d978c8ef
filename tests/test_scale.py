"""Laws of scale: what a tile costs the driver does not depend on how many there are."""

from __future__ import annotations

import math
import time
import tracemalloc
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil
import pytest
import zarr
from distributed import SpecCluster

from tests.support import new_ledger, write_unet
from tilepipe.engines import TileResult, dask, serial
from tilepipe.options import Options
from tilepipe.planning.chunking import SHARD_BYTES
from tilepipe.planning.plan import plan
from tilepipe.runs.ledger import Ledger
from tilepipe.runs.log import RECENT, LogWriter, read_logs
from tilepipe.storage.names import LEDGER, LedgerFiles
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from distributed import Client

MILLION = 1_000_000


@dataclass(frozen=True)
class Idle:
    """A job whose tiles do nothing; workers import it from here."""

    key: str = "idle"
    slots: int = 2

    def open(self) -> Idling:
        return Idling()


class Idling:
    def __call__(self, index: int) -> TileResult:
        return result(index)

    def close(self) -> None:
        """Nothing is being written."""


def result(index: int, *, worker: str = "host:1", seconds: float = 0.0) -> TileResult:
    return TileResult(index, 1, 0, seconds, seconds, seconds, worker)


def run_idle(client: Client, tiles: int) -> tuple[int, int]:
    """Return the most tasks that the scheduler held at an outcome, and the tiles done."""
    assert isinstance(client.cluster, SpecCluster)
    scheduler, most, done = client.cluster.scheduler, 0, 0
    for outcome in dask.run(Idle(), range(tiles), client=client):
        assert isinstance(outcome, TileResult)
        most, done = max(most, len(scheduler.tasks), len(client.futures)), done + 1
    return most, done


def test_the_scheduler_holds_a_bounded_window() -> None:
    with dask.local_client(1, threads=2, dashboard=False) as client:
        most, done = run_idle(client, 400)
        assert done == 400
        assert most <= 3 * 4  # the window of two threads, and what is being let go
        assert isinstance(client.cluster, SpecCluster)
        scheduler = client.cluster.scheduler
        assert scheduler.transition_log.maxlen == 100
        assert len(scheduler.tasks) <= 4
        assert len(client.futures) == 0


@pytest.mark.long
def test_memory_of_driver_and_scheduler_is_flat() -> None:
    this = psutil.Process()
    with dask.local_client(2, threads=3, dashboard=False) as client:
        run_idle(client, 50_000)  # fills the scheduler's own logs
        before = this.memory_info().rss
        run_idle(client, 100_000)
        assert this.memory_info().rss - before < 5_000_000


def test_the_serial_engine_keeps_nothing_of_tiles_that_are_done() -> None:
    def held(tiles: int) -> int:
        tracemalloc.start()
        try:
            for _ in serial.run(Idle(), range(tiles)):
                pass
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    held(100)
    assert held(4000) < held(400) + 100_000


def half_done(target: Path, tiles: int) -> Path:
    """Return a ledger in which every second tile is done."""
    new_ledger(target, {}, tiles=tiles).close()
    lines = b"".join(b"%012d\n" % index for index in range(0, tiles, 2))
    (target / LEDGER / "done").write_bytes(lines)
    return target


def test_a_ledger_takes_a_byte_for_each_tile_and_is_opened_at_once(tmp_path: Path) -> None:
    target = half_done(tmp_path, MILLION)
    tracemalloc.start()
    began = time.perf_counter()
    ledger = Ledger.open(Output.at(target))
    assert ledger is not None
    with ledger:
        assert next(ledger.remaining()) == 1
        seconds = time.perf_counter() - began
        assert ledger.done == MILLION // 2
        assert tracemalloc.get_traced_memory()[0] < 1.2 * MILLION
        tracemalloc.stop()
        assert seconds < 10
        ledger.mark(1, result(1))
    assert (target / LEDGER / "done").stat().st_size == 13 * (MILLION // 2 + 1)


def test_marking_does_not_depend_on_how_many_tiles_there_are(tmp_path: Path) -> None:
    ledger = Ledger.open(Output.at(half_done(tmp_path, MILLION)))
    assert ledger is not None
    with ledger:
        began = time.process_time()
        for index in range(1, 2001, 2):
            ledger.mark(index, result(index, seconds=1.5))
        assert (time.process_time() - began) / 1000 < 0.001
    assert (tmp_path / LEDGER / "log").stat().st_size / 1000 < 60


def test_a_log_says_what_was_entered_torn_or_not(tmp_path: Path) -> None:
    now = time.time()
    for number, names in enumerate((("a:1", "b:2"), ("b:2", "c:3"))):
        for _ in range(2):  # a run, and one that goes on
            log = LogWriter(tmp_path / f"log-{number + 1}", lambda: None)
            for index, name in enumerate(names):
                log.add(result(index, worker=name, seconds=0.25))
            log.close()
            with (tmp_path / f"log-{number + 1}").open("ab") as file:
                file.write(b"17000")
    found = read_logs(LedgerFiles(tmp_path), now=now + 10)
    assert {name: share.tiles for name, share in found.workers.items()} == {
        "a:1": 2, "b:2": 4, "c:3": 2
    }  # fmt: skip
    assert found.workers["b:2"].compute == 1.0
    assert (found.recent, found.retries) == (8, 0)
    assert found.rate == pytest.approx(8 / (10 + found.now - 10 - found.began), rel=0.2)
    later = read_logs(LedgerFiles(tmp_path), now=now + RECENT + 10)
    assert (later.recent, later.rate) == (0, 0.0)


@pytest.fixture(scope="module")
def petavoxel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of more than a petavoxel, of which nothing is stored, and a network."""
    folder = tmp_path_factory.mktemp("peta")
    write_unet(folder / "net.pt", ndim=3)
    zarr.create_array(
        folder / "v.zarr",
        shape=(110_080,) * 3,
        chunks=(64,) * 3,
        dtype="uint8",
        dimension_names=list("zyx"),
    )
    return folder


def test_ten_million_tiles_are_planned_at_once(petavoxel: Path) -> None:
    options = Options(tile=(512,) * 3, memory=4_000_000_000, device="cpu", threads=1)
    plan(petavoxel / "v.zarr", model=petavoxel / "net.pt", options=options)  # imports
    began, before = time.process_time(), psutil.Process().memory_info().rss
    made = plan(petavoxel / "v.zarr", model=petavoxel / "net.pt", options=options)
    assert time.process_time() - began < 5
    assert psutil.Process().memory_info().rss - before < 200_000_000
    assert made.costs.tiles == len(made.grid) == 215**3
    assert str(made.grid[215**3 - 1].write) == ",".join(["109568:110080"] * 3)


@pytest.mark.parametrize("tile", [None, (512, 512, 512), (384, 640, 1024)])
@pytest.mark.parametrize("write", ["labels", "probabilities"])
def test_shards_are_tens_of_megabytes_and_divide_tiles(
    petavoxel: Path, tile: tuple[int, ...] | None, write: str
) -> None:
    options = Options(tile=tile, memory=8_000_000_000, device="cpu", threads=1, write=write)
    made = plan(petavoxel / "v.zarr", model=petavoxel / "net.pt", options=options)
    shards = made.sizes.shards
    assert shards is not None
    size = math.prod(shards) * made.answer.itemsize * made.answer.channels
    assert 20_000_000 <= size <= SHARD_BYTES
    assert all(t % s == 0 for t, s in zip(made.sizes.tile, shards, strict=True))
    assert all(s % c == 0 for s, c in zip(shards, made.sizes.chunks, strict=True))
    counts = [-(-n // s) for n, s in zip(made.source.shape, shards, strict=True)]
    assert made.costs.files == math.prod(counts)
