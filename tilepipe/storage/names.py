"""The names of all files and folders in an output: no other module spells one of them.

An output is an OME-Zarr group: metadata, and one array named ``0``. Beside the array lies the
ledger, the folder ``.tilepipe``. Several writers may fill one ledger, each with files of its own:
a run alone writes ``done``, task 3 of an array writes ``done-3``.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.storage.location import find

if TYPE_CHECKING:
    from tilepipe.storage.location import Place

LEDGER = ".tilepipe"
"""The folder of the ledger inside an output; with its plan it marks an output as ours."""
MARKS = (".zgroup", ".zattrs", "zarr.json")
"""The group's metadata, in the order in which they are removed: the last holds our attributes."""
PLAN, FAILED, DONE, LOG, LOCK, JOBS = "plan.json", "failed", "done", "log", "lock", "jobs"
_ID = "[0-9a-f]{32}"
FILES = re.compile(
    rf"""
    (0/)? (zarr\.json | \.zgroup | \.zarray | \.zattrs)
    | (0/)? (zarr (\.json)? | \.zgroup | \.zarray | \.zattrs) \.{_ID}\.partial
    | 0/ (c/)? \d+ (/\d+){{0,5}} (\.{_ID}\.partial)?
    | {re.escape(LEDGER)}/ ({DONE} | {LOG} | {LOCK}) (-\d+)? (\.\d{{6}} | \.{_ID})?
    | {re.escape(LEDGER)}/ ({re.escape(PLAN)} | {FAILED} (-\d+)? \.json) (\.new | \.{_ID}\.partial)?
    | {re.escape(LEDGER)}/{JOBS}/ [^/]+ \.(out | err)
    | {re.escape(LEDGER)}/{JOBS}/ \.tls-[^/]+ / (ca_file | cert | key)
    """,
    re.VERBOSE,
)
"""Every file that we, zarr or SLURM's jobs write there; killed, zarr leaves ``partial``."""
FOLDERS = re.compile(
    rf"0 | 0/c | 0/ (c/)? \d+ (/\d+){{0,4}} | {re.escape(LEDGER)} (/{JOBS} (/\.tls-[^/]+)?)?",
    re.VERBOSE,
)
"""Every folder that they make there."""


@dataclass(frozen=True, slots=True)
class LedgerFiles:
    """Where the files of one ledger lie.

    A ``writer`` is the end of the names of its files: empty for a run alone, see `writer_of_task`.
    """

    folder: Place

    @property
    def plan(self) -> Place:
        """Return the file that holds the plan; an output without it has no ledger."""
        return self.folder / PLAN

    @property
    def jobs(self) -> Place:
        """Return the folder for the logs of the jobs."""
        return self.folder / JOBS

    def done(self, writer: str = "") -> Place:
        """Return the file to which a writer appends the tiles that it finished."""
        return self.folder / f"{DONE}{writer}"

    def log(self, writer: str = "") -> Place:
        """Return the file to which a writer appends when and where each tile was finished."""
        return self.folder / f"{LOG}{writer}"

    def failed(self, writer: str = "") -> Place:
        """Return the file in which a writer keeps the tiles that failed."""
        return self.folder / f"{FAILED}{writer}.json"

    def lock(self, writer: str = "") -> Place:
        """Return the file of a writer's lease."""
        return self.folder / f"{LOCK}{writer}"

    def every_done(self) -> list[Place]:
        """Return the files of all writers with the tiles that they finished."""
        return find(self.folder, DONE)

    def every_log(self) -> list[Place]:
        """Return the logs of all writers."""
        return find(self.folder, LOG)

    def every_failed(self) -> list[Place]:
        """Return the files of all writers with the tiles that failed."""
        return [path for path in find(self.folder, FAILED) if path.suffix == ".json"]

    def task_locks(self) -> list[Place]:
        """Return the leases of the tasks of an array; marks of their removal are left out."""
        return [path for path in find(self.folder, f"{LOCK}-") if "." not in path.name]

    def of_tiles(self) -> list[Place]:
        """Return what tells of tiles: all that is neither a lease nor the plan."""
        return [path for path in find(self.folder, "") if not path.name.startswith((LOCK, PLAN))]


def writer_of_task(number: int) -> str:
    """Return the end of the names of the files of a task of an array.

    >>> writer_of_task(3)
    '-3'
    """
    return f"-{number}"


def writer_of_lock(name: str) -> str:
    """Return the writer whose lease has a file of that name.

    >>> writer_of_lock("lock-3")
    '-3'
    """
    return name.removeprefix(LOCK)


def is_lock(name: str) -> bool:
    """Return whether a name in an output is that of a lease, or of a mark of its removal."""
    return name.startswith(f"{LEDGER}/{LOCK}")


def is_plan(name: str) -> bool:
    """Return whether a name in an output is that of the ledger's plan, or of a part of it."""
    return name.startswith(f"{LEDGER}/{PLAN}")
