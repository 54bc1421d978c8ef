"""What may be asked of jobs, in files and on the line, and what a worker makes of its time."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tilepipe.cli import main
from tilepipe.engines.jobs import Jobs, read_jobs, seconds
from tilepipe.engines.walltime import LONGER, SPAN, SPARE, Deadline
from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

SITE = """
jobs = "2:16"
partition = "gpu"
walltime = "04:00:00"
job-memory = "8GB"
cores = 4
gpus = 1
directives = ["--qos=long"]
prologue = ["module load cuda"]
tls = true
rate = 1e12
"""


def test_a_file_says_all_and_the_line_comes_first(tmp_path: Path) -> None:
    file = tmp_path / "slurm.toml"
    file.write_text(SITE)
    asked = {"partition": "debug", "account": None, "jobs": (3, 3), "directives": (), "tls": False}
    assert read_jobs(file, asked) == Jobs(
        jobs=(3, 3),
        partition="debug",
        walltime="04:00:00",
        memory=8_000_000_000,
        cores=4,
        gpus=1,
        directives=("--qos=long",),
        prologue=("module load cuda",),
        tls=True,
        rate=1e12,
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("queue = 'gpu'", "holds queue, which is none of"),
        ("jobs = 'many'", "jobs (=many) must be N or MIN:MAX"),
        ("jobs = '4:2'", "jobs (=4:2) must be N or MIN:MAX"),
        ("gpus = 2", "gpus (=2) must be 0 or 1"),
        ("cores = '4'", "cores (='4') must be of type int"),
        ("walltime = 60", "walltime (=60) must be of type str"),
        ("walltime = 'long'", "walltime (=long) must be HH:MM:SS"),
        ("job-memory = 'much'", "job-memory (=much) must be an amount"),
        ("prologue = 3", "prologue must be a list of lines"),
        ("cores = 0", "cores (=0) must be positive"),
        ("[", "cannot be read"),
    ],
)
def test_what_cannot_be_is_refused_in_a_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "slurm.toml"
    file.write_text(text)
    with pytest.raises(BadRequest) as refusal:
        read_jobs(file, {})
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--engine", "serial", "--jobs", "2"), "engine (=serial) must be slurm"),
        (("--engine", "slurm", "--workers", "2"), "leave out --workers"),
        (("--engine", "slurm", "--jobs", "x"), "jobs (=x) must be"),
        (("--engine", "slurm", "--cluster", "no-such.toml"), "cluster (=no-such.toml)"),
    ],
)
def test_what_does_not_go_together_is_refused(more: tuple[str, ...], words: str) -> None:
    ended = CliRunner().invoke(main, ["plan", "source.zarr", "--model", "net.pt", *more])
    assert ended.exit_code == 2
    assert words in ended.stderr
    assert ended.stderr.count("\n") == 1


@given(st.integers(0, 9), st.integers(0, 23), st.integers(0, 59), st.integers(0, 59))
def test_walltimes_are_read_as_slurm_reads_them(days: int, hours: int, m: int, s: int) -> None:
    whole = days * 86400 + hours * 3600 + m * 60 + s
    assert seconds(f"{days}-{hours:02}:{m:02}:{s:02}") == whole
    assert seconds(f"{days * 24 + hours}:{m:02}:{s:02}") == whole


def test_a_worker_takes_what_it_can_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(time, "time", lambda: now)
    monkeypatch.setenv(SPAN, "1000:1100")
    deadline = Deadline()
    assert deadline.unknown
    assert deadline.suffices(1e9)  # the first is tried
    now = 1051.0
    assert not deadline.suffices(49 / LONGER)  # but not late
    assert deadline.suffices((49 - SPARE) / LONGER - 0.1)
    deadline.took(2.0)
    assert not deadline.unknown
    assert deadline.suffices(1e9)  # its own tiles tell more than those of others
    now = 1100 - SPARE - 2 * LONGER - 0.1
    assert deadline.suffices(0)
    now += 0.2
    assert not deadline.suffices(0)


def test_without_an_end_there_is_always_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SPAN, raising=False)
    deadline = Deadline()
    assert not deadline.unknown
    assert deadline.suffices(1e9)
