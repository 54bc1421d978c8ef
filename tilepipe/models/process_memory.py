"""What the user's own code takes of a process's memory before anything is computed.

Measured where it can be: in a new process that imports the code and builds the network as a worker
does. In this process it may have been imported long ago, beside who knows what.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tilepipe.errors import BadRequest
from tilepipe.geometry import ceil_to
from tilepipe.models.factory import build_network, digest_of, find_factory

if TYPE_CHECKING:
    from collections.abc import Mapping

PROCESS = 420_000_000
"""Bytes of a process that has loaded torch, zarr and dask and does nothing yet."""
VARIES = 32_000_000
"""By how much a process may take more in one run than in another of the same code."""
WORKER = """
import tilepipe.engines.dask, tilepipe.segmentation.worker
from tilepipe.models.process_memory import main
main()
"""
"""A program that has what every worker has before it measures."""
_known: dict[tuple[str, str], int] = {}
"""What was measured, by the name of the code and its digest."""


def process_memory(network: str | None, arguments: Mapping[str, object] | None) -> int:
    """Return the bytes of a process that has a network's code, without its weights, and waits.

    Our own code is in every process; what only this one can import, as what a notebook defines, is
    here already.
    """
    if network is None:
        return PROCESS
    factory = find_factory(network, Path.cwd())
    top = factory.module.split(".")[0]
    loaded = sys.modules.get(top)
    if top == "tilepipe" or (loaded is not None and loaded.__spec__ is None):
        return PROCESS
    key = factory.module, digest_of(factory)
    if key not in _known:
        _known[key] = _measure(network, arguments or {})
    return PROCESS + ceil_to(_known[key], VARIES // 2)


def _measure(network: str, arguments: Mapping[str, object]) -> int:
    places = os.pathsep.join(path or os.getcwd() for path in sys.path)
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", WORKER],
        input=json.dumps([network, arguments]),
        env={**os.environ, "PYTHONPATH": places, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        lines = [line for line in process.stderr.splitlines() if line.strip()] or ["nothing"]
        raise BadRequest(
            f"network (={network}) can be built here but not in a new process, as workers are:"
            f" {lines[-1].strip()[:300]}"
        )
    return int(process.stdout.split()[-1])


def main() -> None:
    """Write what building the network that is read from the standard input takes, in bytes."""
    network, arguments = json.loads(sys.stdin.read())
    this = psutil.Process()
    before = this.memory_info().rss
    module = build_network(network, arguments)
    weights = sum(tensor.nbytes for tensor in module.state_dict().values())
    sys.stdout.write(f"{max(0, this.memory_info().rss - before - weights)}\n")
