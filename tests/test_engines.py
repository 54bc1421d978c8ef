"""One body of laws over all engines: every tile has exactly one outcome, come what may."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from dask import config
from distributed import SpecCluster

from tests.commands import words
from tests.support import new_ledger
from tilepipe.engines import RETRIES, TileFailure, TileResult, dask, serial
from tilepipe.engines.attempts import Back, Failed
from tilepipe.engines.batches import MOST, of_each
from tilepipe.engines.batches import SPAN as SPAN_OF_BATCH
from tilepipe.engines.plugin import plugin_name
from tilepipe.engines.walltime import SPAN, SPARE
from tilepipe.errors import BadRequest, TileError
from tilepipe.testing.engines import FileJob, check_engine, notes, outcomes_by_index

if TYPE_CHECKING:
    from collections.abc import Iterator

    from distributed import Client, Worker

    from tilepipe.engines.batches import Ended
    from tilepipe.testing.engines import Engine

WORKERS, THREADS = 2, 3
WINDOW = 2 * WORKERS * THREADS
"""Tiles that an engine may have taken and not yet answered for."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Client]:
    with dask.local_client(WORKERS, threads=THREADS, dashboard=False) as client:
        yield client


def address_of(client: Client) -> str:
    return str(client.scheduler_info()["address"])


@pytest.fixture(params=["serial", "dask", "existing"])
def run(request: pytest.FixtureRequest) -> Iterator[Engine]:
    """Each engine in turn."""
    if request.param == "serial":
        yield serial.run
        return
    local: Client = request.getfixturevalue("cluster")
    local.wait_for_workers(WORKERS)  # one may have been killed by a test before
    if request.param == "dask":
        yield partial(dask.run, client=local)
        return
    with dask.existing_client(address_of(local)) as client:
        yield partial(dask.run, client=client)


def test_every_tile_has_one_outcome(run: Engine, tmp_path: Path) -> None:
    tiles = [*range(50, 5, -1)]
    found = outcomes_by_index(run(FileJob(str(tmp_path)), tiles))
    assert sorted(found) == sorted(tiles)
    assert Counter(map(int, notes(tmp_path, "done"))) == Counter(tiles)
    for outcome in found.values():
        assert isinstance(outcome, TileResult)
        assert outcome.worker in notes(tmp_path, "opened")
        assert (outcome.voxels, outcome.write_seconds) == (8, 0.3)


def test_no_tiles_have_no_outcome(run: Engine, tmp_path: Path) -> None:
    assert [*run(FileJob(str(tmp_path)), [])] == []


@pytest.mark.parametrize("retries", [0, 1, RETRIES])
def test_what_fails_is_tried_again_and_then_set_aside(
    run: Engine, tmp_path: Path, retries: int
) -> None:
    check_engine(run, tmp_path, retries=retries)


@pytest.mark.parametrize(("seconds", "batch"), [(0.0, MOST), (0.11, 1)])
def test_tiles_are_taken_as_they_are_needed(
    run: Engine, tmp_path: Path, seconds: float, batch: int
) -> None:
    taken: list[int] = []

    def tiles() -> Iterator[int]:
        for index in range(60):
            taken.append(index)
            yield index

    answered, window = 0, WINDOW * (1 if run is serial.run else batch)
    job = FileJob(str(tmp_path), always=(5, 6, 7), once=(20, 21), seconds=seconds)
    for _ in run(job, tiles()):
        assert len(taken) - answered <= window
        answered += 1
        if answered % 20 == 0:
            time.sleep(0.1)  # a slow consumer
    assert answered == len(taken) == 60


@pytest.mark.parametrize("slots", [1, 2])
def test_a_process_opens_the_job_once_and_holds_no_more_tiles_than_slots(
    run: Engine, tmp_path: Path, slots: int
) -> None:
    outcomes_by_index(run(FileJob(str(tmp_path), slots=slots, seconds=0.01), range(30)))
    opened = notes(tmp_path, "opened")
    assert 1 <= len(opened) <= WORKERS
    assert len(opened) == len(set(opened))
    assert max(map(int, notes(tmp_path, "running"))) == slots


