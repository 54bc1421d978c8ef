"""What a job runs: a Dask worker that one address reaches, and that knows when its job ends."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import time
from datetime import datetime
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from tilepipe.engines.walltime import SPAN
from tilepipe.host.allocator import keep_memory

if TYPE_CHECKING:
    from distributed import Worker


def main() -> None:
    """Run Dask's own worker command with the arguments given, bound to one address."""
    from distributed.cli import dask_worker
    from distributed.utils import get_ip_interface

    arguments = sys.argv[1:]
    if "--interface" in arguments:
        host = get_ip_interface(arguments[arguments.index("--interface") + 1])
    else:
        host = address_towards(arguments[0])
        arguments += ["--host", host]
    os.environ.pop(SPAN, None)  # of the job that this one was submitted from
    if (end := job_end()) is not None:
        os.environ[SPAN] = f"{time.time()}:{end}"
    arguments += ["--dashboard-address", f"{host}:0", "--no-dashboard"]
    arguments += ["--preload", "tilepipe.engines.jobworker"]
    dask_worker.main(arguments)


def address_towards(scheduler: str) -> str:
    """Return this machine's own address on the way to a scheduler; nothing is sent.

    >>> address_towards("tls://127.0.0.1:8786")
    '127.0.0.1'
    """
    where = urlsplit(scheduler)
    assert where.hostname is not None
    family = socket.AF_INET6 if ":" in where.hostname else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as way:
        way.connect((where.hostname, where.port or 8786))
        return str(way.getsockname()[0])


def job_end() -> float | None:
    """Return when the job ends, in seconds of the epoch; None where that is not known."""
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        return None
    command = ["squeue", "--noheader", "--jobs", job, "--format", "%e"]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return datetime.fromisoformat(ended.stdout.strip()).timestamp()
    except (OSError, subprocess.SubprocessError, ValueError):  # no squeue there; no limit
        return None


def dask_setup(worker: Worker) -> None:
    """Keep memory between layers, and let the job's log tell of tiles; Dask calls this."""
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        keep_memory()
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("tilepipe")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    span = os.environ.get(SPAN)
    left = f", {float(span.split(':')[1]) - time.time():.0f} s left" if span else ""
    pinned = os.environ.get("CUDA_VISIBLE_DEVICES", "none")
    logger.info(
        "worker %s of job %s on %s, GPU %s%s",
        worker.name, os.environ.get("SLURM_JOB_ID"), socket.gethostname(), pinned, left,
    )  # fmt: skip


if __name__ == "__main__":
    main()
