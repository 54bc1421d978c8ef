"""The command line in processes of its own, to be killed and interrupted."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ROOT = Path(__file__).parents[1]
WAIT = 60.0
"""Seconds after which a test gives up."""
HEEDING = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Starts a program that heeds interrupts, even where the tests run in the background."""
NUMCODECS = re.compile(
    r"^\S+/numcodecs/__init__\.py:\d+: DeprecationWarning: crc32c usage is deprecated .*\n"
    r"  from numcodecs\.checksum32 import .*\n",
    re.MULTILINE,
)
"""What numcodecs says at each start, whatever the filters, if it finds crc32c, which zarr 3.1.3
needs, but not google_crc32c, which later releases of zarr need."""
FORKING = """
import json, os, signal, sys
import torch
import tilepipe.commands.segment, tilepipe.engines.dask, tilepipe.segmentation.segment
from tilepipe.cli import main
from tilepipe.models.model import wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import UNet

torch.set_num_threads(1)
find_profile(wrap(UNet(ndim=2, base=1, depth=2)))  # imports the rest; starts no thread
for line in sys.stdin:
    arguments, log = json.loads(line)
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
        os.dup2(1, 2)
        try:
            main(arguments)
        except SystemExit as ending:
            sys.stdout.flush()
            os._exit(ending.code or 0)  # tearing the interpreter down takes a second
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Commands:
    """Runs the command line, each time in a new process group.

    The processes are forked from one that has imported everything and done nothing, which saves
    the seconds that importing takes.
    """

    def __init__(self, folder: Path) -> None:
        self.log = folder / "log"
        command = [sys.executable, "-W", "ignore", "-c", FORKING]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def start(self, arguments: Sequence[str]) -> int:
        """Start one and return its process."""
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([list(arguments), str(self.log)]) + "\n")
        self.server.stdin.flush()
        pid = self._line()
        until(lambda: os.getpgid(pid) == pid)
        return pid

    def end(self) -> tuple[int, str]:
        """Wait for its end; return its exit code and what it said."""
        return self._line(), self.log.read_text()

    def run(self, arguments: Sequence[str]) -> tuple[int, str]:
        self.start(arguments)
        return self.end()

    def _line(self) -> int:
        assert self.server.stdout is not None
        return int(self.server.stdout.readline())


def words(stderr: str) -> str:
    """Return what a process said, without what numcodecs says of an older zarr's libraries."""
    return stderr if find_spec("google_crc32c") else NUMCODECS.sub("", stderr)


def until(met: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not met():
        assert time.monotonic() - began < WAIT
        time.sleep(0.002)


def script(arguments: Sequence[str]) -> subprocess.Popen[str]:
    """Start the installed script, as a user does."""
    tilepipe = str(Path(sys.executable).with_name("tilepipe"))
    return subprocess.Popen(
        [sys.executable, "-c", HEEDING, tilepipe, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
