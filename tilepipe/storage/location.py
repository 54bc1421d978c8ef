"""Where things lie: paths of a file system, and keys of an object store, under one set of verbs.

What both can do in the same words is done by their own methods (`ObjectKey` has those of
`pathlib.Path`). Here is what they do in different ways: creating exclusively, replacing whole,
and removing what someone dead has left.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from uuid import uuid4

from tilepipe.errors import BadRequest
from tilepipe.storage.objects import ObjectKey

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from zarr.abc.store import Store

Place = Path | ObjectKey
VACANT = b"vacant "
"""What an object begins with that counts as removed: `hold` may take its place."""
PATIENCE = 60.0
"""Seconds for which someone else may take to remove a file."""


def locate(path: str | Path, what: str) -> Place:
    """Return the place of an address or a path, links resolved; BadRequest for what is neither.

    ``what`` it is for is named in messages: ``source``, ``output``.

    >>> locate("s3://bucket/volume.zarr", "source").name
    'volume.zarr'
    """
    try:
        if "://" in str(path):
            return ObjectKey.parse(str(path))
        resolved = Path(path).resolve()
        resolved.exists()  # raises for a name that is too long and a folder that is locked
        return resolved
    except BadRequest as error:
        raise BadRequest(f"{what} is no place: {error}") from error
    except (OSError, ValueError, RuntimeError) as error:
        raise BadRequest(f"{what} (={path}) is no path: {error}") from error


def find(folder: Place, prefix: str) -> list[Place]:
    """Return what a folder holds whose name begins so, in order; nothing where there is none."""
    try:
        places: list[Place] = [path for path in folder.iterdir() if path.name.startswith(prefix)]
    except FileNotFoundError:
        return []
    return sorted(places, key=lambda path: path.name)


def can_list(place: Place) -> bool:
    """Return whether what a folder holds can be listed; not by HTTP."""
    return isinstance(place, Path) or place.can_write


def folders(folder: Place) -> list[Place]:
    """Return the folders in a folder, in order; nothing where they cannot be listed."""
    if isinstance(folder, ObjectKey):
        return list(folder.folders())
    try:
        return sorted(path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    except OSError:
        return []


def zarr_store(place: Place, *, read_only: bool = False) -> Store:
    """Return the Zarr store of what lies there."""
    from zarr.storage import LocalStore, ObjectStore  # heavy: paths are located without it

    if isinstance(place, Path):
        return LocalStore(place, read_only=read_only)
    return ObjectStore(place.store(), read_only=read_only)


def replace(place: Place, content: bytes) -> None:
    """Write a file so that it is the old one or the new one, never a part, and is on the disk."""
    if isinstance(place, ObjectKey):
        place.write_bytes(content)
        return
    with whole_file(place) as partial:
        partial.write_bytes(content)
    sync_file(place.parent)  # of the name itself


@contextmanager
def whole_file(path: Path, *, sync: bool = True) -> Iterator[Path]:
    """Give a path to write to; what was written there replaces ``path``, whole.

    Where the writing fails, ``path`` is left as it was. With ``sync`` what was written is forced to
    disk first; the folder's new name is not.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        if sync:
            sync_file(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync_file(path: Path) -> None:
    """Force a file to disk, or the names in a folder; what is gone meanwhile needs nothing.

    Raises OSError where the disk refuses.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def check_writable(folder: Place, probe: str) -> None:
    """Raise OSError where nothing can be created in a folder; leaves nothing there.

    In an object store, an object of the name ``probe`` is there for a moment.
    """
    if isinstance(folder, Path):
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("permission denied")
        with tempfile.TemporaryFile(dir=folder):  # permission bits do not bind the root user
            return
    if not folder.can_write:
        raise PermissionError(
            "HTTP is for reading; name a bucket (s3://, gs://, az://) or a folder"
        )
    key = folder / probe
    key.write_bytes(b"1", new=True)
    try:
        key.write_bytes(b"2", new=True)
    except FileExistsError:
        return
    finally:
        key.unlink()
    raise OSError(
        "its store creates again what exists, so two runs could write at once; it must know"
        " conditional writes (If-None-Match)"
    )


class Hold(Protocol):
    """A file that we have created exclusively, and may rewrite."""

    def rewrite(self, content: bytes) -> bool:
        """Write it anew; return False where it was seen that another has it now."""

    def close(self) -> None:
        """Close the file and leave it as it is."""


def hold(place: Place, content: bytes) -> Hold | None:
    """Create a file exclusively; None where there is one. On NFS, too, one of many gets it."""
    try:
        return _Object(place, content) if isinstance(place, ObjectKey) else _File(place, content)
    except FileExistsError:
        return None


class _File:
    """A file that is rewritten in place.

    Once it was removed, and created by another, that has no effect.
    """

    def __init__(self, path: Path, content: bytes) -> None:
        self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        self.rewrite(content)

    def rewrite(self, content: bytes) -> bool:
        os.pwrite(self._handle, content, 0)
        os.fsync(self._handle)
        return True

    def close(self) -> None:
        os.close(self._handle)


class _Object:
    """An object that is written over only where its store still has what we have written."""

    def __init__(self, key: ObjectKey, content: bytes) -> None:
        self._key = key
        try:
            self._tag = key.write_bytes(content, new=True)
        except FileExistsError:
            try:
                present, tag = key.read_tagged()
            except FileNotFoundError:
                raise FileExistsError(f"{key} was there just now") from None
            if not present.startswith(VACANT):
                raise
            self._tag = key.write_bytes(content, tag=tag)

    def rewrite(self, content: bytes) -> bool:
        try:
            self._tag = self._key.write_bytes(content, tag=self._tag)
        except FileExistsError:
            return False
        return True

    def close(self) -> None:
        pass


def remove_if(place: Place, holds: Callable[[bytes], bool]) -> None:
    """Remove a file while its content is such; of many who do so at once, none removes another."""
    if isinstance(place, ObjectKey):
        with suppress(FileNotFoundError, FileExistsError):
            content, tag = place.read_tagged()
            if holds(content):
                # Not deleted, which has no condition: what has come meanwhile would go.
                place.write_bytes(VACANT + uuid4().hex.encode(), tag=tag)
        return
    end = time.monotonic() + PATIENCE
    while (present := _content(place)) is not None and holds(present):
        mark = place.with_name(f"{place.name}.{hashlib.sha256(present).hexdigest()[:32]}")
        try:
            os.close(os.open(mark, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:  # another is about to remove it, or died just then
            time.sleep(0.01)
            if time.monotonic() > end:
                mark.unlink(missing_ok=True)
            continue
        if _content(place) == present:
            place.unlink(missing_ok=True)
        mark.unlink(missing_ok=True)


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None
