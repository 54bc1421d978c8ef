"""Laws of the ledger: what is read was marked, whatever tore it; one process writes at a time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support import new_ledger
from tilepipe.engines import TileFailure
from tilepipe.errors import BadRequest
from tilepipe.runs.ledger import BATCH, DIGITS, Ledger, take_lease
from tilepipe.storage.names import LEDGER
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

TILES = 40
PLAN: dict[str, object] = {"identity": {"model": "m", "sizes": {"tile": [32, 32]}}}
RECORD = DIGITS + 1

marks = st.lists(st.integers(0, TILES - 1), max_size=60)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the examples of hypothesis make their own folders."""
    return tmp_path_factory.mktemp("ledgers")


def begin(parent: Path, indices: Iterable[int], *, tiles: int = TILES) -> Path:
    """Return a new target whose ledger was closed after the indices were marked."""
    target = Path(tempfile.mkdtemp(dir=parent))
    with new_ledger(target, PLAN, tiles=tiles) as ledger:
        for index in indices:
            ledger.mark(index)
    return target


def reopen(target: Path, *, write: bool = True) -> Ledger:
    ledger = Ledger.open(Output.at(target), write=write)
    assert ledger is not None
    return ledger


def finished(ledger: Ledger) -> set[int]:
    """Return the finished tiles, told in three ways that must agree."""
    found = {index for index in range(ledger.tiles) if index in ledger}
    assert ledger.done == len(found)
    assert [*ledger.remaining()] == sorted(set(range(ledger.tiles)) - found)
    return found


@settings(max_examples=30, derandomize=True)
@given(indices=marks)
def test_what_is_marked_is_read_again(shared: Path, indices: list[int]) -> None:
    target = begin(shared, indices)
    for write in (False, True):
        with reopen(target, write=write) as ledger:
            assert finished(ledger) == set(indices)
            assert ledger.plan == {"tiles": TILES, **PLAN}
            assert ledger.failures == []


@settings(max_examples=60, derandomize=True)
@given(
    before=marks,
    after=marks,
    kept=st.integers(0, 60 * RECORD),
    tail=st.sampled_from([b"", b"\0" * 5, b"\0" * 40, b"0000000000x7\n", b"000000000007\r", b"\n"]),
)
def test_a_torn_tail_costs_no_more_than_itself(
    shared: Path, before: list[int], after: list[int], kept: int, tail: bytes
) -> None:
    target = begin(shared, before)
    path = target / LEDGER / "done"
    torn = path.read_bytes()[:kept]
    path.write_bytes(torn + (tail if len(torn) % RECORD == 0 else b""))
    known = set(before[: len(torn) // RECORD])
    with reopen(target, write=False) as reader:
        assert finished(reader) == known
    with reopen(target) as ledger:
        assert finished(ledger) == known
        for index in after:
            ledger.mark(index)
        assert finished(ledger) == known | set(after)
    with reopen(target) as ledger:
        assert finished(ledger) == known | set(after)
    assert path.stat().st_size % RECORD == 0


def test_a_tile_that_is_marked_twice_counts_once(tmp_path: Path) -> None:
    target = begin(tmp_path, [3, 3, 5, 3])
    with reopen(target) as ledger:
        assert ledger.done == 2
        ledger.mark(3)
        assert ledger.done == 2


def test_a_new_ledger_forgets_the_older_one(tmp_path: Path) -> None:
    target = begin(tmp_path, [1, 2])
    with reopen(target) as ledger:
        ledger.set_aside([TileFailure(3, "ValueError", 3)])
    for plan_lost in (False, True):
        if plan_lost:
            (target / LEDGER / "plan.json").unlink()
        with new_ledger(target, {"identity": {}}, tiles=TILES) as ledger:
            assert finished(ledger) == set()
            assert ledger.failures == []
            ledger.mark(5)
        with reopen(target) as ledger:
            assert finished(ledger) == {5}
            assert ledger.plan == {"identity": {}, "tiles": TILES}


@pytest.mark.parametrize("index", [-1, TILES, 10**DIGITS])
def test_a_tile_that_does_not_exist_is_not_entered(tmp_path: Path, index: int) -> None:
    with new_ledger(tmp_path, PLAN, tiles=TILES) as ledger:
        with pytest.raises(IndexError, match=f"tile {index} "):
            ledger.mark(index)
        ledger.mark(7)
    with reopen(tmp_path) as ledger:
        assert finished(ledger) == {7}


@pytest.mark.parametrize("torn", [0, 5])
def test_a_long_ledger_is_read_in_parts(tmp_path: Path, torn: int) -> None:
    tiles = 3 * BATCH + 17
    target = begin(tmp_path, [], tiles=tiles)
    marked = range(0, tiles, 2)
    lines = b"".join(b"%0*d\n" % (DIGITS, index) for index in (*marked, *marked))
    (target / LEDGER / "done").write_bytes(lines + b"0" * torn)
    with reopen(target) as ledger:
        assert ledger.done == len(marked)
        assert [*ledger.remaining()] == [*range(1, tiles, 2)]
    assert (target / LEDGER / "done").stat().st_size == len(lines)


def test_records_past_the_last_tile_are_no_tiles(tmp_path: Path) -> None:
    target = begin(tmp_path, [1])
    with (target / LEDGER / "done").open("ab") as file:
        file.write(b"%0*d\n" % (DIGITS, TILES) + b"9" * DIGITS + b"\n")
    with reopen(target) as ledger:
        assert finished(ledger) == {1}


def test_remaining_leaves_out_what_is_finished_meanwhile(tmp_path: Path) -> None:
    with new_ledger(tmp_path, PLAN, tiles=6) as ledger:
        remaining = ledger.remaining()
        assert next(remaining) == 0
        ledger.mark(2)
        assert [*remaining] == [1, 3, 4, 5]


def test_failures_are_kept_until_a_run_without_any(tmp_path: Path) -> None:
    failures = [
        TileFailure(3, "voxels 0:8,8:16: OSError: 'é' \"quoted\"", 3),
        TileFailure(7, "KilledWorker", 1),
    ]
    with new_ledger(tmp_path, PLAN, tiles=9) as ledger:
        ledger.set_aside(failures)
    with reopen(tmp_path, write=False) as ledger:
        assert ledger.failures == failures
    with reopen(tmp_path) as ledger:
        ledger.set_aside(failures[:1])
        assert ledger.failures == failures[:1]
        ledger.set_aside([])
        assert ledger.failures == []
        ledger.set_aside(failures)
        ledger.mark(3)  # and the run is killed before it says what else failed
    assert reopen(tmp_path, write=False).failures == failures[1:]
    with reopen(tmp_path) as ledger:
        ledger.set_aside([])
    assert not (tmp_path / LEDGER / "failed.json").exists()


def test_no_ledger_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "begun" / LEDGER).mkdir(parents=True)
    for name in ("absent", "file", "begun"):
        assert Ledger.open(Output.at(tmp_path / name)) is None
        assert Ledger.open(Output.at(tmp_path / name), write=False) is None
    assert [*(tmp_path / "begun" / LEDGER).iterdir()] == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0" * 100,
        b"\xff\xfe",
        b'{"tiles": 3, "iden',
        b"[]",
        b"7",
        b'"tiles"',
        b"{}",
        b'{"tiles": null}',
        b'{"tiles": "many"}',
        b'{"tiles": -1}',
        b'{"tiles": 2.5}',
        b'{"tiles": true}',
        b'{"tiles": Infinity}',
        b'{"tiles": 1000000000000000000000}',
    ],
)
def test_a_plan_that_cannot_be_read_is_refused(tmp_path: Path, content: bytes) -> None:
    target = begin(tmp_path, [1])
    (target / LEDGER / "plan.json").write_bytes(content)
    for write in (True, False):
        with pytest.raises(BadRequest, match=r"output \(=.* ledger .* --overwrite$") as caught:
            Ledger.open(Output.at(target), write=write)
        assert "\n" not in str(caught.value)


