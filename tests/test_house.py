"""The house: arrows point one way, and nothing heavy is imported before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest

import tilepipe

ROOT = Path(tilepipe.__file__).parent
ORDER = [
    "cli", "arguments", "demo", "inspect", "describe", "evaluate", "train", "trainlog", "loader",
    "learner", "study", "material", "validate", "recipe", "patches", "census", "team", "stop",
    "cli", "arguments", "demo", "inspect", "describe", "evaluate", "train", "trainlog", "loader",
    "learner", "study", "material", "validate", "recipe", "patches", "census", "team", "stop",
    "segment", "begin", "cluster", "worker", "ledger", "fence", "claim", "progress", "engines",
    "plan", "identity", "units", "tiling", "checks", "activation", "source", "options", "cache",
    "position", "slices", "normalize", "quantiles", "predict", "regions", "machine", "feed",
    "footprint", "profile", "trial", "windows", "probe", "meaning", "channels", "ranges", "calls",
    "model", "intake", "factory", "checkpoint", "cost", "rehearsal", "sweep", "course", "compute",
    "constants", "interpolation", "transfer", "allocator", "rows", "network", "kernels",
    "operations", "readings", "rules", "program", "vocabulary", "unet", "losses", "targets",
    "augment", "overlay", "synthetic", "instances", "warping", "scores", "target", "guarded",
    "contents", "volume", "images", "dimensions", "ome", "tiff", "calibration", "place", "bucket",
    "geometry", "process", "errors",
]  # fmt: skip
"""Every module; an import may only point down this list."""
KNOWS_NOT = {
    "network": {"zarr", "dask", "distributed"},
    "windows": {"zarr", "dask", "distributed", "torch"},
    "volume": {"torch", "dask", "distributed"},
    "target": {"torch", "dask", "distributed"},
    "instances": {"torch", "dask", "distributed"},
    "scores": {"torch", "zarr", "dask", "distributed", "tilepipe"},
    "evaluate": {"torch", "dask", "distributed"},
    "engines": {"torch", "zarr"},
    "targets": {"torch", "zarr", "dask", "distributed"},
    "augment": {"torch", "zarr", "dask", "distributed"},
    "losses": {"zarr", "dask", "distributed"},
    "geometry": {"torch", "zarr", "dask", "distributed", "tilepipe"},
    "plan": {"dask", "distributed"},
}


def modules() -> dict[Path, str]:
    found = {
        path: path.relative_to(ROOT).parts[0].removesuffix(".py") for path in ROOT.rglob("*.py")
    }
    return {path: name for path, name in found.items() if name not in ("__init__", "networks")}


def imported(path: Path) -> set[tuple[str, bool]]:
    """Return dotted names, and whether they are imported for types only."""
    tree = ast.parse(path.read_text())
    typed = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {(alias.name, id(node) in typed) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {(name, id(node) in typed) for name in names}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.stem)
def test_imports_point_down_the_house(path: Path) -> None:
    name = modules()[path]
    place = ORDER.index(name)
    for dotted, typed in imported(path):
        parts = dotted.split(".")
        assert typed or parts[0] not in KNOWS_NOT.get(name, set()), f"{name} imports {dotted}"
        if parts[0] == "tilepipe" and parts[1] in ORDER and not typed:
            assert ORDER.index(parts[1]) >= place, f"{name} imports {dotted}, above it"


def test_files_stay_small() -> None:
    long = {p.name for p in modules() if len(p.read_text().splitlines()) > 450}
    assert not long


@pytest.mark.parametrize("command", [["-c", "import tilepipe"], ["-m", "tilepipe.cli", "--help"]])
def test_nothing_heavy_is_imported_before_it_is_used(command: list[str]) -> None:
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", *command], capture_output=True, text=True, check=True
    )
    heavy = {line.rsplit("|", 1)[-1].strip() for line in shown.stderr.splitlines()}
    assert not heavy & {"torch", "dask", "distributed", "zarr", "numpy", "tifffile"}


def test_modules_do_not_hide_the_functions_of_their_name() -> None:
    code = (
        "import tilepipe.segment, tilepipe.plan, tilepipe.evaluate, tilepipe as tp;"
        "assert callable(tp.segment) and callable(tp.plan) and callable(tp.evaluate)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - began < 60
