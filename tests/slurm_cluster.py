"""A real SLURM of our own on this machine: no systemd, no cgroup, no database; fake GPUs."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from tests.commands import ROOT

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

NODES, CORES, MEMORY, GPUS = ("n1", "n2"), 4, 8000, 2
"""Names of the nodes; of each, cores, MiB and GPUs."""
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
WAIT = 120.0
CONF = """\
ClusterName=tilepipe
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0,bf_interval=1
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
KillWait=5
MinJobAge=300
SlurmdParameters=config_overrides
GresTypes=gpu
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{first}-{last}] CPUs={cores} \
RealMemory={memory} Gres=gpu:{gpus} State=UNKNOWN
PartitionName=DEFAULT Nodes=n[1-2] DefMemPerCPU=1000 MaxTime=INFINITE OverTimeLimit=0
PartitionName=debug Default=YES PriorityTier=2 PreemptMode=OFF
PartitionName=requeued PriorityTier=1 PreemptMode=REQUEUE
PartitionName=cancelled PriorityTier=1 PreemptMode=CANCEL
PartitionName=urgent PriorityTier=3 PreemptMode=OFF
"""


def missing() -> str:
    """Return why there can be no SLURM here, nothing where there can be one."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"no {', '.join(absent)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.geteuid() == 0 else "needs root, as slurmd does"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")


class Slurm:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.conf = folder, folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *command: str) -> None:
        program = _program(command[0])
        assert program is not None
        with (self.folder / f"{name}.out").open("ab") as log:
            self._daemons[name] = subprocess.Popen(
                [program, *command[1:]], stdout=log, stderr=log, stdin=subprocess.DEVNULL
            )

    def start_node(self, name: str) -> None:
        self.start(name, "slurmd", "-D", "-N", name)

    def kill_daemon(self, name: str) -> None:
        """Kill a node's daemon alone: what it has started lives on."""
        daemon = self._daemons.pop(name)
        daemon.kill()
        daemon.wait()

    @contextmanager
    def impatient(self) -> Iterator[None]:
        """Take a node that does not answer for lost after seconds, not half a minute."""
        before = self.conf.read_text()
        patience = "SlurmdTimeout=10\n"
        assert patience in before
        self.conf.write_text(before.replace(patience, "SlurmdTimeout=5\nMessageTimeout=3\n"))
        run("scontrol", "reconfigure")
        yield
        self.conf.write_text(before)
        run("scontrol", "reconfigure")

    def lose_node(self, name: str) -> None:
        """Kill a node's daemon with all that runs there, as when its power fails."""
        self.kill_daemon(name)
        for process in psutil.process_iter():
            try:
                there = process.environ()
                here = there.get("SLURM_CONF") == str(self.conf)
                if here and there.get("SLURMD_NODENAME") == name:
                    process.kill()
            except psutil.Error:
                continue

    def stop(self) -> None:
        run("scancel", "--user", "root")
        until(lambda: not run("squeue", "--noheader"))
        for name in reversed(list(self._daemons)):
            daemon = self._daemons.pop(name)
            daemon.terminate()
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()


def run(*command: str) -> str:
    """Run one of SLURM's commands."""
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def until(met: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not met():
        assert time.monotonic() - began < WAIT
        time.sleep(0.1)


def ready() -> int:
    """Return how many nodes could take a job."""
    said = run("sinfo", "--noheader", "--states", "idle,mixed,allocated", "--format", "%D")
    return sum(map(int, said.split()))


def ids(state: str = "all") -> list[str]:
    """Return the jobs in a state."""
    states = () if state == "all" else ("--states", state)
    return run("squeue", "--noheader", *states, "--format", "%i").split()


def workers() -> list[psutil.Process]:
    """Return the processes of jobs that compute, of this cluster: others may run beside it."""
    found = []
    for process in psutil.process_iter():
        try:
            there = process.environ()
            inside = "SLURM_JOB_ID" in there and there["SLURM_CONF"] == os.environ["SLURM_CONF"]
            if inside and "multiprocessing.spawn" in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found


def listeners() -> set[str]:
    """Return on what addresses this process and the workers listen."""
    found = set()
    for process in [psutil.Process(), *workers(), *[w.parent() for w in workers()]]:
        assert process is not None
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                found.add(connection.laddr.ip)
    return found


def submit(folder: Path, *command: str) -> tuple[int, str]:
    """Run a job script to its end; return its exit code and its log."""
    path = str(Path(sys.executable).parent)
    env = {**os.environ, "BIN": path, "PYTHONPATH": str(ROOT), "CLUSTER": str(folder / "site.toml")}
    log = folder / "job.log"
    submitted = subprocess.run(
        ["sbatch", "--wait", "--parsable", "--output", str(log), *command],
        env=env, cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    return submitted.returncode, submitted.stderr + (log.read_text() if log.exists() else "")


@contextmanager
def cluster() -> Iterator[Slurm]:
    """Start a cluster of two nodes, point SLURM's commands to it, and end it."""
    folder = Path(tempfile.mkdtemp(prefix="tilepipe-slurm-"))  # munged wants all to come in
    for name in ("munge", "state", "dev"):
        (folder / name).mkdir(parents=True)
    folder.chmod(0o755)
    (folder / "munge").chmod(0o755)
    key = folder / "munge" / "key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    for number in range(GPUS):  # a GPU must be a character device
        os.mknod(folder / "dev" / f"nvidia{number}", 0o20666, os.makedev(1, 3))
    (folder / "gres.conf").write_text(
        f"NodeName=n[1-2] Name=gpu File={folder}/dev/nvidia[0-{GPUS - 1}]\n"
    )
    port = _free(3)
    host = socket.gethostname().split(".")[0]
    values = {"port": port, "first": port + 1, "last": port + 2, "cores": CORES, "gpus": GPUS}
    conf = CONF.format(folder=folder, host=host, memory=MEMORY, **values)
    found = Slurm(folder)
    found.conf.write_text(conf)
    before = os.environ.get("SLURM_CONF")
    os.environ["SLURM_CONF"] = str(found.conf)
    try:
        munge = folder / "munge"
        found.start(
            "munged", "munged", "--foreground", f"--key-file={key}", f"--socket={munge}/socket",
            f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed",
        )  # fmt: skip
        until((munge / "socket").exists)
        found.start("slurmctld", "slurmctld", "-D")
        for node in NODES:
            found.start_node(node)
        until(lambda: ready() == len(NODES))
        yield found
    finally:
        found.stop()
        shutil.rmtree(folder)
        os.environ.pop("SLURM_CONF")
        if before is not None:
            os.environ["SLURM_CONF"] = before


def _free(count: int) -> int:
    """Return the first of some ports in a row that nobody listens on."""
    for port in range(17000 + os.getpid() % 1000 * 4, 60000, count):
        try:
            for number in range(port, port + count):
                with socket.socket() as trial:
                    trial.bind(("127.0.0.1", number))
        except OSError:
            continue
        return port
    raise AssertionError("no free ports")
