"""Patches per second of the loader alone over what the network consumes: ``python loader.py``.

Synthetic nuclei, the whole augmentation, border weights; each measured with the machine to itself,
in turns. The device is what `--device auto` finds.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
import time
from contextlib import closing
from pathlib import Path

import torch

from tilepipe.host import limits
from tilepipe.training.dataset import open_dataset
from tilepipe.training.experiment import prepare
from tilepipe.training.learner import Learner
from tilepipe.training.loader import Loader
from tilepipe.training.ranks import joined
from tilepipe.training.recipe import Recipe
from tilepipe.volumes.synthetic import write_synthetic

ISOTROPIC = {"base": 16, "depth": 3, "patch": (44, 44, 44), "rotate": "quarter"}
CASES = {
    "2d": ((2048, 2048), {"base": 32, "patch": (228, 228), "weight_map": True}),
    "2d small": ((2048, 2048), {"base": 8, "patch": (164, 164), "weight_map": True}),
    "3d": ((160, 256, 256), ISOTROPIC),
    "3d weight map": ((160, 256, 256), {**ISOTROPIC, "weight_map": True}),
}
COMMON = {"target": "foreground", "steps": 1, "batch": 4}


def measure(name: str, folder: Path, seconds: float, repeats: int) -> tuple[float, float, float]:
    """Return the loader's patches per second, the network's, and bytes decoded for each patch."""
    shape, options = CASES[name]
    image, labels = folder / f"{name}.zarr", folder / f"{name}-labels.zarr"
    write_synthetic(image, shape, seed=0, labels_path=labels)
    cores = limits.cores()
    recipe = Recipe(**{**COMMON, "loaders": cores, **options})
    dataset = open_dataset([(str(image), str(labels))], (), recipe)
    with joined("auto") as team:
        experiment = prepare(dataset, recipe, folder, resume=False, first=True, scanned=None)
        learner = Learner(experiment, team)
        learner.use_threads(cores)
        made, learned = [], []
        for turn in range(repeats):
            ahead = Loader(experiment.patches, team, batch=recipe.batch, workers=cores)
            with closing(ahead) as loader:
                batches = loader.batches(turn * 1000)
                batch = next(batches)
                begun, count = time.perf_counter(), 0
                while time.perf_counter() - begun < seconds:
                    next(batches)
                    count += recipe.batch
                made.append(count / (time.perf_counter() - begun))
            learner.step(itertools.repeat(batch), 1e-4)
            begun, count = time.perf_counter(), 0
            while time.perf_counter() - begun < seconds:
                float(learner.step(itertools.repeat(batch), 1e-4))
                count += recipe.batch
            learned.append(count / (time.perf_counter() - begun))
        return max(made), max(learned), experiment.cache.bytes_read


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"torch {torch.__version__}, {limits.cores()} cores, {device}\n")
    print("| case | loader, patches/s | network, patches/s | ratio |\n|---|---|---|---|")
    for name in options.cases:
        with tempfile.TemporaryDirectory() as folder:
            made, learned, _ = measure(name, Path(folder), options.seconds, options.repeats)
        print(f"| {name} | {made:.3g} | {learned:.3g} | {made / learned:.2f} |", flush=True)


if __name__ == "__main__":
    main()
