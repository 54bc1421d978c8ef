"""Laws of arrays: tasks that share an output, whenever they run and die, give the serial bytes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import closing, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.commands import ROOT, WAIT, until
from tests.support import noise, write_unet, write_volume
from tilepipe.cli import main
from tilepipe.commands.inspect import describe_file
from tilepipe.errors import BadRequest, TileError
from tilepipe.options import Options
from tilepipe.runs import lease
from tilepipe.runs.array import ArrayTask
from tilepipe.runs.lease import Lease, Owner, living
from tilepipe.runs.ledger import Ledger
from tilepipe.segmentation.segment import plan_segment, segment
from tilepipe.storage.location import find
from tilepipe.storage.location import replace as replace_file
from tilepipe.storage.names import LEDGER
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tilepipe.storage.location import Place

EDGE, TILES, TASKS = 64, 36, 3
SIZES = ("--tile", "64,64", "--chunks", "64,64", "--threads", "1", "--engine", "serial")
OPTIONS = Options(tile=(EDGE, EDGE), chunks=(EDGE, EDGE), threads=1)
FORKING = """
import json, os, sys, time
import torch
import tilepipe.commands.segment, tilepipe.segmentation.segment
from tilepipe.segmentation import worker
from tilepipe.cli import main

torch.set_num_threads(1)
process = worker.Worker._process
for line in sys.stdin:
    arguments, log, free, gate = json.loads(line)
    pid = os.fork() if arguments else 0
    if not arguments:
        print(os.waitstatus_to_exitcode(os.waitpid(int(log), 0)[1]), flush=True)
    elif pid:
        print(pid, flush=True)
    else:
        begun = []
        def gated(self, index, times):
            begun.append(index)
            while len(begun) > free and not os.path.exists(gate):
                time.sleep(0.01)
            return process(self, index, times)
        worker.Worker._process = gated
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        try:
            main(arguments)
        except SystemExit as ending:
            sys.stdout.flush()
            os._exit(ending.code or 0)
"""
"""The command line in processes that wait, after so many free tiles, until a file is there."""


class Tasks:
    """Starts tasks of arrays, at once, and waits for them."""

    def __init__(self, made: Path) -> None:
        self.made = made
        self.server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", FORKING],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def _ask(self, *request: object) -> int:
        assert self.server.stdin is not None
        assert self.server.stdout is not None
        self.server.stdin.write(json.dumps(request) + "\n")
        self.server.stdin.flush()
        return int(self.server.stdout.readline())

    def start(self, target: Path, task: str, *, free: int) -> int:
        """Start a task that waits, after so many tiles, for the file ``gate`` beside its target."""
        command = ["segment", str(self.made / "v.zarr"), "--model", str(self.made / "net.pt")]
        command += ["-o", str(target), "--task", task, *SIZES]
        log = target.with_name("log-" + task.replace("/", "-"))
        return self._ask(command, str(log), free, str(target.with_name("gate")))

    def end(self, pid: int) -> int:
        """Return the exit code of a task."""
        return self._ask([], str(pid), 0, "")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a volume of 6 x 6 tiles, a network, and what one process made of them."""
    folder = tmp_path_factory.mktemp("shards")
    write_unet(folder / "net.pt", depth=2, normalize="zscore")
    write_volume(folder / "v.zarr", noise(6 * EDGE - 9, 6 * EDGE), "yx", chunks=(96, 96))
    run(folder, folder / "serial.zarr")
    return folder


def run(folder: Path, target: Path, *, task: ArrayTask | None = None, options: Options = OPTIONS):  # type: ignore[no-untyped-def]
    return segment(
        folder / "v.zarr",
        model=folder / "net.pt",
        output=target,
        options=options,
        engine="serial",
        task=task,
    )


