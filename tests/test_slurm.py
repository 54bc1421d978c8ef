"""Laws on a real SLURM: whatever it does to jobs, all tiles are done, with the same bytes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest

from tests import slurm_cluster
from tests.commands import HEEDING, ROOT
from tests.s3_server import SECRET
from tests.slurm_cluster import NODES, Slurm, ids, listeners, run, submit, until, workers
from tests.support import read, write_volume
from tests.test_remote import objects, voxels
from tests.test_resume import (
    ARGUMENTS,
    OPTIONS,
    TILES,
    Case,
    check_whole,
    chunk_files,
    make_case,
    marked,
)
from tests.test_train import discs
from tilepipe.engines import TileResult, slurm
from tilepipe.engines.jobs import Jobs
from tilepipe.engines.squeue import fate
from tilepipe.errors import TileError
from tilepipe.segmentation.segment import segment
from tilepipe.segmentation.slurm import log_folder
from tilepipe.testing.engines import FileJob, notes
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tilepipe.segmentation.report import Report

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.long,
    pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
]
JOBS = Jobs(partition="debug", cores=1, memory=1_500_000_000, poll=0.5, walltime="00:10:00")
CPU = replace(OPTIONS, device="cpu")
TILE, CHUNK = 128, 16
LARGE = ("--tile", f"{TILE},{TILE}", "--chunks", f"{CHUNK},{CHUNK}")
"""9 tiles of 64 chunks for each of two channels: a worker can be stopped while it writes one."""
OTHER = replace(CPU, tile=(TILE, TILE), chunks=(CHUNK, CHUNK), normalize="scale:0.001,0.5")
"""Grey values that give other answers."""


@pytest.fixture(scope="module")
def site() -> Iterator[Slurm]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_JOBQUEUE__SLURM__DEATH_TIMEOUT", "40")
        patch.setenv("OMP_NUM_THREADS", "1")
        with slurm_cluster.cluster() as cluster:
            yield cluster


@pytest.fixture(autouse=True)
def _clean(site: Slurm) -> Iterator[None]:
    """Leave nothing in the queue for the next test."""
    yield
    run("scancel", "--user", "root")
    until(lambda: not ids() and slurm_cluster.ready() == len(NODES))


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(tmp_path_factory.mktemp("case"), base=4)


def on_slurm(
    case: Case,
    target: Path | str,
    jobs: Jobs = JOBS,
    progress: Callable[[Report], None] | None = None,
) -> Report:
    return segment(
        case.source,
        model=case.model,
        output=target,
        options=CPU,
        engine="slurm",
        jobs=jobs,
        progress=progress,
    )


def at(tiles: int, act: Callable[[], object]) -> Callable[[Report], None]:
    """Do something once, when so many tiles are done."""

    def progress(report: Report) -> None:
        if report.done == tiles:
            act()

    return progress


def submitted(target: Path) -> int:
    """Return how many jobs have run."""
    return len(list(log_folder(Output.at(target)).glob("*.out")))


def logs(target: Path | str) -> str:
    return "\n".join(
        path.read_text() for path in sorted(log_folder(Output.at(target)).glob("*.out"))
    )


def test_jobs_of_one_gpu_each_give_the_same_bytes(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "target.zarr"
    listening = set[str]()
    seen = at(4, lambda: listening.update(listeners()))
    report = on_slurm(case, target, replace(JOBS, jobs=(2, 2), gpus=1, tls=True), seen)
    check_whole(target, case)
    assert (report.done, report.failures) == (TILES, [])
    told = logs(target)
    assert set(re.findall(r"worker job-\d of job \d+ on .*, GPU (.*), \d+ s left", told)) == {
        "0",
        "1",
    }
    assert len(re.findall(r"tile \d+, voxels .*: .* s", told)) >= TILES
    assert "tls://127.0.0.1" in told
    assert "PRIVATE" not in told
    assert listening
    assert listening <= {"127.0.0.1"}
    assert not list(log_folder(Output.at(target)).glob(".*"))
    until(lambda: not ids())


def test_jobs_write_to_a_bucket(
    case: Case, prefix: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Credentials are in the environment, as SLURM hands it on, and in nothing that is written."""
    monkeypatch.chdir(tmp_path)  # where jobs of such an output write their logs
    target = prefix() + "/target.zarr"
    cancel = at(4, lambda: run("scancel", *ids()[:1]))
    report = on_slurm(case, target, replace(JOBS, jobs=(2, 2)), cancel)
    assert (report.done, report.failures) == (TILES, [])
    assert voxels(objects(target)) == case.chunks
    [folder] = tmp_path.iterdir()
    assert folder == log_folder(Output.at(target))
    assert len(re.findall(r"tile \d+, voxels .*: .* s", logs(target))) >= TILES
    kept = [path.read_bytes() for path in folder.iterdir()] + [*objects(target).values()]
    assert not any(SECRET.encode() in content for content in kept)


