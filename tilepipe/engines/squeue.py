"""What SLURM's own commands say; needs nothing but them."""

from __future__ import annotations

import logging
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.engines.jobs import seconds
from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

log = logging.getLogger(__name__)

ANSWER = 60
"""Seconds in which SLURM must answer."""
OVER = {"COMPLETING", "COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "PREEMPTED",
        "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE", "REVOKED"}  # fmt: skip
"""States of jobs that will not go on; of one that is put back into the queue another is made."""


@dataclass(frozen=True, slots=True)
class Queued:
    """A job that waits or runs."""

    state: str
    reason: str
    """Why it waits, in SLURM's word."""


def call(*command: str) -> subprocess.CompletedProcess[str]:
    """Run one of SLURM's commands; raises `BadRequest` where there is none."""
    if shutil.which(command[0]) is None:
        raise BadRequest(
            f"engine (=slurm) needs SLURM's commands, and there is no {command[0]} here; run on a"
            " login node, or choose another --engine"
        )
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=ANSWER, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", f"no answer in {ANSWER} s")


def words(output: str) -> str:
    r"""Return the error that one of SLURM's commands printed, in one line.

    >>> words("Exit code: 1\nCommand:\nsbatch x.sh\nstdout:\n\nstderr:\nsbatch: error: no\n")
    'sbatch: error: no'
    """
    return " ".join(output.split("stderr:")[-1].split())


def in_queue(ids: Sequence[str]) -> dict[str, Queued] | None:
    """Return those of some jobs that wait or run; None where SLURM does not answer."""
    if not ids:
        return {}
    ended = call("squeue", "--noheader", "--jobs", ",".join(ids), "--format", "%i|%T|%r")
    if ended.returncode and "Invalid job id" not in ended.stderr:
        log.info("squeue: %s", words(ended.stderr))
        return None
    jobs = {}
    for line in ended.stdout.splitlines():
        number, state, reason = line.split("|", 2)
        if state not in OVER:
            jobs[number] = Queued(state, reason)
    return jobs


def fate(job: str) -> str:
    """Return the state of a job, ``GONE`` where SLURM has forgotten it, ``UNKNOWN`` if silent.

    Of one that is being cleaned away, ``TIMEOUT`` if its time was over and ``CANCELLED`` else.
    """
    ended = call("scontrol", "--oneliner", "show", "job", job)
    if ended.returncode:
        return "GONE" if "Invalid job id" in ended.stderr else "UNKNOWN"
    job_fields: dict[str, str] = dict(re.findall(r"(\w+)=(\S*)", ended.stdout))
    state = job_fields["JobState"]
    if state != "COMPLETING":
        return state
    try:
        over = seconds(job_fields["RunTime"]) >= seconds(job_fields["TimeLimit"])
    except (KeyError, ValueError):  # UNLIMITED
        over = False
    return "TIMEOUT" if over else "CANCELLED"


def check_accepted(script: str) -> None:
    """Refuse a job script that SLURM would refuse, in its own words; submits nothing."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(script)
        file.flush()
        ended = call("sbatch", "--test-only", file.name)
    if ended.returncode:
        raise BadRequest(f"SLURM refuses the job: {words(ended.stderr)}")


def cancel_named(name: str) -> list[str]:
    """Cancel the user's jobs of this name, which a driver that died has left; return them."""
    ended = call("squeue", "--noheader", "--me", "--name", name, "--format", "%i")
    ids = ended.stdout.split()
    if ids:
        call("scancel", *ids)
    return ids


def node_addresses(partition: str | None) -> list[str]:
    """Return the addresses by which SLURM reaches the nodes of a partition."""
    where = ("--partition", partition) if partition else ()
    return call("sinfo", "--noheader", "--format", "%o", *where).stdout.split()
