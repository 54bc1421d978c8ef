"""The jobs of SLURM in which workers run, as the user asks for them."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

WALLTIME = re.compile(r"(?:\d+-\d{1,2}(?::\d\d){0,2}|\d+(?::\d\d){0,2})")
"""What SLURM takes: minutes, MM:SS, HH:MM:SS, days-hours and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Jobs:
    """The jobs of a run; each job is one worker process.

    None leaves a choice to Dask's own ``jobqueue.yaml``, and where that says nothing to SLURM.
    """

    jobs: tuple[int, int] = (1, 1)
    """The fewest and the most jobs. There are as many as the second number while there are tiles
    for so many workers; towards the end jobs without work are ended, down to the first number."""
    partition: str | None = None
    """The partition of SLURM that jobs are submitted to."""
    account: str | None = None
    """The account that jobs are charged to."""
    walltime: str | None = None
    """How long a job may run, as SLURM spells it: ``HH:MM:SS``. [00:30:00]"""
    memory: int | None = None
    """Bytes of memory of a job. [8 GB]"""
    cores: int | None = None
    """Cores of a job, which are also its compute threads unless ``threads`` says others. [4]"""
    gpus: int = 0
    """GPUs of a job: 0 or 1, since a job is one process and a process computes on one GPU."""
    interface: str | None = None
    """The network interface that scheduler, dashboard and workers are reached by, and no other.
    [the one towards the compute nodes]"""
    directives: tuple[str, ...] = ()
    """More options of ``sbatch``, such as ``--qos=long``."""
    prologue: tuple[str, ...] = ()
    """Lines of shell before the worker, such as ``module load cuda``."""
    python: str | None = None
    """The interpreter on the nodes. [the one that submits]"""
    tls: bool = False
    """Whether scheduler and workers speak TLS, with credentials that are made for this run."""
    poll: float = 5.0
    """Seconds between two looks at the queue."""
    rate: float | None = None
    """Multiply-adds that one worker does in a second, as an earlier run measured; for estimates."""

    def __post_init__(self) -> None:
        low, high = self.jobs
        if not 0 <= low <= high or high < 1:
            raise BadRequest(f"jobs (={low}:{high}) must be N or MIN:MAX, with MAX at least 1")
        if self.gpus not in (0, 1):
            raise BadRequest(
                f"gpus (={self.gpus}) must be 0 or 1: a job is one process, which computes on one"
                " GPU; ask for more --jobs"
            )
        if self.walltime is not None and WALLTIME.fullmatch(self.walltime) is None:
            raise BadRequest(f"walltime (={self.walltime}) must be HH:MM:SS, as in 04:00:00")
        for name in ("memory", "cores", "poll", "rate"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadRequest(f"{name} (={value}) must be positive")


def parse_jobs(text: object) -> tuple[int, int]:
    """Return the fewest and the most jobs.

    >>> parse_jobs("4"), parse_jobs("2:8")
    ((4, 4), (2, 8))
    """
    parts = str(text).split(":")
    if len(parts) > 2 or not all(part.isdecimal() for part in parts):
        raise BadRequest(f"jobs (={text}) must be N or MIN:MAX, as in 4 or 2:8")
    return int(parts[0]), int(parts[-1])


def parse_size(text: object) -> int:
    """Return the bytes of an amount of memory.

    >>> parse_size("4GB"), parse_size("512MiB"), parse_size(1000)
    (4000000000, 536870912, 1000)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", str(text).strip())
    if match is None:
        raise BadRequest(f"job-memory (={text}) must be an amount such as 512MB or 4GB")
    number, unit, binary = match.groups()
    return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


def seconds(walltime: str) -> int:
    """Return the length of a walltime as SLURM spells it.

    >>> seconds("00:01:00"), seconds("90"), seconds("1-12"), seconds("10:30")
    (60, 5400, 129600, 630)
    """
    days, _, rest = walltime.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if days:
        parts += [0] * (3 - len(parts))
    elif len(parts) == 1:
        parts = [0, parts[0], 0]
    hours, minutes, last = ([0] * (3 - len(parts)) + parts)[-3:]
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + last


_KEYS = {"job-memory": "memory", "directive": "directives"}
"""Keys of the file that are options of the command line under another name."""


def read_jobs(path: str | Path | None, options: Mapping[str, object]) -> Jobs:
    """Return the jobs that a TOML file describes, changed by the options of the command line.

    ``options`` are fields of `Jobs`; values that are None or empty change nothing.
    """
    settings: dict[str, object] = {}
    if path is not None:
        try:
            settings = tomllib.loads(Path(path).read_text())
        except (OSError, ValueError) as error:
            raise BadRequest(f"cluster (={path}) cannot be read: {error}") from error
    known = {field.name for field in fields(Jobs)}
    values: dict[str, object] = {}
    for key, value in settings.items():
        name = _KEYS.get(key, key.replace("-", "_"))
        if name not in known:
            raise BadRequest(
                f"cluster (={path}) holds {key}, which is none of {', '.join(sorted(known))}"
            )
        values[name] = _typed(name, value, f"cluster (={path})")
    values |= {name: value for name, value in options.items() if value not in (None, (), False)}
    return replace(Jobs(), **values)  # type: ignore[arg-type]


_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("cores", "gpus"), (int,)),
    **dict.fromkeys(("poll", "rate"), (int, float)),
    "tls": (bool,),
}


def _typed(name: str, value: object, where: str) -> object:
    """Return a value of the file as the field takes it."""
    if name == "jobs":
        return parse_jobs(value)
    if name == "memory":
        return parse_size(value)
    if name in ("directives", "prologue"):
        lines = [value] if isinstance(value, str) else value
        if isinstance(lines, list) and all(isinstance(line, str) for line in lines):
            return tuple(lines)
        raise BadRequest(f"{where}: {name} must be a list of lines")
    wanted = _TYPES.get(name, (str,))
    if not isinstance(value, wanted) or (bool not in wanted and isinstance(value, bool)):
        raise BadRequest(f"{where}: {name} (={value!r}) must be of type {wanted[0].__name__}")
    return value
