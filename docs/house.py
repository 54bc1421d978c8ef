"""Write the tables of docs/house.md from the contracts and the docstrings: python docs/house.py."""

from __future__ import annotations

import ast
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "house.md"
MARK = "<!-- Below: python docs/house.py -->\n"


def layers() -> list[list[str]]:
    """Return the floors of the house from the roof down, each the names that stand on it."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    (contract,) = (c for c in settings["contracts"] if c["type"] == "layers")
    return [[name.strip() for name in layer.split("|")] for layer in contract["layers"]]


def first_line(path: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
    return docstring.partition("\n")[0].removesuffix(".")


def tables() -> str:
    """Return a table of floors, and one of files for each wing."""
    package, floors, wings = ROOT / "tilepipe", [], []
    storeys = layers()
    for height, layer in zip(range(len(storeys), 0, -1), storeys, strict=True):
        for name in layer:
            wing = package / name
            path = wing / "__init__.py" if wing.is_dir() else package / f"{name}.py"
            floors.append((str(height), f"`{name}{'/' * wing.is_dir()}`", first_line(path)))
            if wing.is_dir():
                files = sorted(p for p in wing.glob("*.py") if p.stem != "__init__")
                rows = [(f"`{p.stem}`", first_line(p)) for p in files]
                wings.append(f"### {name}\n\n{_table(['file'], rows)}")
    return "\n\n".join([_table(["floor", "name"], floors), *wings]) + "\n"


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [[*heads, "what it is for"], ["---"] * (len(heads) + 1), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    text = PAGE.read_text().partition(MARK)[0]
    PAGE.write_text(text + MARK + "\n" + tables())
