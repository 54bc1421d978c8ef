"""Print the figures of the house: modules, wings, floors, arrows and circles of its imports.

``python docs/figures.py`` reads the imports of the installed package with grimp (which comes with
import-linter); imports for types alone do not count.
"""

from __future__ import annotations

from graphlib import CycleError, TopologicalSorter
from importlib.util import find_spec
from pathlib import Path

import grimp


def main() -> None:
    """Print the figures."""
    graph = grimp.build_graph("tilepipe", exclude_type_checking_imports=True, cache_dir=None)
    modules = {m: graph.find_modules_directly_imported_by(m) for m in graph.modules}
    wings: dict[str, set[str]] = {}
    for module, imported in modules.items():
        others = {_wing(other) for other in imported} - {_wing(module)}
        wings.setdefault(_wing(module), set()).update(others - {"tilepipe"})
    wings.pop("tilepipe", None)
    lines = sum(len(_path(m).read_text(encoding="utf-8").splitlines()) for m in modules)
    print(f"{len(modules)} modules, {lines} lines, {sum(map(len, modules.values()))} arrows")
    print(f"{len(wings)} names directly in the package, {sum(map(len, wings.values()))} arrows")
    print(f"{_floors(modules)} floors of modules, {_floors(wings)} floors of wings")


def _wing(module: str) -> str:
    return ".".join(module.split(".")[:2])


def _path(module: str) -> Path:

    spec = find_spec(module)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin)


def _floors(imports: dict[str, set[str]]) -> str:
    """Return the number of floors, or the circle that makes it impossible to count them."""
    floor: dict[str, int] = {}
    try:
        for name in TopologicalSorter(imports).static_order():
            floor[name] = 1 + max((floor[other] for other in imports.get(name, ())), default=0)
    except CycleError as error:
        return "a circle (" + " -> ".join(error.args[1]) + ") on the"
    return str(max(floor.values()))


if __name__ == "__main__":
    main()
