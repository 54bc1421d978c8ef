"""The law of owners: nothing is written to an output but by the run that owns it now."""

from __future__ import annotations

import os
import shutil
import signal
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from distributed import Client, LocalCluster

from tests.commands import Commands, script, until
from tests.support import new_ledger, noise, read, right_to, write_unet, write_volume
from tilepipe.engines import dask
from tilepipe.geometry import Region
from tilepipe.options import Options
from tilepipe.runs.fence import FRESH, Fence, NotOwner
from tilepipe.runs.lease import Lease
from tilepipe.runs.ledger import Ledger
from tilepipe.segmentation.segment import segment
from tilepipe.storage.location import locate
from tilepipe.storage.names import LEDGER
from tilepipe.volumes.output import Output
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from distributed import Worker
    from numpy.typing import NDArray

    from tilepipe.segmentation.report import Report
    from tilepipe.storage.location import Place

EDGE, TILES = 64, 24
OPTIONS = Options(write="probabilities", tile=(EDGE, EDGE), chunks=(EDGE, EDGE), threads=1)
SIZES = ("--write", "probabilities", "--tile", "64,64", "--chunks", "64,64", "--threads", "1")
OTHER = "scale:0.001,0.5"
"""Grey values that give other answers, to a target of the same shape and type."""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 4 x 6 tiles that take a while each."""
    folder = tmp_path_factory.mktemp("owned")
    write_unet(folder / "net.pt", base=48, depth=2)
    write_volume(folder / "v.zarr", noise(4 * EDGE, 6 * EDGE), "yx", (EDGE, EDGE))
    for name, options in (("one", OPTIONS), ("other", replace(OPTIONS, normalize=OTHER))):
        run(folder, folder / name, options)
    assert not np.array_equal(read(folder / "one"), read(folder / "other"))
    return folder


def run(files: Path, target: Path, options: Options = OPTIONS, **more: object) -> Report:
    more.setdefault("engine", "dask" if "scheduler" in more else "serial")
    return segment(
        files / "v.zarr", model=files / "net.pt", output=target, options=options, **more  # type: ignore[arg-type]
    )  # fmt: skip


def command(files: Path, target: Path, *more: str) -> list[str]:
    named = ("--model", str(files / "net.pt"), "-o", str(target))
    return ["segment", str(files / "v.zarr"), *named, *SIZES, *more]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with dask.local_client(2, threads=2, dashboard=False) as client:
        yield client


@pytest.fixture(scope="module")
def in_one_process() -> Iterator[Client]:
    """Two workers in this process."""
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=1, processes=False, dashboard_address=None
        ) as started,
        Client(started, set_as_default=False) as client,
    ):
        yield client


def address_of(client: Client) -> str:
    return str(client.scheduler_info()["address"])


def busy(dask_worker: Worker) -> bool:
    """Whether a worker computes, be it for a run that is over."""
    return bool(dask_worker.active_threads)


def check_at_once(files: Path, folder: Path, address: str, **asked: Options) -> None:
    """Run several plans at once, each to the target of its name."""
    failures: list[BaseException] = []

    def follow(name: str, options: Options) -> None:
        try:
            run(files, folder / name, options, scheduler=address)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=follow, args=each) for each in asked.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    for name, options in asked.items():
        truth = "one" if options == OPTIONS else "other"
        assert np.array_equal(read(folder / name), read(files / truth)), name


def test_runs_at_once_on_one_scheduler_keep_apart(
    files: Path, cluster: Client, tmp_path: Path
) -> None:
    """They are alike but for their targets."""
    check_at_once(files, tmp_path, address_of(cluster), a=OPTIONS, b=OPTIONS)
    assert not any(cluster.run(plugins).values())


def test_a_run_whose_caller_fails_leaves_nothing_on_the_workers(
    files: Path, cluster: Client, tmp_path: Path
) -> None:
    def progress(report: object) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(files, tmp_path / "a", OPTIONS, scheduler=address_of(cluster), progress=progress)
    assert not any(cluster.run(plugins).values())


def plugins(dask_worker: Worker) -> list[str]:
    return [name for name in dask_worker.plugins if name.startswith("tilepipe-")]


def test_workers_in_one_process_keep_apart(
    files: Path, in_one_process: Client, tmp_path: Path
) -> None:
    other = replace(OPTIONS, normalize=OTHER)
    check_at_once(files, tmp_path, address_of(in_one_process), a=OPTIONS, b=other)


@pytest.mark.long
def test_two_commands_at_once_on_one_scheduler_keep_apart(
    files: Path, cluster: Client, tmp_path: Path
) -> None:
    where = ("--engine", "dask", "--scheduler", address_of(cluster))
    with (
        script(command(files, tmp_path / "a", *where)) as one,
        script(command(files, tmp_path / "b", *where)) as two,
    ):
        for process in (one, two):
            _, shown = process.communicate(timeout=120)
            assert process.returncode == 0, shown
    for name in ("a", "b"):
        assert np.array_equal(read(tmp_path / name), read(files / "one"))


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    started = Commands(tmp_path_factory.mktemp("commands"))
    with started.server as server:
        yield started
        assert server.stdin is not None
        server.stdin.close()


def marked(target: Path) -> int:
    path = target / LEDGER / "done"
    return path.stat().st_size // 13 if path.exists() else -1


def test_a_worker_that_was_stopped_in_mid_tile_writes_nothing_to_the_next_output(
    files: Path, commands: Commands, tmp_path: Path
) -> None:
    """Its driver is killed, the next run overwrites the output and ends, and then it goes on."""
    target = tmp_path / "o"
    with dask.local_client(1, threads=1, dashboard=False) as client:
        [worker] = client.run(os.getpid).values()
        where = ("--engine", "dask", "--scheduler", address_of(client))
        driver = commands.start(command(files, target, *where))
        until(lambda: marked(target) >= 2)
        os.kill(worker, signal.SIGSTOP)
        try:
            assert marked(target) < TILES
            os.kill(driver, signal.SIGKILL)
            assert commands.end()[0] == -signal.SIGKILL
            report = run(files, target, replace(OPTIONS, normalize=OTHER), overwrite=True)
            assert (report.done, report.unfinished) == (TILES, 0)
            assert np.array_equal(read(target), read(files / "other"))
        finally:
            os.kill(worker, signal.SIGCONT)
        until(lambda: not any(client.run(busy).values()))
        assert np.array_equal(read(target), read(files / "other"))


@pytest.mark.long
def test_a_driver_that_was_paused_writes_nothing_to_what_took_its_place(
    files: Path, commands: Commands, tmp_path: Path
) -> None:
    """Its output was removed meanwhile, and begun anew with other options."""
    target = tmp_path / "o"
    driver = commands.start(command(files, target, "--engine", "serial"))
    until(lambda: marked(target) >= 2)
    os.kill(driver, signal.SIGSTOP)
    try:
        assert marked(target) < TILES
        shutil.rmtree(target)
        assert run(files, target, replace(OPTIONS, normalize=OTHER)).unfinished == 0
    finally:
        os.kill(driver, signal.SIGCONT)
    code, shown = commands.end()
    assert code == 1, shown
    assert shown.splitlines()[-1].startswith("tilepipe: ")
    assert "nothing more is written" in shown.splitlines()[-1]
    assert np.array_equal(read(target), read(files / "other"))
    ledger = Ledger.open(Output.at(target), write=False)
    assert ledger is not None
    with ledger:
        assert ledger.done == TILES


def test_an_interrupted_run_leaves_no_writer_behind(
    files: Path, cluster: Client, commands: Commands, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    where = ("--engine", "dask", "--scheduler", address_of(cluster))
    driver = commands.start(command(files, target, *where))
    until(lambda: marked(target) >= 2)
    os.kill(driver, signal.SIGINT)
    assert commands.end()[0] == 130
    before = read(target)
    until(lambda: not any(cluster.run(busy).values()))
    assert np.array_equal(read(target), before)
    assert run(files, target).unfinished == 0
    assert np.array_equal(read(target), read(files / "one"))


@pytest.fixture
def output(folder: Place) -> str:
    """An output of each kind of place."""
    target = str(folder / "o.zarr")
    Output.at(target).create(
        axes="yx", shape=(8, 8), dtype="uint8", chunks=(4, 4), shards=None,
        scale=(1.0, 1.0), units=(None, None), attributes={},
    )  # fmt: skip
    return target


def stored(output: str) -> NDArray[np.generic]:
    volume = open_volume(output)
    return volume.read(Region.whole(volume.shape))[0]


def test_only_the_owner_writes(output: str) -> None:
    """A lease that is lost, taken over or given back ends the right to write."""
    part, voxels = Region((0, 0), (4, 4)), np.ones((4, 4), np.uint8)
    with right_to(output) as right:
        late = Output.at(output).open(guard=Fence(right))
        late.write(part, voxels)
    time.sleep(FRESH)
    with pytest.raises(NotOwner, match="is this run's no more; nothing more is written"):
        late.write(part, 2 * voxels)
    with right_to(output) as right:
        owner = Output.at(output).open(guard=Fence(right))
        owner.write(part, 3 * voxels)
        with pytest.raises(NotOwner, match=r"another run now .*process"):
            late.write(part, 2 * voxels)
    assert stored(output)[0, 0] == 3


def test_a_lease_is_looked_at_between_the_chunks_of_one_write(output: str) -> None:
    """One write of many chunks is ended, too."""
    with right_to(output) as right:
        fence = Fence(right)
        target = Output.at(output).open(guard=fence)
        target.write(Region((0, 0), (8, 8)), np.ones((8, 8), np.uint8))
        assert sorted(target._store._written) == []
    fence._fresh_until = time.monotonic() + 3600  # it looked just before it began to write
    fence._closed = True
    with pytest.raises(NotOwner):
        target._array[:] = 2
    assert np.all(stored(output) == 1)


def test_a_closed_fence_waits_for_the_write_that_has_begun(output: str) -> None:
    with right_to(output) as right:
        fence, order = Fence(right), list[str]()
        inside, go_on = threading.Event(), threading.Event()

        def write() -> None:
            with fence.writing():
                inside.set()
                go_on.wait()
                order.append("written")

        def close() -> None:
            fence.close()
            order.append("closed")

        writer, closer = threading.Thread(target=write), threading.Thread(target=close)
        writer.start()
        inside.wait()
        closer.start()
        time.sleep(0.05)
        go_on.set()
        writer.join()
        closer.join()
        assert order == ["written", "closed"]
        with pytest.raises(NotOwner), fence.writing():
            pass


def test_a_ledger_whose_lease_is_gone_enters_nothing(folder: Place) -> None:
    """Neither in a file nor, which could be written anew, in an object of a store."""
    target = str(folder / "o.zarr")
    ledger = new_ledger(target, {"identity": {}}, tiles=5)
    ledger.mark(0)
    lock = locate(target, "output") / LEDGER / "lock"
    lock.unlink()
    time.sleep(FRESH)
    with pytest.raises(NotOwner):
        ledger.mark(1)
    for path in list((locate(target, "output") / LEDGER).iterdir()):
        path.unlink()
    taken = Lease.take(lock)
    assert isinstance(taken, Lease)
    with closing(taken), pytest.raises(NotOwner):
        ledger.mark(2)
    with suppress(PermissionError):  # of a store, to which it may not add the rest
        ledger.close()
    names = {path.name for path in (locate(target, "output") / LEDGER).iterdir()}
    assert names <= {"done", "log"} or not names