@pytest.mark.parametrize("number", [1, 2])
def test_jobs_that_are_cancelled_are_replaced(case: Case, tmp_path: Path, number: int) -> None:
    target, before = tmp_path / "target.zarr", list[str]()

    def cancel() -> None:
        before.extend(ids())
        run("scancel", *before)
        until(lambda: not set(before) & set(ids()))

    report = on_slurm(case, target, replace(JOBS, jobs=(number, number)), at(4, cancel))
    check_whole(target, case)
    assert len(before) == number
    assert report.failures == []


@pytest.mark.parametrize(
    ("partition", "directives"),
    [("cancelled", ()), ("requeued", ()), ("requeued", ("--requeue",))],
)
def test_jobs_that_are_preempted_are_replaced(
    case: Case, tmp_path: Path, partition: str, directives: tuple[str, ...]
) -> None:
    target, before, seen = tmp_path / "target.zarr", list[str](), list[int]()

    def preempt() -> None:
        before.extend(ids())
        whole = ("--nodes", "2", "--exclusive", "--time", "5", "--output", "/dev/null")
        run("sbatch", "--partition", "urgent", *whole, "--wrap", "sleep 2")
        until(lambda: not set(before) & set(ids("running")))
        if "--requeue" in directives:
            until(lambda: not set(before) & (set(ids()) - set(ids("pending"))))
            for job in set(before) & set(ids("pending")):  # not in two minutes
                run("scontrol", "update", f"JobId={job}", "StartTime=now")

    def progress(report: Report) -> None:
        at(4, preempt)(report)
        seen.append(len(run("squeue", "--noheader", "--partition", partition).splitlines()))

    jobs = replace(JOBS, jobs=(2, 2), partition=partition, directives=directives)
    report = on_slurm(case, target, jobs, progress)
    check_whole(target, case)
    assert len(before) == 2
    assert max(seen) <= 2
    assert report.failures == []
    assert directives or submitted(target) == 4


def test_a_worker_that_is_killed_comes_again(case: Case, tmp_path: Path) -> None:
    target, killed = tmp_path / "target.zarr", list[int]()

    def kill() -> None:
        for worker in workers():
            killed.append(worker.pid)
            worker.kill()

    on_slurm(case, target, JOBS, at(4, kill))
    check_whole(target, case)
    assert len(killed) == 1
    assert submitted(target) == 1


def test_a_node_that_is_lost_is_done_without(case: Case, tmp_path: Path, site: Slurm) -> None:
    target, lost = tmp_path / "target.zarr", list[str]()

    def lose() -> None:
        lost.extend(run("squeue", "--noheader", "--format", "%N").split())
        site.lose_node(lost[0])

    try:
        on_slurm(case, target, JOBS, at(4, lose))
    finally:
        site.start_node(lost[0])
    check_whole(target, case)


def test_a_node_whose_daemon_is_killed_is_done_without(
    case: Case, tmp_path: Path, site: Slurm
) -> None:
    """Its job's processes live on; SLURM calls the job lost in the end, and another is made."""
    target, lost = tmp_path / "target.zarr", list[str]()

    def kill() -> None:
        lost.extend(run("squeue", "--noheader", "--format", "%i %N").split())
        site.kill_daemon(lost[1])
        assert len(workers()) == 1
        until(lambda: "worker job-2" in logs(target))

    with site.impatient():
        try:
            on_slurm(case, target, JOBS, at(4, kill))
        finally:
            site.start_node(lost[1])
            until(lambda: slurm_cluster.ready() == len(NODES))
    check_whole(target, case)
    assert fate(lost[0]) == "NODE_FAIL"
    until(lambda: not workers())


def test_the_driver_may_die(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "target.zarr"
    command = slurm_command(case, target)
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until(lambda: marked(target) >= 4)
    driver.kill()
    driver.wait()
    assert 4 <= marked(target) < TILES
    assert ids("running")
    until(lambda: not ids())  # orphans end by themselves
    assert "CANCELLED" not in logs(target)
    ended = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=False)
    assert ended.returncode == 0
    check_whole(target, case)


