"""Who writes what in a place that many machines share, without locks.

A lease is a small file or object that its owner creates exclusively, and renews every `BEAT`
seconds. An owner on this machine lives as long as its process does, and an owner elsewhere as long
as its file changes, so no clocks are compared. Law: of those who take a lease at once one gets it.
What leases guard stays right without them, too: two writers of a tile write the same bytes.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import TYPE_CHECKING
from uuid import uuid4

import psutil

from tilepipe.errors import TileError
from tilepipe.storage.location import VACANT, hold, remove_if
from tilepipe.storage.objects import explain

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tilepipe.storage.location import Hold, Place

log = logging.getLogger(__name__)

BEAT = 15.0
"""Seconds between two signs of life."""
SILENCE = 60.0
"""Seconds without one after which an owner on another machine is taken for dead."""
PATIENCE = 120.0
"""Seconds for which the place of a lease may be out of reach."""
READS = 100
"""How often a lease is read that is just being written, a hundred times a second."""
WIDTH = 512
"""Bytes of a lease, whatever it says: it is rewritten in place."""


@dataclass(frozen=True, slots=True)
class Owner:
    """The owner of a lease, as its file says."""

    host: str
    machine: str
    """Of the processes that this one can see: the boot of a machine, and its container."""
    pid: int
    born: float
    """When the process began, in seconds since 1970 by its own machine."""
    token: str
    task: str
    """Which part of an array of tasks it is, as ``3/8``; empty where it is none."""
    beat: int = 0

    def __str__(self) -> str:
        part = f"task {self.task}, " if self.task else ""
        return f"{part}host {self.host}, process {self.pid}"


class Lease:
    """A lease that is held until it is closed."""

    def __init__(self, path: Place, owner: Owner, held: Hold, *, after_dead: bool = False) -> None:
        self._path, self._owner, self._held = path, owner, held
        self.after_dead = after_dead
        """Whether its last owner died: what that one's workers write may be on its way."""
        self._lost = False
        self._unheard: tuple[float, OSError] | None = None
        self._broken: BaseException | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="tilepipe-lease", daemon=True)
        self._thread.start()

    @classmethod
    def take(cls, path: Place, *, task: str = "", dead: Owner | None = None) -> Lease | Owner:
        """Take a lease; where it is held by one who lives, return who that is.

        An owner on another machine is watched until it gives a sign of life, for `SILENCE` at most;
        one that was watched before is given as ``dead``.
        """
        owner = Owner(socket.gethostname(), _machine(), os.getpid(), _born(), uuid4().hex, task)
        after_dead = False
        while True:
            held = hold(path, _content(owner))
            if held is not None:
                return cls(path, owner, held, after_dead=after_dead)
            before = _read(path)
            if before is None:
                continue
            if before != dead and (holder := living([path]).get(path)):
                return holder
            _remove_dead(path, before)
            after_dead = True

    @property
    def name(self) -> str:
        """Return the name of its file."""
        return self._path.name

    @property
    def token(self) -> str:
        """Return what the file says as long as this lease is held; no two leases have the same."""
        return self._owner.token

    def check(self) -> None:
        """Raise `TileError` where it is another's, as nothing was heard of us, or out of reach."""
        if self._lost:
            raise TileError(
                f"another run has taken over {self._path.parent.parent}, since this one was not"
                " heard of; what was finished is kept"
            )
        if self._broken is not None:
            raise TileError(
                f"output (={self._path.parent.parent}) cannot be kept from other runs"
                f" ({type(self._broken).__name__}: {explain(self._broken)}); what was finished is"
                " kept: run the same command again to go on"
            )
        if self._unheard is not None and time.monotonic() - self._unheard[0] > PATIENCE:
            raise TileError(
                f"output (={self._path.parent.parent}) has been out of reach for {PATIENCE:.0f} s"
                f" ({self._unheard[1]}); run the same command again to go on"
            )

    def _live(self) -> None:
        while not self._end.wait(BEAT):
            try:
                owner = _read(self._path)
                if owner is None or owner.token != self._owner.token:
                    self._lost = True
                    return
                self._owner = replace(self._owner, beat=self._owner.beat + 1)
                self._lost = not self._held.rewrite(_content(self._owner))
                self._unheard = None
            except OSError as error:  # of a server that does not answer now
                log.info("%s cannot be rewritten: %s", self._path, error)
                self._unheard = self._unheard or (time.monotonic(), error)
            except BaseException as error:  # nobody else would see that the lease is not kept up
                self._broken = error
                return

    def close(self) -> None:
        """Give the lease back, so that others can take it."""
        if self._end.is_set():
            return
        self._end.set()
        self._thread.join()
        self._held.close()
        with suppress(OSError):
            owner = _read(self._path)
            if owner is not None and owner.token == self._owner.token:
                self._path.unlink()


