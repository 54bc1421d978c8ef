"""The user's own code that builds a network: where it lies, and which of its files decide.

Only what ``--network`` names is imported, with what that imports itself.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, cast

from torch import nn

from tilepipe.errors import BadRequest
from tilepipe.host.process import undisturbed
from tilepipe.text import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import ModuleType

INIT = "__init__.py"
_run: dict[tuple[Path, str], ModuleType] = {}
"""Files that were run, by the digest of their code: a second copy would take its memory twice."""
_building = threading.RLock()
"""Held while a network is built: what that changes of the process is put back in turn."""
_imported: dict[Path, str] = {}
"""Digest of each file as it was when it was imported: code that has changed is imported anew."""


@dataclass(frozen=True, slots=True)
class Factory:
    """A function or a class that builds a network, and where its code lies."""

    module: str
    """The full name of what is imported, also where a file was named."""
    name: str
    file: Path | None
    """The file that was named; None for a module."""
    roots: tuple[Path, ...]
    """Where imports begin while it builds a network, first of all; none for installed code."""


def find_factory(network: str, folder: Path) -> Factory:
    """Return what ``package.module:factory`` or ``file.py:factory`` means in a working directory.

    A package that is not installed is looked for in ``folder``. What the file, or that package,
    imports may lie beside it.
    """
    place, _, name = network.rpartition(":")
    if not place or not name:
        raise BadRequest(
            f"network (={network}) must read package.module:factory or file.py:factory"
        )
    if not place.endswith(".py"):
        local = _lies_in(folder, place.split(".")[0], network)
        return Factory(place, name, None, (folder,) if local else ())
    file = (folder / place).resolve()
    if not file.is_file():
        raise BadRequest(f"network (={network}) cannot be built: there is no {file}")
    top, parts = file.parent, [file.stem] if file.name != INIT else []
    while (top / INIT).is_file() and top.name.isidentifier():
        top, parts = top.parent, [top.name, *parts]
    roots = (top,) if top == file.parent else (top, file.parent)
    return Factory(".".join(parts) or file.stem, name, file, roots)


def build_network(
    network: str, arguments: Mapping[str, object], folder: Path | None = None
) -> nn.Module:
    """Call the user's factory; ``folder`` is the working directory that the user named it in.

    What it changes of the process while it builds the network, such as torch's default type or a
    random state, is put back.
    """
    folder = folder or Path.cwd()
    factory = find_factory(network, folder)
    _check_loaded(network, factory)
    _forget_changed(factory)
    try:
        with _building, undisturbed(), _importable(factory.roots):
            code = _load(factory)
            build = cast("Callable[..., object]", getattr(code, factory.name))
            module = build(**arguments)
    except Exception as error:  # whatever the user's code raises
        beside = f"{factory.module}.py"
        hint = f"; did you mean {beside}:{factory.name}?" if (folder / beside).is_file() else ""
        raise BadRequest(
            f"network (={network}) cannot be built:"
            f" {type(error).__name__}: {first_line(error)}{hint}"
        ) from error
    if not isinstance(module, nn.Module):
        raise BadRequest(f"network (={network}) gave {type(module).__name__}, not an nn.Module")
    return module


def code_of(factory: Factory) -> dict[Path, str]:
    """Return the files of a factory's code, each with the name that it is imported by.

    They are its own and those beside it that it imports, as the text of the code says, so that they
    are the same in every process; the first is the one that was named. None of installed code.
    """
    if not factory.roots:
        return {}
    top = factory.roots[0]
    files = dict(_modules(top, factory.module.split(".")))
    if factory.file is not None:
        files = {factory.file: factory.module}
    todo = list(files)
    while todo:
        file = todo.pop()
        stat = file.stat()
        for level, parts in _imports(file, stat.st_mtime_ns, stat.st_size):
            places = [(root, parts) for root in factory.roots]
            if level:
                base = file.parents[level - 1]
                places = [(top, [*base.relative_to(top).parts, *parts])] * base.is_relative_to(top)
            for root, dotted in places:
                new = {path: name for path, name in _modules(root, dotted) if path not in files}
                files |= new
                todo += new
    first = list(files)[:1]
    return {file: files[file] for file in first + sorted(set(files) - set(first))}


def digest_of(factory: Factory) -> str:
    """Return a digest of a factory's code; that of installed code is empty."""
    digest = hashlib.sha256()
    for file in code_of(factory):
        digest.update(file.read_bytes())
    return digest.hexdigest() if factory.roots else ""