def slurm_command(case: Case, target: Path, *more: str) -> list[str]:
    tilepipe = str(Path(sys.executable).with_name("tilepipe"))
    where = ("--model", str(case.model), "-o", str(target), *ARGUMENTS, "--threads", "1")
    asked = ("--engine", "slurm", "--cores", "1", "--job-memory", "1500MB", *more)
    return [tilepipe, "segment", str(case.source), *where, *asked]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_driver_takes_its_jobs_along(
    case: Case, tmp_path: Path, number: signal.Signals
) -> None:
    target = tmp_path / "target.zarr"
    command = [sys.executable, "-c", HEEDING, *slurm_command(case, target)]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    until(lambda: marked(target) >= 1)
    driver.send_signal(number)
    assert driver.wait(30) == 130
    until(lambda: not ids("running,pending"))
    on_slurm(case, target)
    check_whole(target, case)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--partition", "nowhere"), "Invalid partition name specified"),
        (("--directive", "--gres=gpu:9"), "Requested node configuration is not available"),
        (("--interface", "nope0"), "interface (=nope0) must be one of this machine"),
    ],
)
def test_what_slurm_refuses_is_a_line_in_its_own_words(
    case: Case, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    target = tmp_path / "target.zarr"
    command = slurm_command(case, target, *more)
    ended = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1
    assert not target.exists()


def test_what_is_waited_for_is_said(
    case: Case, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    target = tmp_path / "target.zarr"
    whole = ("--nodes", "2", "--exclusive", "--time", "5", "--output", "/dev/null")
    run("sbatch", *whole, "--wrap", "sleep 300")
    until(lambda: len(ids("running")) == 1)
    blocker = ids()

    def free() -> None:
        until(lambda: "waiting for workers (1 pending: Resources)" in caplog.text)
        run("scancel", *blocker)

    thread = threading.Thread(target=free)
    thread.start()
    on_slurm(case, target)
    thread.join()
    check_whole(target, case)


def test_jobs_that_end_at_once_are_given_up(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "target.zarr"
    with pytest.raises(TileError, match=r"before a tile is done .*no-such-python"):
        on_slurm(case, target, replace(JOBS, python="/no-such-python"))
    on_slurm(case, target)
    check_whole(target, case)


def test_a_plan_shows_the_job(case: Case, tmp_path: Path) -> None:
    file = tmp_path / "slurm.toml"
    file.write_text('walltime = "00:07:00"\nprologue = ["echo hello"]\nrate = 1e9\ngpus = 1\n')
    target = tmp_path / "target.zarr"
    command = slurm_command(case, target, "--cluster", str(file), "--device", "cpu", "--json")
    command[1] = "plan"
    shown = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, check=True
    )
    found = json.loads(shown.stdout)
    script = found["slurm"]["script"]
    for line in ("#SBATCH -t 00:07:00", "--gres=gpu:1", "\necho hello\n", "--no-requeue"):
        assert line in script
    assert found["slurm"]["worker_hours"] == found["costs"]["multiply_adds"] / 1e9 / 3600
    assert not target.exists()
    until(lambda: not ids())


SCRIPTS = ROOT / "workflows" / "slurm"


@pytest.mark.parametrize(
    ("script", "asked", "more"),
    [
        ("segment.sbatch", (), ("--threads", "1", "--jobs", "2")),
        ("array.sbatch", ("--array=1-3", "--cpus-per-task=1", "--mem=1500M"), ()),
    ],
)
def test_recipes(
    case: Case, tmp_path: Path, script: str, asked: tuple[str, ...], more: tuple[str, ...]
) -> None:
    target = tmp_path / "target.zarr"
    site = (SCRIPTS / "site.toml").read_text().replace('"8GB"', '"1500MB"')
    (tmp_path / "site.toml").write_text(site.replace("cores = 4", "cores = 1"))
    where = (str(SCRIPTS / script), str(case.source), str(case.model), str(target))
    code, said = submit(tmp_path, *asked, *where, *ARGUMENTS, *more)
    assert code == 0, said
    check_whole(target, case)


def test_a_driver_whose_time_is_over_takes_its_jobs_along(case: Case, tmp_path: Path) -> None:
    target = tmp_path / "target.zarr"
    (tmp_path / "site.toml").write_text('job-memory = "1500MB"\ncores = 1\n')
    script = (str(SCRIPTS / "segment.sbatch"), str(case.source), str(case.model), str(target))
    found = list[tuple[int, str]]()
    more = (*script, *ARGUMENTS, "--threads", "1")
    thread = threading.Thread(target=lambda: found.append(submit(tmp_path, *more)))
    thread.start()
    until(lambda: marked(target) >= 0 and len(ids("running")) == 2)
    run("scancel", "--batch", "--signal", "TERM", "--name", "tilepipe-driver")
    thread.join()
    assert found[0][0] == 130, found
    assert "interrupted" in found[0][1]
    until(lambda: not ids())
    code, said = submit(tmp_path, *more)
    assert code == 0, said
    check_whole(target, case)


def test_a_driver_that_is_put_back_into_the_queue_goes_on(case: Case, tmp_path: Path) -> None:
    target, done = tmp_path / "target.zarr", list[int]()
    (tmp_path / "site.toml").write_text('job-memory = "1500MB"\ncores = 1\n')
    script = (str(SCRIPTS / "segment.sbatch"), str(case.source), str(case.model), str(target))

    def put_back() -> None:
        until(lambda: marked(target) >= 4)
        driver = run("squeue", "--noheader", "--name", "tilepipe-driver", "--format", "%i")
        run("scontrol", "requeue", driver)
        until(lambda: driver in ids("pending"))
        done.append(marked(target))
        run("scontrol", "update", f"JobId={driver}", "StartTime=now")

    thread = threading.Thread(target=put_back)
    thread.start()
    code, said = submit(tmp_path, *script, *ARGUMENTS, "--threads", "1")
    thread.join()
    assert code == 0, said
    assert 4 <= done[0] < TILES
    check_whole(target, case)


@pytest.fixture(scope="module")
def truth(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one undisturbed serial run with `OTHER` makes."""
    target = tmp_path_factory.mktemp("truth") / "truth.zarr"
    segment(case.source, model=case.model, output=target, options=OTHER, engine="serial")
    return target


@contextmanager
def out_of_reach(site: Slurm, node: str) -> Iterator[None]:
    """Let a node answer SLURM no more: what runs there runs on, and cannot be cancelled."""
    site.kill_daemon(node)
    try:
        yield
    finally:
        run("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=no answer")
        site.start_node(node)
        until(lambda: slurm_cluster.ready() == len(NODES))


def stop_in_mid_tile(target: Path) -> psutil.Process:
    """Stop the worker while at least half of the chunks of a tile are still to be written."""
    until(lambda: len(workers()) == 1 and marked(target) >= 1)
    [worker] = workers()
    folder = target / "0" / "c"
    while True:
        worker.suspend()
        until(lambda: worker.status() == psutil.STATUS_STOPPED)
        written = Counter(
            (int(path.parent.name) * CHUNK // TILE, int(path.name) * CHUNK // TILE)
            for path in folder.glob("*/*/*")
            if path.suffix != ".partial"
        )
        if any(number < (TILE // CHUNK) ** 2 for number in written.values()):
            return worker
        worker.resume()
        time.sleep(0.003)


def check_late(case: Case, target: Path, worker: psutil.Process, truth: Path) -> None:
    """Overwrite what a stopped worker was writing to, let it go on then: it changes nothing."""
    report = segment(
        case.source, model=case.model, output=target, options=OTHER, engine="serial", overwrite=True
    )
    assert (report.done, report.unfinished, report.failures) == (9, 0, [])
    before = files(target)
    assert Output.at(target).read_attributes()["state"] == "done"
    assert worker.status() == psutil.STATUS_STOPPED
    worker.resume()
    until(lambda: not workers())
    assert np.count_nonzero(read(target) != read(truth)) == 0
    assert chunk_files(target) == chunk_files(truth)
    assert files(target) == before


def files(target: Path) -> dict[str, bytes]:
    """Return the bytes of every file of an output; leftovers of killed writers aside."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in target.rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }


@pytest.mark.parametrize("more", [(), ("--full", "--signal", "KILL")], ids=["ended", "killed"])
def test_a_worker_that_outlives_its_cancelled_driver_writes_nothing_to_the_next_output(
    case: Case, truth: Path, tmp_path: Path, site: Slurm, more: tuple[str, ...]
) -> None:
    """The driver is a job, and cancels its worker's, whose node does not answer."""
    target = tmp_path / "target.zarr"
    (tmp_path / "site.toml").write_text(
        'job-memory = "1500MB"\ncores = 1\ndirectives = ["--nodelist=n2"]\n'
    )
    script = (str(SCRIPTS / "segment.sbatch"), str(case.source), str(case.model), str(target))
    asked = ("--nodelist=n1", *script, *ARGUMENTS, *LARGE, "--threads", "1")
    thread = threading.Thread(target=submit, args=(tmp_path, *asked))
    thread.start()
    worker = stop_in_mid_tile(target)
    assert marked(target) < 9
    [driver] = run("squeue", "--noheader", "--name", "tilepipe-driver", "--format", "%i").split()
    with out_of_reach(site, "n2"):
        run("scancel", *more, driver)
        until(lambda: driver not in ids())
        check_late(case, target, worker, truth)
    thread.join()


def test_a_worker_that_outlives_its_cancelled_job_is_done_without_and_writes_nothing_late(
    case: Case, truth: Path, tmp_path: Path, site: Slurm
) -> None:
    """It hangs with its node: neither `scancel` reaches it nor the driver."""
    target = tmp_path / "target.zarr"
    (tmp_path / "site.toml").write_text("poll = 0.5\n")
    command = slurm_command(case, target, *LARGE, "--cluster", str(tmp_path / "site.toml"))
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT)})
    try:
        worker = stop_in_mid_tile(target)
        assert marked(target) < 9
        job, node = run("squeue", "--noheader", "--format", "%i %N").split()
        with out_of_reach(site, node):
            run("scancel", job)
            assert driver.wait(120) == 0
            assert fate(job) == "CANCELLED"
            check_late(case, target, worker, truth)
    finally:
        driver.kill()
        driver.wait()


