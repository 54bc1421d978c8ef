"""What a million tiles cost the driver: memory, tiles per second, resume, and the plan itself.

Tiles do nothing, so what is measured is the engine, its scheduler and the ledger. Each part runs in
a process of its own.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tilepipe.engines import TileFailure, TileResult
    from tilepipe.runs.ledger import Ledger
    from tilepipe.volumes.output import Output

EDGE = 110_080
"""Voxels along each axis of the planned volume: 1.33 petavoxels, 215^3 tiles of 512^3."""
THREADS = 3
"""Tiles in flight in a worker, as when tiles are read, computed and written."""


@dataclass(frozen=True, slots=True)
class Nothing:
    """A job whose tiles do nothing."""

    key: str = "nothing"
    slots: int = THREADS

    def open(self) -> Idle:
        """Return what does nothing for a tile."""
        return Idle()


class Idle:
    """What does nothing for a tile."""

    def __call__(self, index: int) -> TileResult:
        """Return a result at once."""
        from tilepipe.engines import TileResult

        return TileResult(index, 1, 0, 0.0, 0.0, 0.0, "host:1")

    def close(self) -> None:
        """Do nothing: nothing is being written."""


def resident() -> float:
    """Return the megabytes that this process holds."""
    return psutil.Process().memory_info().rss / 1e6


def new_ledger(output: Output, tiles: int) -> Ledger:
    """Begin a ledger for so many tiles, open for writing."""
    from tilepipe.runs.ledger import Ledger, lay_plan, take_lease

    lease = take_lease(output)
    return Ledger(output, lay_plan(output, {}, tiles=tiles), tiles=tiles, lease=lease)


def run_engine(engine: str, tiles: int, workers: int, output: str | None) -> None:
    """Run so many tiles with a real ledger; show memory and rate at every power of ten."""
    import scale  # under this name the workers find the job

    from tilepipe.engines import dask, serial
    from tilepipe.volumes.output import Output

    def follow(outcomes: Iterable[TileResult | TileFailure], ledger: Ledger) -> None:
        from tilepipe.engines import TileResult

        first, last, cpu, marked = resident(), time.perf_counter(), time.process_time(), 0
        for number, outcome in enumerate(outcomes, start=1):
            assert isinstance(outcome, TileResult)
            ledger.mark(outcome.index, outcome)
            if number in shown:
                now = time.perf_counter()
                rate = (number - marked) / (now - last)
                busy = (time.process_time() - cpu) / (number - marked) * 1e3
                click.echo(
                    f"| {engine} | {number:,} | {rate:,.0f} | {busy:.2f} |"
                    f" {resident():.0f} | {resident() - first:+.0f} |"
                )
                last, cpu, marked = now, time.process_time(), number

    shown = {10**power for power in range(3, 9)} | {tiles}
    with tempfile.TemporaryDirectory() as folder:
        job, target = scale.Nothing(), Output.at(output or folder)
        with new_ledger(target, tiles) as ledger:
            if engine == "serial":
                follow(serial.run(job, ledger.remaining()), ledger)
                return
            with dask.local_client(workers, threads=THREADS, dashboard=False) as client:
                follow(dask.run(job, ledger.remaining(), client=client), ledger)


def run_resume(tiles: int, output: str | None) -> None:
    """Open a half-done ledger and find the first tile that is left."""
    from tilepipe.engines import TileResult
    from tilepipe.runs.ledger import Ledger
    from tilepipe.storage.location import find
    from tilepipe.volumes.output import Output

    with tempfile.TemporaryDirectory() as folder:
        target = Output.at(output or folder)
        with new_ledger(target, tiles) as ledger:
            for index in range(0, tiles, 2):
                ledger.mark(index, TileResult(index, 1, 0, 1.5, 2.5, 3.5, f"node{index % 100}:1"))
        before, began = resident(), time.perf_counter()
        opened = Ledger.open(target)
        assert opened is not None
        with opened:
            assert sum(1 for _ in opened.remaining()) == tiles // 2
        click.echo(f"| resume | {tiles:,} | {time.perf_counter() - began:.2f} s |"
                   f" {resident() - before:+.0f} MB |")  # fmt: skip
        kept = sorted(
            (path.name, len(path.read_bytes())) for path in find(target.ledger.folder, "")
        )
        click.echo(f"{len(kept)} files, {sum(size for _, size in kept):,} bytes")


def run_plan(folder: Path) -> None:
    """Plan a petavoxel volume; imports and the first, small plan are not counted."""
    import torch
    import zarr

    import tilepipe as tp
    from tilepipe.models.checkpoint import save_checkpoint
    from tilepipe.models.unet import UNet

    torch.set_num_threads(1)
    shape: dict[str, object] = {"ndim": 3, "base": 16, "depth": 4}
    save_checkpoint(folder / "net.pt", UNet(ndim=3, base=16, depth=4), architecture=shape,
                    normalize="scale:0.004,0", labels=["one", "two"], provenance={})  # fmt: skip
    for name, edge in (("s.zarr", 64), ("v.zarr", EDGE)):
        zarr.create_array(folder / name, shape=(edge,) * 3, dtype="uint8", chunks=(64,) * 3,
                          dimension_names=list("zyx"))  # fmt: skip
    tp.plan(folder / "s.zarr", model=folder / "net.pt")  # imports what planning needs
    click.echo(f"imports and a small plan: {resident():.0f} MB")
    for tile in ((512,) * 3, None):
        options = tp.Options(tile=tile, memory=8_000_000_000, device="cpu")
        before, began = resident(), time.perf_counter()
        made = tp.plan(folder / "v.zarr", model=folder / "net.pt", options=options)
        click.echo(
            f"| {made.costs.tiles:,} | {made.sizes.tile} | {time.perf_counter() - began:.1f} |"
            f" {resident() - before:+.0f} | {made.costs.files:,} | {made.sizes.shards} |"
        )


@click.command()
@click.argument("part", type=click.Choice(["plan", "serial", "dask", "resume"]))
@click.option("--tiles", type=int, default=100_000)
@click.option("--workers", type=int, default=1)
@click.option("--output", help="An empty place for the ledger, such as s3://bucket/path.")
def main(part: str, tiles: int, workers: int, output: str | None) -> None:
    """Measure one part."""
    if part == "plan":
        with tempfile.TemporaryDirectory() as folder:
            run_plan(Path(folder))
    elif part == "resume":
        run_resume(tiles, output)
    else:
        run_engine(part, tiles, workers, output)


if __name__ == "__main__":
    main()
