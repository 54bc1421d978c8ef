"""What a million tiles cost the driver: memory, tiles per second, resume, and the plan itself.

Tiles do nothing, so what is measured is the engine, its scheduler and the ledger. Each part runs in
a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from tilepipe.engines import TileFailure, TileResult

EDGE = 110_080
"""Voxels along each axis of the planned volume: 1.33 petavoxels, 215^3 tiles of 512^3."""
THREADS = 3
"""Tiles in flight in a worker, as when tiles are read, computed and written."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """A job whose tiles do nothing."""

    key: str = "nothing"
    slots: int = THREADS

    def open(self) -> Callable[[int], TileResult]:
        """Return what does nothing for a tile."""
        from tilepipe.engines import TileResult

        return lambda index: TileResult(index, 1, 0, 0.0, 0.0, 0.0, "host:1")


def resident() -> float:
    """Return the megabytes that this process holds."""
    return psutil.Process().memory_info().rss / 1e6


def run_engine(engine: str, tiles: int, workers: int) -> None:
    """Run so many tiles with a real ledger; show memory and rate at every power of ten."""
    import scale  # under this name the workers find the job

    from tilepipe.engines import dask, serial
    from tilepipe.ledger import Ledger

    def follow(outcomes: Iterable[TileResult | TileFailure], ledger: Ledger) -> None:
        from tilepipe.engines import TileResult

        began, first = time.perf_counter(), resident()
        last, marked = began, 0
        for number, outcome in enumerate(outcomes, start=1):
            assert isinstance(outcome, TileResult)
            ledger.mark(outcome.index, outcome)
            if number in shown:
                now = time.perf_counter()
                rate = (number - marked) / (now - last)
                click.echo(
                    f"| {engine} | {number:,} | {rate:,.0f} | {1e3 / rate:.2f} |"
                    f" {resident():.0f} | {resident() - first:+.0f} |"
                )
                last, marked = now, number

    shown = {10**power for power in range(3, 9)} | {tiles}
    with tempfile.TemporaryDirectory() as folder:
        job, target = scale.Nothing(), Path(folder)
        with Ledger.create(target, {}, tiles=tiles) as ledger:
            if engine == "serial":
                follow(serial.run(job, ledger.remaining()), ledger)
                return
            with dask.local_client(workers, threads=THREADS, dashboard=False) as client:
                follow(dask.run(job, ledger.remaining(), client=client), ledger)


def run_resume(tiles: int) -> None:
    """Open a half-done ledger and find the first tile that is left."""
    from tilepipe.inspect import inspect
    from tilepipe.ledger import Ledger
    from tilepipe.engines import TileResult

    with tempfile.TemporaryDirectory() as folder:
        with Ledger.create(folder, {}, tiles=tiles) as ledger:
            for index in range(0, tiles, 2):
                ledger.mark(index, TileResult(index, 1, 0, 1.5, 2.5, 3.5, f"node{index % 100}:1"))
        before, began = resident(), time.perf_counter()
        opened = Ledger.open(folder)
        assert opened is not None
        with opened:
            assert sum(1 for _ in opened.remaining()) == tiles // 2
        click.echo(f"| resume | {tiles:,} | {time.perf_counter() - began:.2f} s |"
                   f" {resident() - before:+.0f} MB |")  # fmt: skip
        kept = sorted((path.name, path.stat().st_size) for path in Path(folder, ".tilepipe").iterdir())
        click.echo(f"files: {kept}")


def run_plan(folder: Path) -> None:
    """Plan a petavoxel volume; imports and the first, small plan are not counted."""
    import zarr

    import tilepipe as tp

    before, began = resident(), time.perf_counter()
    zarr.create_array(folder / "v.zarr", shape=(EDGE,) * 3, chunks=(128,) * 3, dtype="uint8",
                      shards=(512,) * 3, dimension_names=list("zyx"))  # fmt: skip
    for tile in ((512, 512, 512), None):
        options = tp.Options(tile=tile, memory=8_000_000_000, device="cpu")
        before, began = resident(), time.perf_counter()
        made = tp.plan(folder / "v.zarr", model=folder / "net.pt", options=options)
        click.echo(f"| plan | {made.costs.tiles:,} | {time.perf_counter() - began:.2f} s |"
                   f" {resident() - before:+.0f} MB | {made.costs.files:,} files | {made.sizes} |")  # fmt: skip


@click.command()
@click.argument("part", type=click.Choice(["plan", "serial", "dask", "resume"]))
@click.option("--tiles", type=int, default=100_000)
@click.option("--workers", type=int, default=1)
def main(part: str, tiles: int, workers: int) -> None:
    """Measure one part."""
    if part == "plan":
        with tempfile.TemporaryDirectory() as folder:
            run_plan(Path(folder))
    elif part == "resume":
        run_resume(tiles)
    else:
        run_engine(part, tiles, workers)


if __name__ == "__main__":
    main()