def living(paths: Iterable[Place], *, clear: bool = False) -> dict[Place, Owner]:
    """Return the leases whose owners live, of these files; all are watched at once.

    With ``clear`` the leases of the dead are removed.
    """
    owners = watched = {path: owner for path in paths if (owner := _read(path)) is not None}
    living_owners = {path: o for path, o in watched.items() if o.machine == _machine() and _runs(o)}
    watched = {path: owner for path, owner in watched.items() if owner.machine != _machine()}
    end, warned = time.monotonic() + SILENCE, False
    while watched and time.monotonic() < end:
        if not warned:
            shown = str(next(iter(watched.values())))
            log.warning(
                "up to %.0f s: waiting to see whether a run still lives (%s)", SILENCE, shown
            )
            warned = True
        time.sleep(min(1.0, SILENCE / 10))
        for path, before in list(watched.items()):
            owner_now = _read(path)
            if owner_now != before:
                del watched[path]
                if owner_now is not None:
                    living_owners[path] = owner_now
    if clear:
        for path in owners.keys() - living_owners.keys():
            _remove_dead(path, owners[path])
    return living_owners


def take_dead(paths: Iterable[Place], *, task: str) -> dict[Place, Lease]:
    """Take the leases of the dead, of these files, unless another is quicker."""
    owners = {path: owner for path in paths if (owner := _read(path)) is not None}
    living_owners = living(owners)
    leases = {
        path: Lease.take(path, task=task, dead=owner)
        for path, owner in owners.items()
        if path not in living_owners and path.is_file()
    }
    return {path: lease for path, lease in leases.items() if isinstance(lease, Lease)}


def is_held(path: Place) -> bool:
    """Return whether there is a lease, be it of the dead."""
    return _read(path) is not None


def _content(owner: Owner) -> bytes:
    return json.dumps(asdict(owner)).encode().ljust(WIDTH)


def _read(path: Place) -> Owner | None:
    """Return what a lease says; None where there is none."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    return None if content.startswith(VACANT) else _owner(content)


def read_owner(path: Place) -> Owner | None:
    """Return who holds a lease, None where nobody does.

    A lease that is just being rewritten is read again. Raises OSError where it cannot be read.
    """
    for _ in range(READS):
        owner = _read(path)
        if owner is None or owner.token:
            return owner
        time.sleep(0.01)
    raise OSError(f"{path} cannot be read: it is not whole")


def _owner(content: bytes) -> Owner:
    try:
        return Owner(**json.loads(content))
    except (ValueError, TypeError, RecursionError):  # its owner has not written it yet
        return Owner("unknown", "", 0, 0.0, "", "")


def _remove_dead(path: Place, dead: Owner) -> None:
    """Remove a lease of the dead; of those who want to, just one does."""
    remove_if(path, lambda content: _owner(content) == dead)


@cache
def _machine() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            boot, space = file.read().strip(), os.readlink("/proc/self/ns/pid")
        return f"{socket.gethostname()} {boot} {space}"
    except OSError:
        return f"{socket.gethostname()} {psutil.boot_time():.0f}"


def _born() -> float:
    return psutil.Process().create_time()


def _runs(owner: Owner) -> bool:
    """Return whether a process runs; one that has ended, and is not yet waited for, does not."""
    try:
        process = psutil.Process(owner.pid)
        ended = process.status() in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
        return not ended and abs(process.create_time() - owner.born) < 5
    except psutil.NoSuchProcess:
        return False