def test_a_ledger_that_is_no_file_is_refused(tmp_path: Path) -> None:
    target = begin(tmp_path, [1])
    (target / LEDGER / "plan.json").unlink()
    (target / LEDGER / "plan.json").mkdir()
    with pytest.raises(BadRequest, match="cannot be read"):
        Ledger.open(Output.at(target))


def test_one_writer_and_any_readers(tmp_path: Path) -> None:
    with new_ledger(tmp_path, PLAN, tiles=5) as ledger:
        ledger.mark(4)
        with pytest.raises(BadRequest, match=rf"process {os.getpid()}\)") as caught:
            Ledger.open(Output.at(tmp_path))
        assert "\n" not in str(caught.value)
        with pytest.raises(BadRequest, match=rf"process {os.getpid()}\)"):
            new_ledger(tmp_path, {"identity": {}}, tiles=7)
        with reopen(tmp_path, write=False) as reader:
            assert (reader.tiles, reader.plan) == (5, {"tiles": 5, **PLAN})
            assert finished(reader) == {4}
        ledger.mark(0)
    with reopen(tmp_path) as ledger:
        assert finished(ledger) == {0, 4}


WRITER = """
import sys, time
from tilepipe.runs.ledger import Ledger
from tilepipe.volumes.output import Output
ledger = Ledger.open(Output.at(sys.argv[1]))
ledger.mark(2)
print("marked", flush=True)
time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the ledger of ``tmp_path`` and has marked tile 2."""
    new_ledger(tmp_path, PLAN, tiles=5).close()
    command = [sys.executable, "-c", WRITER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "marked\n"
            yield process
        finally:
            process.kill()


def test_another_process_is_named_and_its_death_frees_the_ledger(
    tmp_path: Path, writer: subprocess.Popen[str]
) -> None:
    for refused in (Ledger.open, take_lease):
        with pytest.raises(BadRequest, match=rf"process {writer.pid}\)"):
            refused(Output.at(tmp_path))
    with reopen(tmp_path, write=False) as reader:
        assert finished(reader) == {2}
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    take_lease(Output.at(tmp_path)).close()
    with reopen(tmp_path) as ledger:
        assert finished(ledger) == {2}
        ledger.mark(1)
    with reopen(tmp_path) as ledger:
        assert finished(ledger) == {1, 2}