def test_a_job_that_cannot_be_opened_is_no_failure_of_tiles(run: Engine, tmp_path: Path) -> None:
    with pytest.raises(TileError, match=r"cannot begin: OSError: no such model$"):
        outcomes_by_index(run(FileJob(str(tmp_path), broken=True), range(30)))


def test_the_same_job_is_run_again(run: Engine, tmp_path: Path) -> None:
    for _ in range(2):
        assert sorted(outcomes_by_index(run(FileJob(str(tmp_path)), range(10)))) == [*range(10)]
    assert len(notes(tmp_path, "done")) == 20


def test_closed_early_it_begins_no_others_and_lets_the_job_go(
    run: Engine, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    job = FileJob(str(tmp_path), seconds=0.05)
    outcomes = run(job, range(1000))
    first = [next(outcomes).index for _ in range(5)]
    outcomes.close()  # type: ignore[attr-defined]
    time.sleep(0.2)
    begun = len(notes(tmp_path, "running"))
    assert len(first) <= begun <= len(first) + WINDOW
    time.sleep(0.2)
    assert len(notes(tmp_path, "running")) == begun
    if run is not serial.run:
        cluster: Client = request.getfixturevalue("cluster")
        assert not any(cluster.run(held, job.key).values())
    assert sorted(outcomes_by_index(run(job, range(9)))) == [*range(9)]


def held(key: str, dask_worker: Worker) -> bool:
    """Whether a worker still holds a job."""
    return plugin_name(key) in dask_worker.plugins


def test_a_worker_that_dies_costs_an_attempt(cluster: Client, tmp_path: Path) -> None:
    job = FileJob(str(tmp_path), killing=(6,), seconds=0.01)
    found = outcomes_by_index(dask.run(job, range(40), client=cluster))
    assert sorted(found) == [*range(40)]
    assert all(isinstance(outcome, TileResult) for outcome in found.values())
    assert {*map(int, notes(tmp_path, "done"))} == {*range(40)}
    assert (tmp_path / "tried-6").exists()


def test_a_tile_that_always_kills_its_worker_is_set_aside_alone(
    cluster: Client, tmp_path: Path
) -> None:
    job = FileJob(str(tmp_path), deadly=(6,), seconds=0.01)
    found = outcomes_by_index(dask.run(job, range(40), client=cluster))
    assert sorted(found) == [*range(40)]
    failures = [outcome for outcome in found.values() if isinstance(outcome, TileFailure)]
    assert [(failure.index, failure.attempts) for failure in failures] == [(6, RETRIES + 1)]
    assert "died" in failures[0].cause
    assert 0 <= len(notes(tmp_path, "deaths")) - (RETRIES + 1) <= 1  # once in a batch, perhaps


def test_a_tile_that_kills_its_worker_in_mid_batch_is_set_aside_alone(
    cluster: Client, tmp_path: Path
) -> None:
    job, tiles = FileJob(str(tmp_path), deadly=(200,), seconds=0.002), 300
    with new_ledger(tmp_path / "target", {}, tiles=tiles) as ledger:
        found = outcomes_by_index(dask.run(job, ledger.remaining(), client=cluster))
        for outcome in found.values():
            if isinstance(outcome, TileResult):
                ledger.mark(outcome.index, outcome)
        assert [*ledger.remaining()] == [200]
    failed = found.pop(200)
    assert isinstance(failed, TileFailure)
    assert failed.attempts == RETRIES + 1
    assert 0 <= len(notes(tmp_path, "deaths")) - (RETRIES + 1) <= 1
    again = Counter(map(int, notes(tmp_path, "done")))
    assert {*again} == {*range(tiles)} - {200}
    # One that was hit beside it each time that it may be, and done at the last attempt.
    assert max(outcome.attempts for outcome in found.values()) <= RETRIES + 1
    assert sum(outcome.attempts > 1 for outcome in found.values()) < MOST


def test_a_batch_gives_back_what_takes_longer_than_thought(
    cluster: Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.wait_for_workers(WORKERS)  # one may have been killed by a test before
    slow = 200
    job, tiles = FileJob(str(tmp_path), since=slow, seconds=1.5 * SPAN_OF_BATCH), slow + 2 * MOST
    done, given_back = list[list[int]](), list[int]()

    def watched(
        batch: tuple[int, ...], ended: Ended | Failed | Back
    ) -> Iterator[tuple[int, TileResult | Failed | Back]]:
        outcomes = [*of_each(batch, ended)]
        done.append([index for index, outcome in outcomes if isinstance(outcome, TileResult)])
        given_back.extend(index for index, outcome in outcomes if isinstance(outcome, Back))
        return iter(outcomes)

    monkeypatch.setattr(dask, "of_each", watched)
    found = outcomes_by_index(dask.run(job, range(tiles), client=cluster))
    assert all(index < slow for batch in done for index in batch[:-1])  # a slow tile is its last
    assert any(index > slow for index in given_back)
    assert sorted(found) == [*range(tiles)]
    assert {*Counter(notes(tmp_path, "done")).values()} == {1}
    assert {outcome.attempts for outcome in found.values()} == {1}


@pytest.mark.long
def test_a_batch_is_cut_short_where_the_walltime_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiles, now = 500, time.time()
    monkeypatch.setenv(SPAN, f"{now}:{now + SPARE + 4}")
    with (
        config.set({"distributed.deploy.lost-worker-timeout": "100ms"}),
        dask.local_client(1, threads=2, dashboard=False) as client,
    ):
        monkeypatch.delenv(SPAN)  # the worker that comes next has time
        job = FileJob(str(tmp_path), seconds=0.02)
        found = outcomes_by_index(dask.run(job, range(tiles), client=client))
    assert sorted(found) == [*range(tiles)]
    assert {outcome.attempts for outcome in found.values()} == {1}
    assert {*Counter(notes(tmp_path, "done")).values()} == {1}
    assert len(notes(tmp_path, "opened")) == 2


def test_a_worker_that_its_nanny_gave_up_is_started_again(tmp_path: Path) -> None:
    names = ("OMP_NUM_THREADS", "MALLOC_TRIM_THRESHOLD_", "PYTHONHASHSEED")
    before = [os.environ.get(name) for name in names]
    with (
        config.set({"distributed.deploy.lost-worker-timeout": "100ms"}),
        dask.local_client(1, threads=2, dashboard=False) as client,
    ):
        assert dask.dashboard_address(client) is None
        assert isinstance(client.cluster, SpecCluster)
        client.cluster.sync(client.cluster.workers[0].close)
        job = FileJob(str(tmp_path))
        assert sorted(outcomes_by_index(dask.run(job, range(5), client=client))) == [*range(5)]
    assert [os.environ.get(name) for name in names] == before


SCRIPT = """
from tilepipe.engines import dask
from tilepipe.testing.engines import FileJob, outcomes_by_index
print("run")
with dask.local_client(1, threads=2) as client:
    print(len(outcomes_by_index(dask.run(FileJob({folder!r}), range(7), client=client))))
"""


def test_a_script_needs_no_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(tmp_path)))
    root = str(Path(__file__).parent.parent)
    ended = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": root},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (ended.stdout, words(ended.stderr)) == ("run\n7\n", "")


