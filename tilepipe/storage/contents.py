"""What an output holds: nothing but what has a name of ours is ever written to or removed.

Law: what lies outside an output's own folder, or in it and is not of ours, is the same after any
run. Links are never ours, whatever their name, nor is what is mounted there.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import psutil

from tilepipe.errors import BadRequest
from tilepipe.storage.location import find, sync_file
from tilepipe.storage.names import DONE, FILES, FOLDERS, LEDGER, LOG, MARKS, PLAN, is_lock, is_plan
from tilepipe.storage.objects import remove_keys

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from tilepipe.storage.location import Place
    from tilepipe.storage.objects import ObjectKey

Holding = Literal["nothing", "a file", "leases", "more"]
"""What lies at a place: a folder that is empty, or holds leases only, is ``leases``."""


def look(place: Place) -> Holding:
    """Return what lies at a place; of a folder no more is listed than it takes to know that.

    A lease is of someone who is about to write there, so it does not keep a place from being free.
    """
    if isinstance(place, Path):
        if not place.is_dir():
            return "a file" if place.exists() else "nothing"
        names = _names_in_folder(place)
    else:
        names = _names_of_objects(place)
    name = next(names, None)
    if name is None and not isinstance(place, Path):
        return "a file" if place.path and place.is_file() else "nothing"
    while name is not None and is_lock(name):
        name = next(names, None)
    return "leases" if name is None else "more"


def _names_in_folder(folder: Path) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name == LEDGER and path.is_dir() and not path.is_symlink():
            yield from (f"{LEDGER}/{inner.name}" for inner in path.iterdir())
        else:
            yield path.name


def _names_of_objects(key: ObjectKey) -> Iterator[str]:
    for inner, size in key.objects():
        name = inner.path.removeprefix(key.path).strip("/")
        if size or (name and not FOLDERS.fullmatch(name)):  # empty ones show folders
            yield name


def check_ways(output: Place) -> None:
    """Raise BadRequest where what we write first leads out of the output: a look at a few names."""
    if isinstance(output, Path) and output.is_dir():
        _check_mounts(output)
        names = [output / name for name in (*MARKS, "0", "0/c", "0/zarr.json", LEDGER)]
        for path in names:
            _check_link(output, path)
        for entry in find(output / LEDGER, ""):
            _check_link(output, output / LEDGER / entry.name)
        for name in (*MARKS, "0/zarr.json", "0/.zarray", "0/.zattrs"):
            _check_file(output, name)
        for name in (PLAN, DONE, LOG):
            _check_file(output, f"{LEDGER}/{name}")


def _check_file(output: Path, name: str) -> None:
    if (output / name).is_dir():
        raise BadRequest(
            f"output (={output}) is damaged: {name} is a folder where a file should be; move it"
            " away or name another path"
        )


def check_ours(output: Place) -> None:
    """Raise BadRequest where an output holds anything that we did not write; looks at all of it."""
    if isinstance(output, Path):
        _check_mounts(output)
    for _ in _walk(output, ""):
        pass


def clear(output: Place) -> None:
    """Remove what an output holds, but for leases on it; raises BadRequest as `check_ours` does.

    Law: stopped at any moment, it leaves an output that is known as ours, and in which no tile is
    taken for finished whose voxels are gone. What finished tiles say goes first, the plan last.
    """
    ledger = output / LEDGER
    _drop(path for path, name in _walk(output, LEDGER) if not _stays(name) and not is_plan(name))
    if isinstance(ledger, Path) and ledger.is_dir():
        sync_file(ledger)  # before any voxel goes
    _drop(path for path, _ in _walk(output, "0"))
    if not isinstance(output, Path):
        (output / "0").unlink()  # some stores show what is empty now
    rest = {name: path for path, name in _walk(output, "") if not name.startswith(LEDGER)}
    order = ["", *MARKS]  # what is no mark first
    _drop(rest[n] for n in sorted(rest, key=lambda n: order.index(n if n in MARKS else "")))
    _drop(path for path, name in _walk(output, LEDGER) if is_plan(name))


def remove(output: Place) -> None:
    """Remove an output and its folder; raises BadRequest as `check_ours` does."""
    check_ours(output)
    clear(output)
    if isinstance(output, Path):
        with suppress(FileNotFoundError):
            (output / LEDGER).rmdir()
        output.rmdir()


def _stays(name: str) -> bool:
    """Return whether it is the ledger's folder, or a lease, such as that of ours."""
    return name == LEDGER or is_lock(name)


def _walk(output: Place, inner: str) -> Iterator[tuple[Place, str]]:
    """Yield what lies in a part of an output and then the part, each with its name in the output.

    Nothing where there is no such part. Raises BadRequest where something is not ours.
    """
    if not isinstance(output, Path):
        for key, size in (output / inner if inner else output).objects():
            name = key.path.removeprefix(output.path).strip("/")
            if not size and (not name or FOLDERS.fullmatch(name)):
                continue  # by which some show folders
            if not FILES.fullmatch(name):
                raise _foreign(output, name)
            yield key, name
        return
    try:
        entries = sorted(os.scandir(output / inner), key=lambda entry: entry.name)
    except FileNotFoundError:
        return
    for entry in entries:
        name = f"{inner}/{entry.name}" if inner else entry.name
        if entry.is_symlink():
            raise _link(output, name)
        if entry.is_dir(follow_symlinks=False):
            if not FOLDERS.fullmatch(name):
                raise _foreign(output, name)
            yield from _walk(output, name)
        elif FILES.fullmatch(name) and entry.is_file(follow_symlinks=False):
            yield output / name, name
        else:
            raise _foreign(output, name)
    if inner:
        yield output / inner, inner


def _drop(places: Iterable[Place]) -> None:
    keys = []
    for place in places:
        if isinstance(place, Path):
            place.rmdir() if place.is_dir() else place.unlink()
        else:
            keys.append(place)
            if len(keys) == 1000:
                remove_keys(keys)
                keys = []
    remove_keys(keys)


def _check_mounts(output: Path) -> None:
    for mount in psutil.disk_partitions(all=True):
        place = Path(mount.mountpoint)
        if output in place.parents:
            raise BadRequest(
                f"output (={output}) holds {place.relative_to(output)}, where another file system"
                " is mounted; unmount it or name another path"
            )


def _check_link(output: Path, path: Path) -> None:
    if path.is_symlink():
        raise _link(output, str(path.relative_to(output)))


def _link(output: Place, name: str) -> BadRequest:
    return BadRequest(
        f"output (={output}) holds {name}, a link, through which tilepipe never writes or removes;"
        " put what it leads to in its place, or name another path"
    )


def _foreign(output: Place, name: str) -> BadRequest:
    return BadRequest(
        f"output (={output}) holds {name}, which tilepipe did not write and never removes; move it"
        " away or name another path"
    )