def files(target: Path) -> dict[str, bytes]:
    """Return the bytes of every file of the array; leftovers of killed writers aside."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in (target / "0").rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }


def check_whole(made: Path, target: Path) -> None:
    assert files(target) == files(made / "serial.zarr")
    assert Output.at(target).read_attributes()["state"] == "done"
    ledger = Ledger.open(Output.at(target), write=False)
    assert ledger is not None
    assert (ledger.done, ledger.tiles, ledger.failures) == (TILES, TILES, [])


@pytest.fixture(scope="module")
def tasks(made: Path) -> Iterator[Tasks]:
    started = Tasks(made)
    with started.server as server:
        yield started
        assert server.stdin is not None
        server.stdin.close()


@settings(max_examples=60, derandomize=True)
@given(tiles=st.integers(0, 300), count=st.integers(1, 40))
def test_the_shares_are_every_tile_once(tiles: int, count: int) -> None:
    shares = [ArrayTask(number, count).share(tiles) for number in range(1, count + 1)]
    assert [index for share in shares for index in share] == [*range(tiles)]
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.parametrize("number", [0, 4, -1])
def test_tasks_are_counted_from_one(number: int) -> None:
    with pytest.raises(BadRequest, match=rf"^task \(={number}/3\) .* as 1-3$"):
        ArrayTask(number, 3)


def test_tasks_one_after_the_other_and_the_last_ends_it(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    for number in (2, 3, 1):
        report = run(made, target, task=ArrayTask(number, TASKS))
        assert (report.tiles, report.before, report.done, report.left) == (12, 0, 12, 0)
        state = Output.at(target).read_attributes()["state"]
        assert state == ("done" if number == 1 else "started")
        assert report.unfinished == {2: 24, 3: 12, 1: 0}[number]
    check_whole(made, target)
    names = sorted(path.name for path in (target / LEDGER).iterdir())
    assert names == ["done-1", "done-2", "done-3", "log-1", "log-2", "log-3", "plan.json"]


def test_a_task_without_tiles_does_none(made: Path, tmp_path: Path) -> None:
    report = run(made, tmp_path / "o", task=ArrayTask(1, 2 * TILES))
    assert (report.tiles, report.done, report.unfinished) == (0, 0, TILES)
    report = run(made, tmp_path / "o", task=ArrayTask(2, 2 * TILES))
    assert (report.tiles, report.done, report.unfinished) == (1, 1, TILES - 1)


@pytest.mark.parametrize(
    ("text", "rule"), [("0/3", "must be I/N with I from 1 to N"), ("2", "as in 3/8")]
)
def test_what_is_no_shard_is_refused_in_a_line(made: Path, text: str, rule: str) -> None:
    where = [str(made / "v.zarr"), "--model", str(made / "net.pt"), "--task", text]
    ended = CliRunner().invoke(main, ["segment", *where])
    assert ended.exit_code == 2
    assert rule in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_later_call_without_a_shard_ends_it(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    run(made, target, task=ArrayTask(2, TASKS))
    report = run(made, target)
    assert (report.before, report.done) == (12, 24)
    check_whole(made, target)


def test_an_array_goes_on_with_what_a_run_has_begun(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"

    def stop(report: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(made / "v.zarr", model=made / "net.pt", output=target, options=OPTIONS,
                engine="serial", progress=stop)  # fmt: skip
    for number in (1, 2):  # of another number of tasks, and with sizes left to what was begun
        run(made, target, task=ArrayTask(number, 2), options=Options())
    check_whole(made, target)


def test_tasks_at_once_one_killed_and_the_last_ends_it(
    tasks: Tasks, made: Path, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    pids = [tasks.start(target, f"{n}/3", free=2) for n in (1, 2, 3)]
    until(lambda: all(marked(target, n) == 2 for n in (1, 2, 3)))
    with pytest.raises(BadRequest, match=r"is being written by another run \(task 2/3, host"):
        Ledger.open(Output.at(target), task=ArrayTask(2, TASKS))
    with pytest.raises(BadRequest, match=r"is being written by another run \(task ./3, host"):
        Ledger.open(Output.at(target))
    again = tasks.start(target, "2/3", free=0)
    assert tasks.end(again) == 2
    os.kill(pids[1], signal.SIGKILL)
    assert tasks.end(pids[1]) == -signal.SIGKILL
    (tmp_path / "gate").touch()
    assert [tasks.end(pids[n]) for n in (0, 2)] == [0, 0]
    said = "".join((tmp_path / f"log-{n}-3").read_text() for n in (1, 3))
    assert said.count("task 2/3 died: its tiles are done here") == 1
    assert "all tasks are done: the output is whole" in said
    check_whole(made, target)


@pytest.mark.long
def test_all_killed_and_a_later_call_ends_it(tasks: Tasks, made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    pids = [tasks.start(target, f"{n}/2", free=n) for n in (1, 2)]
    until(lambda: all(marked(target, n) == n for n in (1, 2)))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        assert tasks.end(pid) == -signal.SIGKILL
    report = run(made, target, task=ArrayTask(2, 2))  # and what the first has left
    assert (report.done, report.adopted, report.unfinished) == (TILES - 3, [1], 0)
    check_whole(made, target)


def marked(target: Path, number: int) -> int:
    """Return how many tiles a task has entered."""
    path = target / LEDGER / f"done-{number}"
    return path.stat().st_size // 13 if path.exists() else 0


@pytest.mark.parametrize("more", [{"overwrite": True}, {"scheduler": "tcp://127.0.0.1:1"}])
def test_what_an_array_cannot_be_asked_is_refused(
    made: Path, tmp_path: Path, more: dict[str, object]
) -> None:
    with pytest.raises(BadRequest, match=r"^task \(=1/2\) ") as caught:
        segment(made / "v.zarr", model=made / "net.pt", output=tmp_path / "o",
                task=ArrayTask(1, 2), **more)  # type: ignore[arg-type]  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "o").exists()


def test_a_plan_of_a_task_touches_nothing(made: Path, tmp_path: Path) -> None:
    planned = plan_segment(
        made / "v.zarr", model=made / "net.pt", output=tmp_path / "o", task=ArrayTask(1, 2)
    )
    assert planned.target == str(tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_a_task_with_another_plan_is_refused(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    run(made, target, task=ArrayTask(1, TASKS))
    with pytest.raises(BadRequest, match=r"another plan \(precision float32, not bfloat16\)"):
        run(made, target, task=ArrayTask(2, TASKS), options=replace(OPTIONS, precision="bfloat16"))


@pytest.fixture
def quick_leases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT", 0.1)
    monkeypatch.setattr(lease, "SILENCE", 0.6)


@contextmanager
def elsewhere(path: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lease]:
    """Hold a lease as a process of another machine does: nobody here can see whether it lives."""
    with monkeypatch.context() as patch:
        patch.setattr(lease, "_machine", lambda: "another")
        taken = Lease.take(path, task="1/2")
    assert isinstance(taken, Lease)
    try:
        yield taken
    finally:
        taken.close()


def test_an_owner_elsewhere_lives_while_it_beats(
    quick_leases: None, monkeypatch: pytest.MonkeyPatch, folder: Place
) -> None:
    path = folder / "lock"
    with elsewhere(path, monkeypatch):
        found = Lease.take(path)
        assert isinstance(found, Owner)
        assert found.task == "1/2"
        assert [*living([path, folder / "none"])] == [path]
    assert not path.exists()
    taken = Lease.take(path)
    assert isinstance(taken, Lease)
    taken.close()


class Faulty:
    """A hold as it is where a library has a fault: what it raises is no OSError."""

    def rewrite(self, content: bytes) -> bool:
        raise ZeroDivisionError("of a library\nfor example")

    def close(self) -> None:
        pass


def test_a_lease_that_is_no_longer_kept_up_is_told(quick_leases: None, folder: Place) -> None:
    owner = Owner("host", "machine", 1, 0.0, "token", "")
    replace_file(folder / "lock", lease._content(owner))
    with closing(Lease(folder / "lock", owner, Faulty())) as broken:
        broken._thread.join(timeout=WAIT)
        with pytest.raises(TileError, match=r"cannot be kept .*ZeroDivisionError: of a") as caught:
            broken.check()
        assert "\n" not in str(caught.value)


def test_a_lease_of_rubbish_is_taken_over(quick_leases: None, folder: Place) -> None:
    rubbish = b"[" * 99_999  # the reader of JSON takes it for too deep
    replace_file(folder / "lock", rubbish)
    taken = Lease.take(folder / "lock")
    assert isinstance(taken, Lease)
    with closing(taken):
        taken.check()
        replace_file(folder / "lock", rubbish)
        until(lambda: taken._lost)
        with pytest.raises(TileError, match="taken over"):
            taken.check()


def test_an_owner_elsewhere_that_is_silent_loses_its_lease(
    quick_leases: None, monkeypatch: pytest.MonkeyPatch, folder: Place
) -> None:
    path = folder / "lock"
    with elsewhere(path, monkeypatch) as silent:
        silent._end.set()  # as if its machine had gone
        taken = Lease.take(path)
        assert isinstance(taken, Lease)
        taken.check()
        taken.close()


def test_who_was_taken_over_notices(
    quick_leases: None, monkeypatch: pytest.MonkeyPatch, folder: Place
) -> None:
    folder = folder / "o" / LEDGER
    folder.mkdir(parents=True)
    with elsewhere(folder / "lock", monkeypatch) as suspended:
        suspended.check()
        (folder / "lock").unlink()
        taken = Lease.take(folder / "lock")
        until(lambda: suspended._lost)
        with pytest.raises(TileError, match=r"another run has taken over .*o, since"):
            suspended.check()
        suspended.close()
        assert json.loads((folder / "lock").read_text())["pid"] == os.getpid()
        assert isinstance(taken, Lease)
        taken.close()


def test_a_process_that_nobody_waited_for_is_dead(tmp_path: Path) -> None:
    """As in a container whose first process does not: what has ended stays in the list."""
    path = tmp_path / "lock"
    with subprocess.Popen([sys.executable, "-c", DYING, str(path)]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        taken = Lease.take(path)
        assert isinstance(taken, Lease)
        taken.close()


def test_of_many_at_once_one_gets_it(quick_leases: None, folder: Place) -> None:
    path = folder / "lock"
    for dead in (False, True):
        if dead:
            with subprocess.Popen([sys.executable, "-c", DYING, str(path)]) as process:
                process.wait()
            assert path.exists()
        found: list[Lease | Owner] = []
        start = threading.Barrier(8)

        def take(start: threading.Barrier = start, found: list[Lease | Owner] = found) -> None:
            start.wait()
            found.append(Lease.take(path))

        threads = [threading.Thread(target=take) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        held = [one for one in found if isinstance(one, Lease)]
        assert len(held) == 1
        held[0].close()
        assert find(folder, "") == []


DYING = """
import os, sys
from tilepipe.runs.lease import Lease
from tilepipe.storage.location import locate
Lease.take(locate(sys.argv[1], "lease"))
os._exit(1)
"""


def test_progress_is_seen_from_elsewhere(made: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    run(made, target, task=ArrayTask(1, TASKS))
    values, text = describe_file(target)
    assert (values["done"], values["tiles"]) == (12, 36)
    assert "12 of 36 done" in text
    run(made, target)
    values, text = describe_file(target)
    assert values["done"] == 36
    workers = values["workers"]
    assert isinstance(workers, dict)
    assert sum(worker["tiles"] for worker in workers.values()) == 36