def test_workers_without_the_package_are_named(cluster: Client, tmp_path: Path) -> None:
    (tmp_path / "tilepipe").mkdir()
    (tmp_path / "tilepipe" / "__init__.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-m", "distributed.cli.dask_worker", address_of(cluster)]
    command += ["--host", "127.0.0.1", "--no-nanny", "--no-dashboard", "--nthreads", "1"]
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, env=env, cwd=tmp_path, stderr=subprocess.DEVNULL) as worker:
        try:
            cluster.wait_for_workers(WORKERS + 1, timeout=30)
            with pytest.raises(BadRequest, match=r"same tilepipe .*not here"):
                outcomes_by_index(dask.run(FileJob(str(tmp_path)), range(3), client=cluster))
        finally:
            worker.terminate()
    found = outcomes_by_index(dask.run(FileJob(str(tmp_path)), range(3), client=cluster))
    assert sorted(found) == [0, 1, 2]


def test_a_local_cluster_is_reachable_from_this_machine_alone(cluster: Client) -> None:
    cluster.wait_for_workers(WORKERS)
    this = psutil.Process()
    pids = cluster.run(os.getpid)
    assert len({*pids.values()} - {this.pid}) == WORKERS
    processes = [this, *this.children(recursive=True)]
    assert {*pids.values()} <= {process.pid for process in processes}
    listening = [
        (connection.laddr.ip, process.pid)
        for process in processes
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {pid for _, pid in listening} >= {this.pid, *pids.values()}
    assert {ip for ip, _ in listening} == {"127.0.0.1"}


def test_each_worker_sees_one_gpu_from_before_torch_is_imported() -> None:
    def seen() -> tuple[str | None, bool]:
        return os.environ.get("CUDA_VISIBLE_DEVICES"), "torch" in sys.modules

    with dask.local_client(1, threads=1, gpus=["3", "5"], dashboard=False) as client:
        client.wait_for_workers(2)
        assert sorted(client.run(seen).values()) == [("3", False), ("5", False)]


SERVER = """
import time
from tilepipe.engines.dask import local_client

if __name__ == "__main__":
    with local_client(1, threads=2, dashboard=False) as client:
        print(client.scheduler_info()["address"], flush=True)
        time.sleep(60)
"""


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """A cluster in a process group of its own, with the scheduler's address."""
    (tmp_path / "server.py").write_text(SERVER)
    command = [sys.executable, str(tmp_path / "server.py")]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, env=env, start_new_session=True
    ) as process:
        try:
            assert process.stdout is not None
            yield process.stdout.readline().strip(), process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.long
