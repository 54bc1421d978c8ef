"""The folder that belongs to a training: what it may hold, who writes to it, what is removed."""

from __future__ import annotations

import shutil
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.runs.lease import Lease, Owner
from tilepipe.storage.names import FILES
from tilepipe.training.learner import check_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tilepipe.training.ranks import Team
    from tilepipe.training.recipe import Recipe

CONTENTS = (
    *("log.csv", "state.pt", "last.pt", "tensorboard", "held-out-*.zarr", "objects-*.zarr"),
    *("counts.npy", "grey-*.json"),
    *("objects-*.partial", "state.pt.*.partial", "last.pt.*.partial"),
)
"""The names of what a training leaves in its folder."""
SUFFIX = ".training"
"""How the name of a folder ends that a training chooses itself."""
MARK = ".tilepipe-training"
"""A file in the folder of every training, whatever that folder is called."""


def check_places(
    output: Path, folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool
) -> None:
    """Refuse an output or a folder that a training may not write to, before anything is written."""
    if output.suffix not in (".pt", ".pth"):
        raise BadRequest(f"output (={output}) must be a file that ends in .pt")
    if not output.parent.is_dir():
        raise BadRequest(f"output (={output}) must lie in a folder that exists")
    if resume and overwrite:
        raise BadRequest("resume goes on and overwrite begins anew; give one of them")
    if output.is_dir() or (folder.exists() and not folder.is_dir()):
        raise BadRequest(f"{output} must be a file and {folder} a folder; name others")
    if resume:
        check_recipe(folder / "state.pt", recipe)
    elif not overwrite and (paths := [p for p in (output, folder / "state.pt") if p.exists()]):
        raise BadRequest(
            f"output (={paths[0]}) is there already; go on with --resume, or replace it with"
            " --overwrite"
        )
    _check_contents(folder, resume=resume)


def _contents(folder: Path) -> list[Path]:
    """Return what an earlier training has left in a folder, by its names."""
    return [path for name in CONTENTS for path in folder.glob(name)]


def _check_contents(folder: Path, *, resume: bool) -> None:
    """Refuse a folder in which names of ours are something else: it would be lost."""
    contents = _contents(folder)
    if contents and not resume and folder.suffix != SUFFIX and not (folder / MARK).is_file():
        raise BadRequest(
            f"log (={folder}) holds {contents[0].name}, and no training of tilepipe made that"
            " folder; name another"
        )
    for entry in contents:
        inner = [entry, *entry.rglob("*")] if entry.is_dir() else [entry]
        for path in inner:
            name = str(path.relative_to(entry))
            is_file = path.is_symlink() or not path.is_dir()
            if path.is_symlink() or (is_file and path != entry and not _is_ours(name, entry.name)):
                raise BadRequest(
                    f"log (={folder}) holds {path.relative_to(folder)}, which tilepipe did not"
                    " write and never removes; move it away or name another folder"
                )


def _is_ours(name: str, above: str) -> bool:
    """Return whether a file belongs to an array, to an output, or to TensorBoard."""
    if above == "tensorboard":
        return name.startswith("events.out.tfevents.")
    return any(FILES.fullmatch(path) for path in (name, f"0/{name}"))


@contextmanager
def owned(folder: Path, team: Team) -> Iterator[None]:
    """Keep other trainings out of a folder, by a lease of the first of the processes.

    A folder that is new is removed again where the training ends before there is a state from
    which another run could go on.
    """
    if not team.first:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    lease = Lease.take(folder / "lock")
    if isinstance(lease, Owner):
        raise BadRequest(
            f"log (={folder}) is being written by another training ({lease}); wait for it, or name"
            " another output"
        )
    try:
        with closing(lease):
            yield
    finally:
        if new and not (folder / "state.pt").exists():
            _remove_contents(folder)
            (folder / MARK).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something into it
                folder.rmdir()


def begin(folder: Path) -> None:
    """Remove what an earlier training left in a folder, and nothing else; mark it as a training's.

    The state is removed last, without which no run goes on.
    """
    _remove_contents(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _remove_contents(folder: Path) -> None:
    for path in sorted(_contents(folder), key=lambda path: path.name == "state.pt"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
