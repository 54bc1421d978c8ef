"""Storage that fails on demand, as a disk or a network does.

`FailingStore` wraps any Zarr store and fails in this process, for code that takes a store or an
array. `unavailable` blocks a file or a folder for every process, for engines whose workers open
the volume by its path:

    from tilepipe.testing.storage import unavailable

    def test_what_my_engine_cannot_read_is_set_aside(volume, model, tmp_path):
        with unavailable(volume / "c" / "0" / "3"):
            report = tilepipe.segment(volume, model=model, output=tmp_path / "out.zarr")
        assert report.failures
        assert not tilepipe.segment(volume, model=model, output=tmp_path / "out.zarr").failures

All that does not fail is done by the real store and the real file system.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Literal
from uuid import uuid4

from zarr.abc.store import Store
from zarr.storage import WrapperStore

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator
    from pathlib import Path

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

Direction = Literal["reading", "writing"]


@dataclass(slots=True, eq=False)
class Fault:
    """What fails in a store, and how often it has."""

    names: str
    """The objects: a pattern of `fnmatch`, in which ``*`` stands for slashes, too."""
    directions: frozenset[Direction]
    """What fails: ``reading``, ``writing`` (which includes removing), or both."""
    times: int | None
    """How many requests fail before the store answers again; None for all."""
    count: int = 0
    """How many requests have failed so far."""


class FailingStore(WrapperStore[Store]):
    """A Zarr store whose objects cannot be read or written for as long as a test wants it.

    Whatever fails raises OSError with ``errno.EIO``, as a disk does. All else is done by the store
    that is wrapped.

    >>> import numpy, zarr
    >>> store = FailingStore(zarr.storage.MemoryStore())
    >>> array = zarr.create_array(store, data=numpy.arange(8), chunks=4)
    >>> with store.failing("c/1", directions={"reading"}) as fault:
    ...     array[:4].tolist()
    ...     array[4:]
    Traceback (most recent call last):
    OSError: [Errno 5] Input/output error: 'c/1'
    >>> fault.count, array[4:].tolist()
    (1, [4, 5, 6, 7])
    """

    def __init__(self, store: Store) -> None:
        """Wrap a store, which works until `failing` says otherwise."""
        super().__init__(store)
        self._faults: list[Fault] = []
        self._lock = threading.Lock()

    @contextmanager
    def failing(
        self,
        names: str = "*",
        *,
        directions: Iterable[Direction] = ("reading", "writing"),
        times: int | None = None,
    ) -> Iterator[Fault]:
        """Let requests fail inside of this.

        Args:
            names: Which objects, as a pattern of `fnmatch`: ``c/0/*``, ``*zarr.json``.
            directions: What fails: ``reading``, ``writing``, or both.
            times: How many requests fail before the store answers again; None for all.

        Yields:
            The fault, which counts the requests that have failed.
        """
        fault = Fault(names, frozenset(directions), times)
        self._faults.append(fault)
        try:
            yield fault
        finally:
            self._faults.remove(fault)

    def _with_store(self, store: Store) -> FailingStore:
        other = FailingStore(store)
        other._faults, other._lock = self._faults, self._lock
        return other

    def with_read_only(self, read_only: bool = False) -> FailingStore:
        """Return the same store, with the same faults, that may or may not be written to."""
        return self._with_store(self._store.with_read_only(read_only))

    def _check(self, key: str, direction: Direction) -> None:
        with self._lock:
            for fault in self._faults:
                is_over = fault.times is not None and fault.count >= fault.times
                if direction in fault.directions and fnmatchcase(key, fault.names) and not is_over:
                    fault.count += 1
                    raise OSError(errno.EIO, os.strerror(errno.EIO), key)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Read an object or a part of one."""
        self._check(key, "reading")
        return await super().get(key, prototype, byte_range)

    async def get_partial_values(
        self,
        prototype: BufferPrototype,
        key_ranges: Iterable[tuple[str, ByteRequest | None]],
    ) -> list[Buffer | None]:
        """Read parts of objects."""
        return [await self.get(key, prototype, part) for key, part in key_ranges]

    async def _get_many(
        self, requests: Iterable[tuple[str, BufferPrototype, ByteRequest | None]]
    ) -> AsyncGenerator[tuple[str, Buffer | None], None]:
        for key, prototype, part in requests:
            yield key, await self.get(key, prototype, part)

    async def exists(self, key: str) -> bool:
        """Whether there is an object."""
        self._check(key, "reading")
        return await super().exists(key)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object."""
        self._check(key, "writing")
        await super().set(key, value)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object where there is none."""
        self._check(key, "writing")
        await super().set_if_not_exists(key, value)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object."""
        self._check(key, "writing")
        await super().delete(key)


@contextmanager
def unavailable(path: Path) -> Iterator[None]:
    """Let a file or a folder be out of reach inside of this, for every process and every user.

    A link to itself takes its place: whoever follows it gets OSError with ``errno.ELOOP``. What was
    there is put back afterwards, unchanged. To let writing fail for Zarr's own `LocalStore`, which
    replaces files without looking at them, block the folder that would hold the file.

    Args:
        path: The file or folder of a volume or an output, such as a chunk. It may not exist yet;
            its folder is then created.
    """
    aside = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    exists = path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    if exists:
        path.rename(aside)
    path.symlink_to(path.name)
    try:
        yield
    finally:
        if path.is_symlink():
            path.unlink()
            if exists:
                aside.rename(path)
        elif exists:  # a writer has put another file there
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
