"""The house: files stay small, and nothing heavy is imported before it is used.

That imports point one way, the contracts in pyproject.toml say, which import-linter keeps.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

import tilepipe

ROOT = Path(tilepipe.__file__).parent
DOCS = ROOT.parent / "docs"


def test_the_page_says_what_the_files_say() -> None:
    page = (DOCS / "house.md").read_text()
    rendered = subprocess.run(
        [sys.executable, "-c", "import house; print(house.MARK + '\\n' + house.tables(), end='')"],
        cwd=DOCS, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert page.endswith(rendered), "run: python docs/house.py"


def test_files_stay_small() -> None:
    long = {p.name for p in ROOT.rglob("*.py") if len(p.read_text().splitlines()) > 450}
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
        "import tilepipe.segmentation.segment, tilepipe.planning.plan;"
        "import tilepipe.evaluation.evaluate, tilepipe as tp;"
        "assert callable(tp.segment) and callable(tp.plan) and callable(tp.evaluate)"
    )
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.monotonic() - began < 60
