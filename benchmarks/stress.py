"""Jobs that are killed while a volume is segmented on SLURM: ``python benchmarks/stress.py``.

Two nodes, four jobs of one worker each; every ``--every`` seconds a running job is killed, by turns
by ``scancel`` and with all its processes by ``kill -9``. The SLURM at hand is used, else that of
the tests is started. What the serial engine makes of the volume is made first, in two shares side
by side, and kept in ``--folder``: interrupted, the same command goes on with it.

Tiles *computed* are those whose end stands in the workers' logs. A worker computes one at a time,
so each job that is killed with its worker up may cut one short; those *lost* had been handed to a
worker whose job was killed, most of them not begun or only read.
"""

from __future__ import annotations

import logging
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from tilepipe.segmentation.report import Report

EDGE, JOBS, MEMORY = 256, 4, 1_600_000_000
"""Voxels of a tile along each axis; jobs; bytes that a worker may take."""
TELL = 30.0
"""Seconds between two lines of progress."""
TOLD = ("--tile", f"{EDGE},{EDGE}", "--chunks", f"{EDGE},{EDGE}", "--write", "probabilities",
        "--memory", str(MEMORY), "--threads", "1", "--device", "cpu")  # fmt: skip


def make(folder: Path, edge: int) -> None:
    """Write a volume of so many tiles along each axis, and a network."""
    from cases import Case, prepare

    case = Case(
        {"ndim": 2, "base": 64, "depth": 4}, (edge * EDGE,) * 2, (2 * EDGE,) * 2, MEMORY, (), (), ()
    )
    prepare(case, folder)


def reference(folder: Path) -> Path:
    """Segment serially, a process for each half of the tiles; goes on where it was."""
    from tilepipe.volumes.output import Output

    target, began = folder / "serial.zarr", time.monotonic()
    if not target.exists() or Output.at(target).read_attributes().get("state") != "done":
        where = (str(folder / "image.zarr"), "--model", str(folder / "unet.pt"), "-o", str(target))
        command = (sys.executable, "-m", "tilepipe", "segment", *where, *TOLD)
        halves = [
            subprocess.Popen([*command, "--engine", "serial", "--task", f"{n}/2"]) for n in (1, 2)
        ]
        codes = [half.wait() for half in halves]
        if any(codes):
            raise click.ClickException("the serial run failed")
        click.echo(f"serial: {time.monotonic() - began:.0f} s on two cores")
    return target


@dataclass
class Killer:
    """Kills a job now and then, until it is told to end."""

    every: float
    until: float
    name: str
    killed: list[str] = field(default_factory=list)

    def run(self, end: threading.Event) -> None:
        """Kill a running job every so many seconds."""
        chance, began = random.Random(0), time.monotonic()
        while not end.wait(began + (len(self.killed) + 1) * self.every - time.monotonic()):
            if time.monotonic() - began > self.until:
                return
            running = said("squeue", "--me", "--name", self.name, "--states", "running").split()
            if not running:
                self.killed.append("")  # none to be had; the next is due in its time
                continue
            job = chance.choice(sorted(running))
            if len(self.killed) % 2:
                kill(job)
            else:
                said("scancel", job)
            self.killed.append(job)


def kill(job: str) -> None:
    """Kill all processes of a job."""
    for process in psutil.process_iter():
        try:
            if process.environ().get("SLURM_JOB_ID") == job:
                process.kill()
        except psutil.Error:
            continue


def said(*command: str) -> str:
    """Return what one of SLURM's commands says; of squeue, the jobs."""
    more = ("--noheader", "--format", "%i") if command[0] == "squeue" else ()
    return subprocess.run([*command, *more], capture_output=True, text=True, check=False).stdout


class Losses(logging.Handler):
    """Counts the tiles that the driver learns are lost with their worker."""

    count = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self.count += "lost with its worker" in str(record.msg)


