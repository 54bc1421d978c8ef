"""The Zarr store of an output: nothing is written without leave, and what is written is durable."""

from __future__ import annotations

import asyncio
import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from zarr.abc.store import Store
from zarr.storage import WrapperStore

from tilepipe.place import replace, sync_file, zarr_store

if TYPE_CHECKING:
    from collections.abc import Iterable

    from zarr.core.buffer import Buffer

    from tilepipe.place import Place


METADATA = ("zarr.json", ".zgroup", ".zattrs", ".zarray", ".zmetadata")
"""The names of objects that say what others are."""


class Leave(Protocol):
    """Says whether something may still be written; see `tilepipe.fence.Fence`."""

    @property
    def is_due(self) -> bool:
        """Whether `check` would take long."""

    def check(self) -> None:
        """Raise where nothing more may be written."""

    def writing(self) -> AbstractContextManager[None]:
        """Write inside of this; raises as `check` does."""


class Granted:
    """The leave of who owns what it writes to without doubt, since nobody else knows of it."""

    is_due = False

    def check(self) -> None:
        """Refuse nothing."""

    def writing(self) -> AbstractContextManager[None]:
        """Refuse nothing."""
        return nullcontext()


class GuardedStore(WrapperStore[Store]):
    """Asks for leave before each object that it writes, and knows what is not on the disk yet."""

    def __init__(self, store: Store, leave: Leave, folder: Path | None) -> None:
        """``folder`` is that of the store in a file system; None for a store that is durable."""
        super().__init__(store)
        self._leave, self._folder = leave, folder
        self._written: set[str] = set()
        self._known: set[Path] = set()
        """Folders whose own entry, and those of all that hold them, are on the disk."""
        self._syncing = threading.Lock()

    @classmethod
    def of(cls, place: Place, leave: Leave) -> GuardedStore:
        """Return the store of what lies there; objects in a bucket are durable as they are."""
        return cls(zarr_store(place), leave, place if isinstance(place, Path) else None)

    def _with_store(self, store: Store) -> GuardedStore:
        return GuardedStore(store, self._leave, self._folder)

    async def _set_many(self, values: Iterable[tuple[str, Buffer]]) -> None:
        for key, value in values:
            await self.set(key, value)

    async def set(self, key: str, value: Buffer) -> None:
        """Write an object, with leave."""
        await self._ask(key)
        if self._folder is not None and key.rpartition("/")[2] in METADATA:
            await asyncio.to_thread(self._replace, self._folder / key, value.to_bytes())
        else:
            await super().set(key, value)
        self._written.add(key)

    def _replace(self, path: Path, content: bytes) -> None:
        """Write metadata so that a power failure leaves the old or the new, never an empty file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        replace(path, content)

    async def set_if_not_exists(self, key: str, value: Buffer) -> None:
        """Write an object where there is none, with leave."""
        await self._ask(key)
        await super().set_if_not_exists(key, value)
        self._written.add(key)

    async def delete(self, key: str) -> None:
        """Remove an object, with leave."""
        await self._ask(key)
        await super().delete(key)
        self._written.add(key)

    async def _ask(self, key: str) -> None:
        """Raise where we may not write, or the way to an object leads out through a link."""
        if self._leave.is_due:
            await asyncio.to_thread(self._leave.check)
        if self._folder is not None:
            path = self._folder / key
            if path.is_symlink() or os.path.realpath(path.parent) != str(path.parent):
                raise OSError(f"{path} is a link")

    def sync(self) -> None:
        """Force to disk all that was written before this call, with the folders that hold it.

        Returns when it is there, whoever has forced it. Raises OSError where that fails.
        """
        if self._folder is None:
            self._written.clear()
            return
        with self._syncing:  # what another thread is just forcing to disk must be there, too
            keys = [self._written.pop() for _ in range(len(self._written))]
            try:
                paths = [self._folder / key for key in keys]
                for path in paths:
                    sync_file(path)
                for folder in {path.parent for path in paths}:
                    self._sync_file(folder)
            except BaseException:
                self._written.update(keys)
                raise

    def _sync_file(self, folder: Path) -> None:
        sync_file(folder)
        while folder not in self._known and folder != self._folder:
            self._known.add(folder)
            folder = folder.parent
            sync_file(folder)
