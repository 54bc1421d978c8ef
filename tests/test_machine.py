"""No more cores and memory are taken than a container, a job or a user's limits leave."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from dask.system import CPU_COUNT
from distributed.system import MEMORY_LIMIT

from tilepipe.host import limits
from tilepipe.training.recipe import Recipe

if TYPE_CHECKING:
    from pathlib import Path

GB = 1 << 30


def write(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_what_dask_looks_up_is_not_passed() -> None:
    assert 1 <= limits.cores() <= CPU_COUNT <= (os.cpu_count() or 1)
    assert limits.memory() <= MEMORY_LIMIT <= psutil.virtual_memory().total


def test_a_job_in_a_group_of_version_2(tmp_path: Path) -> None:
    """The job limits memory, the step in it says nothing, and the node's root group is empty."""
    job = tmp_path / "system.slice/slurmstepd.scope/job_7"
    write(job, memory__max=f"{2 * GB}", cpu__max="50000 100000")
    write(job / "step_0/user/task_0", memory__max="max", memory__high="max", cpu__max="max 100000")
    mine = tmp_path / "mine"
    mine.write_text("0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n")
    assert limits.memory(tmp_path, mine) == 2 * GB
    assert limits.cores(tmp_path, mine) == 1
    write(job / "step_0", memory__max="max", memory__high=f"{GB}")
    assert limits.memory(tmp_path, mine) == GB


def test_a_container_in_groups_of_version_1(tmp_path: Path) -> None:
    """A container may see the path of its host, which is not there: the limits lie at the root."""
    write(tmp_path / "memory", memory__limit_in_bytes=f"{3 * GB}")
    write(tmp_path / "cpu,cpuacct", cpu__cfs_quota_us="100000", cpu__cfs_period_us="100000")
    mine = tmp_path / "mine"
    mine.write_text("9:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n0::/system.slice\n")
    assert limits.memory(tmp_path, mine) == 3 * GB
    assert limits.cores(tmp_path, mine) == 1


def test_no_limits(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("9:memory:/\n4:cpu:/\n0::/\n")
    write(tmp_path / "memory", memory__limit_in_bytes="9223372036854771712")
    write(tmp_path / "cpu", cpu__cfs_quota_us="-1", cpu__cfs_period_us="100000")
    assert limits.memory(tmp_path, mine) == limits.memory(tmp_path, tmp_path / "none")
    assert limits.cores(tmp_path, mine) == limits.cores(tmp_path, tmp_path / "none") == CPU_COUNT


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limits")
def test_the_default_memory_is_half_of_what_a_user_may_take() -> None:
    code = f"""
import resource
from tilepipe.planning.checks import default_memory
for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_RSS):
    before = resource.getrlimit(kind)
    resource.setrlimit(kind, ({3 * GB}, before[1]))
    print(default_memory(1), default_memory(3))
    resource.setrlimit(kind, before)
"""
    shown = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout
    assert list(map(int, shown.split())) == [3 * GB // 2, GB // 2] * 3


def test_a_training_counts_cores_where_no_affinity_is_to_be_had(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on macOS."""
    from tilepipe.training.experiment import cores

    monkeypatch.delattr(os, "sched_getaffinity")
    assert 1 <= cores(Recipe(steps=1)) <= (os.cpu_count() or 1)
    assert cores(Recipe(steps=1, threads=3)) == 3
