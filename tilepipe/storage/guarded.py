"""The Zarr store of an output, which asks a guard before it writes; what is written is durable.

It is for writing alone: metadata is read through it, and no voxel.
"""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from tilepipe.storage.location import sync_file, whole_file, zarr_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.abc.store import ByteRequest
    from zarr.core.buffer import Buffer, BufferPrototype

    from tilepipe.storage.location import Place


METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata")
"""The names of objects that say what others are."""


class Guard(Protocol):
    """What says whether something may still be written; see `tilepipe.runs.fence.Fence`."""

    @property
    def is_due(self) -> bool:
        """Return whether `check` would take long."""

    def check(self) -> None:
        """Raise where nothing more may be written, by what was seen in the last moments."""

    def look(self) -> None:
        """Raise where nothing more may be written, by what is seen now."""

    def writing(self) -> AbstractContextManager[None]:
        """Write inside of this; raises as `check` does."""


class NoGuard:
    """The guard of what nobody else knows of: it refuses nothing."""

    is_due = False

    def check(self) -> None:
        """Refuse nothing."""

    def look(self) -> None:
        """Refuse nothing."""

    def writing(self) -> AbstractContextManager[None]:
        """Refuse nothing."""
        return nullcontext()


class GuardedStore(WrapperStore[Store]):
    """A store that asks its guard before each object that it writes.

    It knows what is not on the disk yet. Each chunk or shard must be written whole, since none is
    read to be merged with.
    """

    def __init__(self, store: Store, guard: Guard, folder: Path | None, *, durable: bool) -> None:
        """``folder`` is that of the store in a file system; None for a store that is durable."""
        super().__init__(store)
        self._guard, self._folder, self._durable = guard, folder, durable
        self._written: set[str] = set()
        self._known: set[Path] = set()
        """Folders whose own entry, and those of all that hold them, are on the disk."""
        self._syncing = threading.Lock()

    @classmethod
    def of(cls, place: Place, guard: Guard, *, durable: bool = True) -> GuardedStore:
        """Return the store of what lies there; objects in a bucket are durable as they are."""
        folder = place if isinstance(place, Path) else None
        return cls(zarr_store(place), guard, folder, durable=durable)

    def _with_store(self, store: Store) -> GuardedStore:
        return GuardedStore(store, self._guard, self._folder, durable=self._durable)

    async def get(
        self, key: str, prototype: BufferPrototype, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        """Return an object of metadata; None for a chunk, which is written whole and never read.

        Otherwise Zarr would read each shard before it writes all of it.
        """
        if key.rpartition("/")[2] not in METADATA:
            return None
        return await super().get(key, prototype, byte_range)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, unless the guard refuses."""
        await self._ask(key)
        if self._folder is None:
            await super().set(key, value)
        else:
            await asyncio.to_thread(self._put, self._folder / key, value)
        self._written.add(key)

    def _put(self, path: Path, value: Buffer) -> None:
        """Write a file beside its place, look whether we may still do so, and move it there.

        So a late one never takes the place: who takes over an output removes all that lies in it.
        What was begun before that is gone then and cannot be moved; what is begun after it finds
        the other's lease. A power failure leaves the old file or the new one.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path, sync=self._durable or path.name in METADATA) as partial:
            partial.write_bytes(value.as_numpy_array().data)
            self._guard.look()

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object where there is none, unless the guard refuses."""
        if not await self.exists(key):
            await self.set(key, value)

    async def delete(self, key: str) -> None:
        """Remove an object, unless the guard refuses."""
        await self._ask(key)
        if self._folder is None:
            await super().delete(key)
        else:
            await asyncio.to_thread(self._remove, self._folder / key)
        self._written.add(key)

    def _remove(self, path: Path) -> None:
        self._guard.look()
        path.unlink(missing_ok=True)

    async def _ask(self, key: str) -> None:
        """Raise where we may not write, or the way to an object leads out through a link."""
        if self._guard.is_due:
            await asyncio.to_thread(self._guard.check)
        if self._folder is not None:
            path = self._folder / key
            if path.is_symlink() or os.path.realpath(path.parent) != str(path.parent):
                raise OSError(f"{path} is a link")

    def sync(self) -> None:
        """Force to disk the names of all that was written before this call; the files are there.

        Returns when they are there, whoever has forced them. Raises OSError where that fails.
        """
        if self._folder is None or not self._durable:
            self._written.clear()
            return
        with self._syncing:  # what another thread is just forcing to disk must be there, too
            keys = [self._written.pop() for _ in range(len(self._written))]
            try:
                for folder in {(self._folder / key).parent for key in keys}:
                    self._sync_names(folder)
            except BaseException:
                self._written.update(keys)
                raise

    def _sync_names(self, folder: Path) -> None:
        sync_file(folder)
        while folder not in self._known and folder != self._folder:
            self._known.add(folder)
            folder = folder.parent
            sync_file(folder)
