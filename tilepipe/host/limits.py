"""What this process may take of its machine: cores and memory, as containers and jobs limit them.

Dask looks up what a container, the affinity of the process and the limits of its user leave. A job
of SLURM or a service of systemd is a control group further down, which Dask does not look into.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dask.system import cpu_count
from distributed.system import memory_limit

if TYPE_CHECKING:
    from collections.abc import Iterator

GROUPS, OWN_GROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
"""Where Linux shows the limits of control groups, and to which of them this process belongs."""


def cores(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """Return the cores that this process may use, a part of one as a whole one."""
    counts = [float(cpu_count())]
    for folder in _groups("cpu", groups, own_group):
        limits = _numbers(folder / "cpu.max")  # of version 2: microseconds in so many
        limits = limits or [
            *_numbers(folder / "cpu.cfs_quota_us"), *_numbers(folder / "cpu.cfs_period_us")
        ]  # fmt: skip
        if len(limits) == 2 and limits[0] > 0:
            counts.append(limits[0] / limits[1])
    return max(1, math.ceil(min(counts)))


def memory(groups: Path = GROUPS, own_group: Path = OWN_GROUP) -> int:
    """Return the bytes that this process may use, with all others of its container or job."""
    limits = [memory_limit(), *_rlimits()]
    for folder in _groups("memory", groups, own_group):
        for name in ("memory.max", "memory.high", "memory.limit_in_bytes"):
            limits += [limit for limit in _numbers(folder / name) if limit > 0]
    return min(limits)


def _rlimits() -> Iterator[int]:
    """Yield the limits of ``ulimit``, as schedulers set them too; there are none on Windows."""
    if sys.platform == "win32":
        return
    import resource

    for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_RSS):
        if (limit := resource.getrlimit(kind)[0]) != resource.RLIM_INFINITY:
            yield limit


def _groups(controller: str, groups: Path, own_group: Path) -> Iterator[Path]:
    """Yield the folders of the control group of this process and of those that it lies in.

    Each line is ``NUMBER:CONTROLLERS:PATH``; version 2 names no controllers and has one tree.
    """
    try:
        lines = own_group.read_text().splitlines()
    except OSError:  # no Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(",") or not controllers:
            root = groups / controllers
            place = root / path.strip("/")
            yield place
            if place != root:
                yield from (folder for folder in place.parents if folder.is_relative_to(root))


def _numbers(path: Path) -> list[int]:
    """Return the numbers in a file of limits; none where there is no file, or no limit."""
    try:
        return [int(word) for word in path.read_text().split()]
    except (OSError, ValueError):  # "max"
        return []
