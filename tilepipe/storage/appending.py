"""Files that only grow, in a file system or, as a row of objects, in an object store."""

from __future__ import annotations

import os
import threading
import time
from typing import TYPE_CHECKING, Protocol

from tilepipe.storage.location import replace
from tilepipe.storage.objects import ObjectKey, explain

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from typing import BinaryIO

    from obstore import UpdateVersion

    from tilepipe.storage.location import Place

SYNC = 1.0
"""Seconds after which what was appended to a file is forced to disk."""
PART = 1 << 20
"""Bytes after which what is appended goes on in another object."""
FLUSH = 1.0
"""Seconds after which what was appended lies in the store."""
PATIENCE = 120.0
"""Seconds for which a store may refuse what was appended."""


class Appending(Protocol):
    """A file that only grows."""

    def write(self, content: bytes) -> None:
        """Append bytes, which others see at once or within seconds."""

    def sync(self) -> None:
        """Force all that was appended to where it outlives a failure of this machine."""

    def close(self) -> None:
        """Force all of it there, and close the file."""


def append(place: Place, check: Callable[[], None]) -> Appending:
    """Append to a file: to one of a file system, or to a row of objects `NAME.000000`, ....

    All of them `find` finds by the name, in order. ``check`` raises OSError where nothing more may
    be written; it is asked before each object, which, unlike an open file, could be written anew
    after it was removed.
    """
    return GrowingObjects(place, check) if isinstance(place, ObjectKey) else _GrowingFile(place)


class _GrowingFile:
    """A file of a file system that grows."""

    def __init__(self, path: Path) -> None:
        if path.exists() and path.stat().st_nlink > 1:  # a copy of hard links would grow, too
            replace(path, path.read_bytes())
        self._file: BinaryIO = path.open("ab")
        self._synced = time.monotonic()

    def write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()
        if time.monotonic() - self._synced > SYNC:
            self.sync()

    def sync(self) -> None:
        os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        self.sync()
        self._file.close()


class GrowingObjects:
    """Appends to the objects ``KEY.000000``, ``KEY.000001`` and so on, of `PART` bytes or so.

    Each is begun exclusively, so that nobody ever writes over what another has appended, and
    is written anew as it grows, by a thread, `FLUSH` seconds after what it lacks at most.
    """

    def __init__(self, key: ObjectKey, check: Callable[[], None]) -> None:
        """``check`` is asked before each object is written; it raises OSError to refuse."""
        earlier = [k.name for k in key.parent.iterdir() if k.name.startswith(f"{key.name}.")]
        self._key, self._check = key, check
        self._number = 1 + max((int(name.rpartition(".")[2]) for name in earlier), default=-1)
        self._tag: UpdateVersion | None = None
        self._content = bytearray()
        """Of the last part."""
        self._written = 0
        """Bytes of it that lie in the store."""
        self._failed: tuple[float, OSError] | None = None
        self._broken: BaseException | None = None
        self._filling, self._writing = threading.Lock(), threading.Lock()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._live, name="tilepipe-parts", daemon=True)
        self._thread.start()

    def write(self, content: bytes) -> None:
        """Append bytes; OSError where what was appended before has long not reached the store."""
        if self._broken is not None:
            raise OSError(f"{self._key}: {explain(self._broken)}") from self._broken
        if self._failed is not None and time.monotonic() - self._failed[0] > PATIENCE:
            raise self._failed[1]
        with self._filling:
            self._content += content

    def sync(self) -> None:
        """Write what the store lacks; OSError where that fails."""
        with self._writing:
            with self._filling:
                content = bytes(self._content)
            if len(content) == self._written:
                return
            try:
                self._check()
                self._put(content)
            except OSError as error:
                self._failed = self._failed or (time.monotonic(), error)
                raise
            self._failed, self._written = None, len(content)
            if len(content) >= PART:
                with self._filling:
                    del self._content[: len(content)]
                self._number, self._tag, self._written = self._number + 1, None, 0

    def _put(self, content: bytes) -> None:
        while True:
            key = self._key.with_name(f"{self._key.name}.{self._number:06d}")
            try:
                self._tag = key.write_bytes(content, tag=self._tag, new=self._tag is None)
                return
            except FileExistsError:  # of another writer, who took us for dead
                self._number, self._tag = self._number + 1, None

    def _live(self) -> None:
        while not self._end.wait(FLUSH):
            try:
                self.sync()
            except OSError:  # it is tried again, and told to who writes
                continue
            except BaseException as error:  # nobody else would see that nothing is written now
                self._broken = error
                return

    def close(self) -> None:
        """Write what the store lacks, and end."""
        self._end.set()
        self._thread.join()
        self.sync()
