"""What durable tiles cost: the same run with and without them, in turn, each in a process.

Whole commands are timed, so the planning is in both. The network that costs nothing shows the
worst; chunks are forced to disk by the thread that writes them, while the next tile is computed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click
import numpy as np
import torch
import zarr
from torch import nn

from tilepipe.models.unet import UNet

CASES = {
    "one 3x3 convolution": lambda: nn.Conv2d(1, 2, 3, padding=1),
    "the paper's U-Net, base 8": lambda: UNet(ndim=2, base=8),
}


def run(folder: Path, name: str, chunk: int, edge: int, kind: str) -> float:
    """Return the seconds of one command."""
    output = folder / "out.zarr"
    shutil.rmtree(output, ignore_errors=True)
    command = [
        str(Path(sys.executable).with_name("tilepipe")), "segment", str(folder / "v.zarr"),
        "--model", str(folder / f"{name}.pt2"), "-o", str(output), "--write", "probabilities",
        "--tile", f"{edge},{edge}", "--chunks", f"{chunk},{chunk}", "--engine", "serial",
        "--activation", "softmax", "--normalize", "scale:0.004,0", f"--{kind}",
    ]  # fmt: skip
    subprocess.run(["sync"], check=True)
    began = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - began


@click.command()
@click.option("--size", default=4096, show_default=True, help="Pixels along each axis.")
@click.option("--repeats", default=5, show_default=True, help="Pairs of runs.")
@click.option("--folder", type=click.Path(path_type=Path), help="Where files lie. [temporary]")
def main(size: int, repeats: int, folder: Path | None) -> None:
    """Time pairs of durable and fast runs, and print a table of ratios."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        where = Path(place)
        image = np.random.default_rng(0).integers(0, 256, (size, size), dtype=np.uint8)
        zarr.create_array(
            where / "v.zarr", data=image, chunks=(512, 512), dimension_names=["y", "x"]
        )
        for name, make in CASES.items():
            free = ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
            network, example = make().eval(), (torch.rand(1, 1, 572, 572),)
            program = torch.export.export(network, example, dynamic_shapes=free)
            torch.export.save(program, where / f"{name}.pt2")
        click.echo("| network | chunks | files | fast s | durable s | ratio, pair by pair |")
        click.echo("|---|---|---|---|---|---|")
        for name in CASES:
            for chunk, edge in ((64, 1024), (256, 1024), (1024, 1024)):
                pairs = [
                    tuple(run(where, name, chunk, edge, kind) for kind in ("fast", "durable"))
                    for _ in range(repeats)
                ]
                ratios = sorted(durable / fast for fast, durable in pairs)
                fast, durable = (statistics.median(each) for each in zip(*pairs, strict=True))
                shown = f"{ratios[0]:.2f}, {statistics.median(ratios):.2f}, {ratios[-1]:.2f}"
                files = 2 * (-(-size // chunk)) ** 2
                click.echo(f"| {name} | {chunk} | {files} | {fast:.2f} | {durable:.2f} | {shown} |")


if __name__ == "__main__":
    main()
