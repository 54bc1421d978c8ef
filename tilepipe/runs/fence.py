"""Whether a process may still write to an output: asked before each write, wherever it runs.

A run owns its output by a lease (see `tilepipe.runs.lease`), a small file beside the ledger that
holds the run's token. Workers outlive runs: a tile may still be computed when its run was
interrupted, killed or taken for dead, and when the next run has begun the output anew. So the token
travels with the tiles, and a worker compares it with the lease before it writes. What cannot be
fenced is a write that had begun before; the next run waits `SETTLE` seconds for those.
"""

from __future__ import annotations

import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.errors import TileError
from tilepipe.runs.lease import read_owner

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilepipe.volumes.output import Output

FRESH = 0.5
"""Seconds for which an answer holds: of many small chunks not each costs a look at the lease."""
SETTLE = 2.0
"""Seconds that a run waits for writes that had begun before it took over what another had left."""
PATIENCE = 60.0
"""Seconds that a worker waits for writes to end when it is told to write no more."""


class NotOwner(TileError):
    """The output belongs to another run now."""


@dataclass(frozen=True, slots=True)
class Right:
    """The right of a run to write to an output; it travels with the tiles to every worker."""

    output: Output
    lease: str
    """The name of the lease's file in the ledger's folder."""
    token: str
    """What the lease says as long as the run owns the output; no two runs have the same."""


class Fence:
    """What lets a process write as long as the run that it works for owns the output.

    Safe to share between threads.
    """

    def __init__(self, right: Right) -> None:
        self._right = right
        self._path = right.output.ledger.folder / right.lease
        self._fresh_until = 0.0
        self._closed = False
        self._writes = 0
        self._changed = threading.Condition()

    @property
    def is_due(self) -> bool:
        """Return whether `check` would look at the lease, and not just remember."""
        return self._closed or time.monotonic() >= self._fresh_until

    def check(self) -> None:
        """Raise as `look` does, unless that has been seen a moment ago."""
        if self.is_due:
            self.look()

    def look(self) -> None:
        """Raise `NotOwner` unless the run still owns the output.

        Raises OSError where the lease cannot be read.
        """
        began = time.monotonic()
        owner = None if self._closed else read_owner(self._path)
        if owner is None or owner.token != self._right.token:
            holder = f"belongs to another run now ({owner})" if owner else "is this run's no more"
            raise NotOwner(
                f"output (={self._right.output}) {holder}; nothing more is written by this one"
            )
        self._fresh_until = began + FRESH

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Write inside of this: `close` waits for the end. Raises as `check` does."""
        with self._changed:
            self._writes += 1
        try:
            self.check()
            yield
        finally:
            with self._changed:
                self._writes -= 1
                self._changed.notify_all()

    def close(self) -> bool:
        """Let no write begin any more, and wait for those that have; return whether they ended."""
        with self._changed:
            self._closed = True
            return self._changed.wait_for(lambda: not self._writes, timeout=PATIENCE)