def test_a_scheduler_elsewhere_is_left_as_it_is_and_missed_when_it_is_gone(
    server: tuple[str, subprocess.Popen[str]], tmp_path: Path
) -> None:
    address, process = server
    job = FileJob(str(tmp_path), seconds=0.02)
    for _ in range(2):
        with dask.existing_client(address) as client:
            assert sorted(outcomes_by_index(dask.run(job, range(9), client=client))) == [*range(9)]
    with dask.existing_client(address) as client:
        assert not any(client.run(held, job.key).values())
        outcomes = dask.run(job, range(1000), client=client)
        assert isinstance(next(outcomes), TileResult)
        os.killpg(process.pid, signal.SIGKILL)
        with pytest.raises(TileError, match="the scheduler is gone") as caught:
            assert all(isinstance(outcome, TileResult) for outcome in outcomes)
        assert "\n" not in str(caught.value)


ODD = ["nonsense", "ftp://127.0.0.1:80", "127.0.0.1:99999", "", "x:y", "tls://127.0.0.1:1"]


@pytest.mark.parametrize("address", ODD)
def test_an_address_that_is_none_is_refused(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "TIMEOUT", 1)
    refuse(address)


def test_a_worker_is_no_scheduler(cluster: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dask, "TIMEOUT", 1)
    refuse(next(iter(cluster.run(held, ""))))


def test_a_scheduler_that_does_not_answer_is_refused_in_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dask, "TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        refuse(f"tcp://127.0.0.1:{port}")
    refuse(f"tcp://127.0.0.1:{port}")


def refuse(address: str) -> None:
    began = time.monotonic()
    rule = r"^scheduler \(=.*\) must be a Dask scheduler that answers within 1 s: "
    with pytest.raises(BadRequest, match=rule) as caught, dask.existing_client(address):
        pass
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 4


def test_a_worker_that_hangs_keeps_no_run_from_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is interrupted waits for its workers to let the job go, but not for ever."""
    monkeypatch.setattr(dask, "LET_GO", 1.0)
    with dask.local_client(1, threads=2, dashboard=False) as client:
        [worker] = client.run(os.getpid).values()
        outcomes = dask.run(FileJob(str(tmp_path), seconds=0.1), range(50), client=client)
        next(outcomes)
        os.kill(worker, signal.SIGSTOP)
        try:
            began = time.monotonic()
            outcomes.close()
            assert 1 <= time.monotonic() - began < 20
        finally:
            os.kill(worker, signal.SIGCONT)