def stress(folder: Path, *, every: float, seconds: float) -> None:
    """Segment on SLURM while jobs are killed, and tell what it took."""
    import tilepipe as tp
    from tilepipe.engines.jobs import Jobs
    from tilepipe.segmentation.slurm import job_name, log_folder
    from tilepipe.volumes.output import Output

    target = folder / "stressed.zarr"
    shutil.rmtree(target, ignore_errors=True)
    losses, killer = Losses(), Killer(every, seconds, job_name(Output.at(target)))
    told = logging.getLogger("tilepipe.engines.dask")
    told.setLevel(logging.INFO)
    told.addHandler(losses)
    told.propagate = False
    end, began, shown = threading.Event(), time.monotonic(), 0.0
    thread = threading.Thread(target=killer.run, args=(end,))

    def progress(report: Report) -> None:
        nonlocal shown
        if report.done == 1:
            thread.start()
        if time.monotonic() - shown > TELL:
            shown = time.monotonic()
            killed = len(list(filter(None, killer.killed)))
            passed = shown - began
            click.echo(f"{passed:4.0f} s: {report.done} of {report.tiles}, {killed} jobs killed")

    report = tp.segment(
        folder / "image.zarr", model=folder / "unet.pt", output=target, engine="slurm",
        options=tp.Options(
            tile=(EDGE, EDGE), chunks=(EDGE, EDGE), write="probabilities", memory=MEMORY,
            threads=1, device="cpu",
        ),
        jobs=Jobs(jobs=(JOBS, JOBS), cores=2, memory=2_000_000_000, walltime="01:00:00", poll=1.0),
        progress=progress,
    )  # fmt: skip
    passed = time.monotonic() - began
    end.set()
    thread.join()
    logs = {
        path.stem.rpartition("-")[2]: path.read_text()
        for path in log_folder(Output.at(target)).glob("*.out")
    }
    lines = [
        line for text in logs.values() for line in re.findall(r"tile (\d+), voxels .*: .* s", text)
    ]
    marked = (target / ".tilepipe" / "done").stat().st_size // 13
    equal = same(folder / "serial.zarr", target)
    killed = list(filter(None, killer.killed))
    begun = sum("worker job-" in logs.get(job, "") for job in killed)
    for name, value in {
        "seconds": f"{passed:.0f}",
        "tiles needed": report.tiles,
        "tiles computed, in the workers' logs": len(lines),
        "of them different": len(set(lines)),
        "tiles entered in the ledger": marked,
        "computed over needed": f"{len(lines) / report.tiles:.4f}",
        "cut short while computed, at most": begun,
        "computed over needed, with those": f"{(len(lines) + begun) / report.tiles:.4f}",
        "tiles lost with a worker, begun or not": losses.count,
        "tries after the first that were blamed on tiles": report.retries,
        "tiles set aside": len(report.failures),
        "jobs killed": len(killed),
        "jobs that ran": len(logs),
        "seconds of jobs": f"{report.job_seconds:.0f}",
        "bytes equal to serial's": equal,
    }.items():
        click.echo(f"| {name} | {value} |")


def same(one: Path, other: Path) -> bool:
    """Whether the arrays of two outputs have the same files with the same bytes."""

    def names(target: Path) -> set[str]:
        found = (path for path in (target / "0").rglob("*") if path.suffix != ".partial")
        return {str(path.relative_to(target)) for path in found if path.is_file()}

    return names(one) == names(other) and all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in names(one)
    )


def at_hand() -> AbstractContextManager[object]:
    """Return the SLURM there is, or one that runs as long as it is needed."""
    if shutil.which("sinfo") and said("sinfo", "--noheader"):
        return nullcontext()
    from tests import slurm_cluster

    if why := slurm_cluster.missing():
        raise click.ClickException(why)
    return slurm_cluster.cluster()


@click.command()
@click.option("--folder", type=click.Path(path_type=Path), default=Path("stress"))
@click.option("--edge", default=32, show_default=True, help="Tiles along each of two axes.")
@click.option("--every", default=20.0, show_default=True, help="Seconds between two kills.")
@click.option("--seconds", default=600.0, show_default=True, help="For how long jobs are killed.")
@click.option("--reference-only", is_flag=True)
def main(folder: Path, edge: int, every: float, seconds: float, reference_only: bool) -> None:
    """Measure what is computed again where jobs are killed."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}  # of jobs, too
    place = folder / str(edge)
    if not (place / "unet.pt").exists():
        place.mkdir(parents=True, exist_ok=True)
        make(place, edge)
    reference(place)
    if not reference_only:
        with at_hand():
            stress(place.resolve(), every=every, seconds=seconds)


if __name__ == "__main__":
    main()