def _lies_in(folder: Path, top: str, network: str) -> bool:
    """Whether a package is to be taken from a folder; one that is installed, too, is refused."""
    file, package = folder / f"{top}.py", folder / top
    if not (file.is_file() or package.is_dir()) or not top:
        return False
    try:
        spec = importlib.util.find_spec(top)
    except ValueError:  # of the main module of a notebook
        return False
    if spec is None:
        return True
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if all(Path(place).resolve().is_relative_to(folder.resolve()) for place in places):
        return True
    if file.is_file() or (package / INIT).is_file():
        here = file if file.is_file() else package / INIT
        raise BadRequest(
            f"network (={network}) is in this folder and installed, too, in {places[0]}: name its"
            f" file, as {here.relative_to(folder)}:{network.rpartition(':')[2]}, or work elsewhere"
        )
    return False


def _load(factory: Factory) -> ModuleType:
    """Import a module, or run a named file, anew if any of its code has changed."""
    file, name = factory.file, factory.module
    if file is None:
        return importlib.import_module(name)
    key = file, digest_of(factory)
    if key not in _run:
        inside = [str(file.parent)] if file.name == INIT else None
        spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=inside)
        if spec is None or spec.loader is None:
            raise ImportError(str(file))
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        _run[key] = code
    return _run[key]


def _forget_changed(factory: Factory) -> None:
    """Let code be imported anew of which any file has changed since it was imported."""
    code = code_of(factory)
    digests = {file: hashlib.sha256(file.read_bytes()).hexdigest() for file in code}
    if any(_imported.get(file, digest) != digest for file, digest in digests.items()):
        for name in code.values():
            sys.modules.pop(name, None)
    _imported.update(digests)


@contextmanager
def _importable(roots: tuple[Path, ...]) -> Iterator[None]:
    """Let imports find what lies in these folders, before all else, as Python does for a script."""
    before = list(sys.path)
    sys.path[:0] = [str(root) for root in roots]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _check_loaded(network: str, factory: Factory) -> None:
    """Refuse code in whose place a module of the same name, from elsewhere, would be taken."""
    for file, name in code_of(factory).items():
        loaded = getattr(sys.modules.get(name), "__file__", None)
        ours = file == factory.file and file.name != INIT  # which is not looked up by its name
        if not ours and loaded and Path(loaded).resolve() != file.resolve():
            raise BadRequest(
                f"network (={network}) needs {file}; this process has loaded {name} from"
                f" {loaded}: rename one of them, or begin a new process"
            )


def _modules(root: Path, parts: list[str]) -> Iterator[tuple[Path, str]]:
    """Yield what importing a dotted name from a folder reads, outermost first, with its name."""
    for n in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:n])
        for file in (place / INIT, place.with_name(f"{place.name}.py")):
            if file.is_file():
                yield file, ".".join(parts[:n])
                break


@lru_cache(maxsize=4096)
def _imports(file: Path, changed: int, size: int) -> list[tuple[int, list[str]]]:
    """Return what a file imports: the dots before the name, and its parts.

    Python's own library is not looked for beside it, nor is this one.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):  # which importing it would say, if it is imported at all
        return []
    imports: list[tuple[int, list[str]]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(0, alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = node.module.split(".") if node.module else []
            imports += [(node.level, [*parts, alias.name]) for alias in node.names]
    skipped = {*sys.stdlib_module_names, "tilepipe"}
    return [(level, parts) for level, parts in imports if level or parts[0] not in skipped]