@pytest.mark.parametrize(("script", "gpus"), [("train.sbatch", 1), ("train-multi.sbatch", 2)])
def test_training_is_a_job(tmp_path: Path, script: str, gpus: int) -> None:
    image, labels = discs(4, 80, 90)
    for name, array in (("image", image), ("labels", labels)):
        write_volume(tmp_path / f"{name}.zarr", array, "zyx", (1, 40, 45))
    said = ("--target", "mask", "--ndim", "2", "--base", "2", "--depth", "2", "--patch", "24,24")
    told = ("--elastic", "2", "--threads", "1", "--batch", "2", "--device", "cpu")
    small = ("--mem", "3G", "--cpus-per-task", "2", f"--gres=gpu:{gpus}")
    sources = (str(tmp_path / "image.zarr"), str(tmp_path / "labels.zarr"))
    train = (*small, str(SCRIPTS / script), *sources, str(tmp_path / "net.pt"), *said, *told)
    code, log = submit(tmp_path, *train, "--steps", "4")
    assert code == 0, log
    assert (tmp_path / "net.pt").exists()
    code, log = submit(tmp_path, *train, "--steps", "6")  # goes on
    assert code == 0, log
    assert "6 steps" in log


def on_fleet(job: FileJob, tiles: int, jobs: Jobs) -> list[TileResult]:
    """Run tiles that are files, without a network."""
    folder = Path(job.folder)
    (folder / "jobs").mkdir()
    with slurm.fleet(
        jobs, name="tilepipe-test", folder=folder / "jobs", slots=job.slots, left=tiles
    ) as f:
        found = list(slurm.run(job, range(tiles), fleet=f))
    assert sorted(outcome.index for outcome in found) == list(range(tiles))
    assert all(isinstance(outcome, TileResult) for outcome in found)
    return [outcome for outcome in found if isinstance(outcome, TileResult)]


def test_no_tile_is_lost_to_a_walltime(tmp_path: Path) -> None:
    """Work of more than a walltime on one job at a time."""
    tiles = 50
    job = FileJob(str(tmp_path), seconds=3.0)
    on_fleet(job, tiles, replace(JOBS, walltime="00:01:00"))
    assert sorted(map(int, notes(tmp_path, "done"))) == list(range(tiles))  # each once
    told = [path.read_text() for path in (tmp_path / "jobs").glob("*.out")]
    assert len(told) >= 2
    assert not any("TIME LIMIT" in text for text in told)


def test_idle_jobs_are_let_go(tmp_path: Path) -> None:
    job = FileJob(str(tmp_path), seconds=8.0, slots=1)
    seen = list[int]()
    end = threading.Event()

    def watch() -> None:
        while not end.wait(0.2):
            seen.append(len(ids("running,pending")))

    thread = threading.Thread(target=watch)
    thread.start()
    on_fleet(job, 5, replace(JOBS, jobs=(1, 4)))
    end.set()
    thread.join()
    assert max(seen) == 4, seen
    assert 1 in seen[seen.index(4) :]
