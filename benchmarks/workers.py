"""How workers on one machine add up: ``python benchmarks/workers.py``.

The same volume and tiles by the serial engine, by two of it side by side (an array of two tasks),
and by `dask` with 1, 2 and 4 workers; one compute thread each, every run in a process of its own.
Tiles per second are those between the first tile's end and the last's: planning and the start of
workers are told apart. A worker's compute thread is *busy* for some share of that; the driver's
CPU, with Dask's scheduler in it, is what the engine takes from the cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click
from cases import Case, prepare

if TYPE_CHECKING:
    from tilepipe.segmentation.report import Report

EDGE = 256
"""Voxels of a tile along each axis."""
MEMORY = 900_000_000
CONTENDERS = {
    "serial": (0, 1),
    "serial, twice side by side": (0, 2),
    "dask, 1 worker": (1, 1),
    "dask, 2 workers": (2, 1),
    "dask, 4 workers": (4, 1),
}
"""Dask's workers, 0 for the serial engine, and tasks of an array."""


def run(folder: Path, name: str, part: int) -> dict[str, float]:
    """Segment once in this process."""
    import tilepipe as tp
    from tilepipe.runs.array import ArrayTask

    workers, parts = CONTENDERS[name]
    times, cpu = list[float](), list[float]()

    def progress(report: Report) -> None:
        times.append(time.perf_counter())
        cpu.append(time.process_time())

    began = time.perf_counter()
    report = tp.segment(
        folder / "image.zarr", model=folder / "unet.pt", output=folder / f"{name}.zarr",
        engine="dask" if workers else "serial", workers=workers or None, progress=progress,
        task=ArrayTask(part, parts) if parts > 1 else None,
        options=tp.Options(tile=(EDGE, EDGE), chunks=(EDGE, EDGE), threads=1, memory=MEMORY,
                           device="cpu"),
    )  # fmt: skip
    span = times[-1] - times[0]
    return {
        "seconds": time.perf_counter() - began,
        "span": span,
        "rate": (len(times) - 1) / span,
        "driver": (cpu[-1] - cpu[0]) / (len(times) - 1),
        "compute": report.compute_seconds / report.done,
        "busy": report.compute_seconds / report.device_seconds,
    }


def measure(folder: Path, name: str) -> dict[str, float]:
    """Run a contender in processes of its own; of tasks side by side, all together."""
    command = [sys.executable, __file__, "--folder", str(folder), "--only", name, "--part"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    parts = range(1, CONTENDERS[name][1] + 1)
    running = [
        subprocess.Popen([*command, str(part)], env=env, stdout=subprocess.PIPE) for part in parts
    ]
    said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        raise click.ClickException(f"{name} failed")
    found = [json.loads(text.splitlines()[-1]) for text in said]
    whole = {key: sum(each[key] for each in found) / len(found) for key in found[0]}
    return {**whole, "rate": sum(each["rate"] for each in found)}


@click.command()
@click.option("--edge", default=24, show_default=True, help="Tiles along each of two axes.")
@click.option("--folder", type=click.Path(path_type=Path), hidden=True)
@click.option("--only", hidden=True)
@click.option("--part", type=int, hidden=True)
def main(edge: int, folder: Path | None, only: str | None, part: int | None) -> None:
    """Measure each contender in turn."""
    if folder is not None and only is not None and part is not None:
        click.echo(json.dumps(run(folder, only, part)))
        return
    alone = 0.0
    with tempfile.TemporaryDirectory() as made:
        architecture: dict[str, object] = {"ndim": 2, "base": 16, "depth": 4}
        shape = (edge * EDGE,) * 2
        prepare(Case(architecture, shape, (2 * EDGE,) * 2, MEMORY, (), (), ()), Path(made))
        for name in CONTENDERS:
            found = measure(Path(made), name)
            alone = alone or found["rate"]
            click.echo(
                f"| {name} | {found['seconds']:.1f} | {found['span']:.1f} | {found['rate']:.2f}"
                f" | {found['rate'] * EDGE**2 / 1e6:.2f} | {found['rate'] / alone:.2f}"
                f" | {found['compute'] * 1e3:.0f} | {100 * found['busy']:.0f} %"
                f" | {found['driver'] * 1e3:.1f} |"
            )


if __name__ == "__main__":
    main()
