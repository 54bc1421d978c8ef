"""One page about a training and its held-out part, with pictures: what the workflows end with."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.geometry import parse_region
from tilepipe.models.model import load_model
from tilepipe.volumes.overlay import dice, write_overlay
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

PICTURES = 4


def pictures(options: argparse.Namespace) -> list[str]:
    """Write overlays of some planes of the held-out region, and return a line for each."""
    image, found, truth = map(open_volume, (options.image, options.prediction, options.labels))
    region = parse_region(options.region, image.shape)
    grey = image.read(region).mean(axis=0)
    answer = found.read(region)[0] == options.show
    wanted = one_of(truth.read(region)[0], options.truth)
    if options.membrane_of_objects:
        from tilepipe.training.targets import class_map

        wanted = class_map(truth.read(region)[0].astype(np.int64), "membrane") == 1
    if grey.ndim == 2:
        grey, answer, wanted = grey[None], answer[None], wanted[None]
    lines = []
    for plane in np.unique(np.linspace(0, len(grey) - 1, PICTURES).astype(int)):
        name = f"plane-{plane:03d}.png"
        write_overlay(options.output / name, grey[plane], answer[plane], wanted[plane])
        lines.append(
            f"Plane {plane} of the region, Dice {dice(answer[plane], wanted[plane]):.4f}\n\n"
            f"![]({name})"
        )
    return lines


def one_of(values: NDArray[np.generic], labels: Sequence[int]) -> NDArray[np.bool_]:
    """Return which values are one of the labels; `numpy.isin` rounds integers of 64 bits."""
    found = np.zeros(values.shape, bool)
    for label in labels:
        found |= values == label
    return found


def table(rows: list[tuple[str, object]]) -> str:
    """Return rows of names and values as a table of Markdown."""
    shown = [(name, f"{value:.4f}" if isinstance(value, float) else value) for name, value in rows]
    return "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in shown)])


def numbers(value: object, name: str = "") -> list[tuple[str, object]]:
    """Return all numbers of nested dicts with their dotted names."""
    if isinstance(value, dict):
        return [
            row for key, part in value.items() for row in numbers(part, f"{name}.{key}".strip("."))
        ]
    return [(name, value)] if isinstance(value, int | float | str) else []


def thresholds(files: list[Path]) -> str:
    """Return the scores at each threshold, which the names of the files end with."""
    rows = ["| threshold | pixel error | V-Rand | V-Info |", "|---|---|---|---|"]
    for path in sorted(files):
        found = json.loads(path.read_text())
        thinned = found["thinned"]
        shown = (
            found["pixels"]["pixel_error"], thinned["v_rand"]["score"], thinned["v_info"]["score"]
        )  # fmt: skip
        rows.append(
            f"| {path.stem.rpartition('-')[2]} | " + " | ".join(f"{x:.4f}" for x in shown) + " |"
        )
    return "\n".join([*rows, "", "V-Rand and V-Info after thinning; the challenge takes the best."])


def validations(log: Path) -> list[tuple[str, object]]:
    """Return the steps of a training's validations, with their errors."""
    with log.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["error"]]
    return [
        (f"step {row['step']}, {float(row['seconds']) / 60:.1f} minutes", float(row["error"]))
        for row in rows
    ]


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("title")
    for name in ("image", "labels", "prediction", "model", "output"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--scores", type=Path, nargs="+", required=True, help="as evaluate --json")
    parser.add_argument("--region", required=True, help="what was held out")
    parser.add_argument("--show", type=int, default=1, help="class that is painted")
    parser.add_argument("--truth", type=int, nargs="+", default=[1], help="labels that it is")
    parser.add_argument("--membrane-of-objects", action="store_true")
    options = parser.parse_args()
    model = load_model(options.model)
    recipe = model.provenance["recipe"]
    assert isinstance(recipe, dict)
    log = options.model.with_name(f"{options.model.name}.training") / "log.csv"
    parts = [
        f"# {options.title}",
        "Green: found. Red: found, but not in the labels. Blue: in the labels, but not found.",
        *pictures(options),
        "## Scores of the held-out region",
        table(numbers(json.loads(options.scores[0].read_text())))
        if len(options.scores) == 1
        else thresholds(options.scores),
        "## The training",
        table([(name, value) for name, value in sorted(recipe.items()) if value is not None]),
    ]
    if log.is_file():
        parts += ["## Share of wrong voxels at each validation", table(validations(log))]
    (options.output / "report.md").write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
