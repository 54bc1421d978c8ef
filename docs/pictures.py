"""Make the pictures of the tutorial with tilepipe itself: python docs/pictures.py."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory

import tilepipe as tp
from tilepipe.geometry import Region
from tilepipe.volumes.overlay import write_overlay

PICTURES = Path(__file__).parent / "pictures"
SEGMENT = "segment slide.zarr --model nuclei.pt --tile 256,256"
TRAIN = (
    "train slide.zarr truth.zarr -o new.pt --target foreground --base 8 --depth 3 --patch 128,128"
    " --steps 40 --validate-every 20 --val-region 896:1024,: --preview patches.png"
)
"""The commands of the page."""


def run(command: str) -> None:
    """Run a command of tilepipe."""
    subprocess.run([sys.executable, "-m", "tilepipe", *command.split()], check=True)


def picture(name: str, *, size: int | None = None, every: int = 1) -> None:
    """Write a picture of the slide's upper left part, or of each so many voxels of all of it."""
    part = (slice(None, size, every),) * 2
    volumes = [tp.open_volume(f"{path}.zarr") for path in ("slide", "slide-segmented")]
    image, labels = (volume.read(Region.whole(volume.shape))[0][part] for volume in volumes)
    write_overlay(PICTURES / f"{name}.png", image, labels)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        os.chdir(folder)
        shutil.copy(str(files("tilepipe") / "networks" / "nuclei-2d.pt"), "nuclei.pt")
        tp.write_synthetic("slide.zarr", (1024, 768), seed=2, labels_path="truth.zarr")
        run(f"{SEGMENT} --task 1/2")
        picture("half", every=4)
        run(SEGMENT)
        picture("nuclei", size=240)
        run(TRAIN)
        shutil.copy("patches.png", PICTURES / "patches.png")
        os.chdir("/")
