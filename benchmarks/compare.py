"""The pipelines against the bare network: ``python benchmarks/compare.py CASE``.

Each contender runs in a process of its own, in turn, ``--repeats`` times; imports and the making of
data are outside the timer. The limit is the multiply-adds of one pass over the whole mirrored image
at the best rate that the bare network reaches on any of some shapes, in the same run.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

CONTENDERS = ("bare", "tilepipe", "map_overlap", "monai 0.25", "monai 0.5", "per pixel")


@dataclass(frozen=True)
class Case:
    """A network and a volume."""

    architecture: dict[str, Any]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    memory: int
    """Bytes that tilepipe may take."""
    block: tuple[int, ...]
    """Voxels that `map_overlap` gives to the network at once, and of MONAI's windows."""
    window: tuple[int, ...]
    bare: tuple[tuple[int, ...], ...]
    """Input shapes of the bare network."""


CASES = {
    "2d": Case(
        {"ndim": 2, "base": 16, "depth": 5}, (4096, 4096), (512, 512), 2_000_000_000,
        (1024, 1024), (512, 512), ((572, 572), (1212, 1212), (1980, 1980)),
    ),
    "2d-large": Case(
        {"ndim": 2, "base": 16, "depth": 5}, (8192, 8192), (512, 512), 2_000_000_000,
        (2048, 2048), (512, 512), ((572, 572), (1212, 1212), (1980, 1980)),
    ),
    "3d": Case(
        {"ndim": 3, "base": 8, "depth": 4}, (128, 256, 256), (64, 128, 128), 2_000_000_000,
        (128, 128, 128), (128, 128, 128), ((132, 132, 132), (164, 164, 164), (196, 196, 196)),
    ),
    "3d-large": Case(
        {"ndim": 3, "base": 8, "depth": 4}, (256, 512, 512), (64, 128, 128), 4_000_000_000,
        (128, 128, 128), (128, 128, 128), ((132, 132, 132), (164, 164, 164), (196, 196, 196)),
    ),
}  # fmt: skip


def prepare(case: Case, folder: Path) -> None:
    """Write the volume and the network."""
    import torch
    import zarr

    from tilepipe.unet import UNet, save_checkpoint

    random = np.random.default_rng(0)
    image = zarr.create_array(
        folder / "image.zarr", shape=case.shape, chunks=case.chunks, dtype="uint8",
        dimension_names=tuple("zyx"[-len(case.shape) :]),
    )  # fmt: skip
    image[:] = random.integers(0, 256, case.shape, dtype="uint8")
    torch.manual_seed(0)
    network = UNet(**case.architecture)
    save_checkpoint(
        folder / "unet.pt", network, architecture=case.architecture, normalize=f"scale:{1 / 255},0",
        labels=["background", "object"], provenance={},
    )  # fmt: skip


def contend(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Run one contender in this process and return what it took."""
    import torch

    from tilepipe.predict import keep_memory

    for module in ("tilepipe.segment", "torch.export", "torch._dynamo"):
        importlib.import_module(module)  # outside the timer, what the first export imports, too

    torch.set_num_threads(threads)
    keep_memory()
    functions = {
        "bare": bare, "tilepipe": tilepipe, "map_overlap": map_overlap,
        "monai 0.25": monai, "monai 0.5": monai, "per pixel": per_pixel,
    }  # fmt: skip
    with torch.inference_mode():
        found = functions[name](name, case, folder, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "peak": peak}


def timed(function: Any) -> dict[str, object]:
    """Return seconds of wall and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def load(case: Case, folder: Path) -> Any:
    """Return the network, channels last."""
    import torch

    from tilepipe.model import load_model

    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    return load_model(folder / "unet.pt").module.to(memory_format=layout)


def multiply_adds(case: Case, folder: Path, shape: tuple[int, ...]) -> int:
    """Return those of one pass."""
    from tilepipe.model import load_model

    return load_model(folder / "unet.pt").cost(shape).multiply_adds


def bare(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Time the network alone; the seconds are those of the whole at its best rate."""
    import torch

    from tilepipe.plan import plan

    network, best = load(case, folder), (0.0, 0.0, (0,))
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    for shape in case.bare:
        image = torch.rand(1, 1, *shape).contiguous(memory_format=layout)
        network(image)
        work = multiply_adds(case, folder, shape)
        runs = [timed(partial(network, image)) for _ in range(3)]
        found = min(runs, key=lambda run: run["wall"])
        best = max(best, (work / found["wall"], work / found["cpu"], shape))
    floor = plan(folder / "image.zarr", model=folder / "unet.pt").costs.floor
    return {
        "wall": floor / best[0], "cpu": floor / best[1], "rate": best[0] / 1e9,
        "shape": best[2], "multiply_adds": floor, "floor": floor,
    }  # fmt: skip


def tilepipe(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Run the product, from Zarr to Zarr, its planning included."""
    import tilepipe as tp

    options = tp.Options(memory=case.memory, threads=threads, write="logits")
    reports = []
    found = timed(
        lambda: reports.append(
            tp.segment(
                folder / "image.zarr", model=folder / "unet.pt", output=folder / "tilepipe.zarr",
                options=options, engine="serial", overwrite=True,
            )
        )
    )  # fmt: skip
    costs, source = reports[0].plan.costs, reports[0].plan.source
    return {
        **found, "multiply_adds": costs.multiply_adds, "running": reports[0].seconds,
        "read": costs.read_bytes / source.nbytes, "strategy": reports[0].plan.strategy,
    }  # fmt: skip


def same_size(network: Any, image: Any, profile: Any) -> Any:
    """Run a valid network so that the answer has the size of the image, mirrored outside."""
    import torch.nn.functional as F

    pads: list[int] = []
    for n, lead, after, size, step in zip(
        image.shape[:1:-1], profile.lead[::-1], profile.context.after[::-1],
        profile.smallest[::-1], profile.context.step[::-1], strict=True,
    ):  # fmt: skip
        want = lead + n + after
        accepted = size + max(0, -(-(want - size) // step)) * step
        pads += [lead, accepted - lead - n]
    answer = network(F.pad(image, pads, mode="reflect"))
    return answer[(..., *(slice(n) for n in image.shape[2:]))]


def map_overlap(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Use dask's own overlap, with a depth that is enough, and write what comes to Zarr."""
    import dask
    import dask.array as da
    import torch
    import zarr

    from tilepipe.model import load_model
    from tilepipe.profile import find_profile

    network, profile = load(case, folder), find_profile(load_model(folder / "unet.pt"))
    depth, step = profile.lead[0], profile.context.step[0]
    while depth < profile.context.after[0]:
        depth += step  # or blocks begin off the network's lattice
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    calls = []

    def block(values: Any) -> Any:
        sizes = [profile.accepted(a, n) for a, n in enumerate(values.shape)]
        after = [(0, size - n) for size, n in zip(sizes, values.shape, strict=True)]
        tensor = torch.from_numpy(np.pad(values, after).astype(np.float32) / 255)[None, None]
        calls.append(tensor.shape[2:])
        torch.set_num_threads(threads)
        with torch.inference_mode():
            answer = network(tensor.contiguous(memory_format=layout))[0]
        kept = answer[(slice(None), *(slice(depth - o, None) for o in profile.offset))]
        inner = [n - 2 * depth for n in values.shape]
        return kept[(slice(None), *map(slice, inner))].numpy()

    image = da.from_zarr(folder / "image.zarr").rechunk(case.block)
    grown = da.overlap.overlap(image, depth=depth, boundary="reflect")
    answer = grown.map_blocks(block, dtype=np.float32, new_axis=0, chunks=(2, *image.chunks))
    out = zarr.create_array(
        folder / "overlap.zarr", shape=(2, *case.shape), chunks=(2, *case.block), dtype="float32",
        overwrite=True,
    )  # fmt: skip
    with dask.config.set(scheduler="synchronous"):
        found = timed(lambda: da.store(answer, out, lock=False))
    work = sum(multiply_adds(case, folder, tuple(shape)) for shape in calls)
    return {**found, "multiply_adds": work, "out": "overlap.zarr"}


def monai(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Use MONAI's sliding window; each window is mirrored outside, as a valid network needs."""
    import torch
    import zarr
    from monai.inferers import sliding_window_inference

    from tilepipe.model import load_model
    from tilepipe.profile import find_profile

    network, profile = load(case, folder), find_profile(load_model(folder / "unet.pt"))
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    calls = []

    def predictor(image: Any) -> Any:
        calls.append(image.shape[2:])
        return same_size(network, image.contiguous(memory_format=layout), profile)

    out = zarr.create_array(
        folder / "monai.zarr", shape=(2, *case.shape), chunks=(2, *case.block), dtype="float32",
        overwrite=True,
    )  # fmt: skip

    def run() -> None:
        image = zarr.open_array(folder / "image.zarr", mode="r")[:]
        tensor = torch.from_numpy(image.astype(np.float32) / 255)[None, None]
        out[:] = sliding_window_inference(
            tensor, case.window, 1, predictor, overlap=float(name.split()[1]), mode="gaussian"
        )[0].numpy()

    found = timed(run)
    grown = profile.accepted(0, profile.lead[0] + case.window[0] + profile.context.after[0])
    work = len(calls) * multiply_adds(case, folder, (grown,) * len(case.shape))
    return {**found, "multiply_adds": work, "out": "monai.zarr"}


def per_pixel(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Time one patch per pixel, on a sample; the seconds are those of all pixels."""
    import torch

    from tilepipe.model import load_model
    from tilepipe.profile import find_profile

    network, profile = load(case, folder), find_profile(load_model(folder / "unet.pt"))
    image = torch.rand(1, 1, *profile.smallest)
    network(image)
    found = timed(lambda: [network(image) for _ in range(5)])
    pixels = int(np.prod(case.shape))
    work = pixels * multiply_adds(case, folder, profile.smallest)
    return {k: v / 5 * pixels for k, v in found.items()} | {"multiply_adds": work}


def differences(folder: Path) -> dict[str, float]:
    """Return the largest difference of each answer from tilepipe's, over the range of values."""
    import zarr

    truth = zarr.open_array(folder / "tilepipe.zarr" / "0", mode="r")[:]
    found = {"tilepipe": 0.0}
    for name, place in (("map_overlap", "overlap.zarr"), ("monai 0.5", "monai.zarr")):
        if (folder / place).exists():
            other = zarr.open_array(folder / place, mode="r")[:]
            found[name] = float(np.abs(other - truth).max() / np.ptp(truth))
    return found


def main() -> None:
    """Run the contenders in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    case = CASES[asked.case]
    if asked.one:
        print(json.dumps(contend(asked.one, case, Path(asked.folder), asked.threads)))
        return
    with tempfile.TemporaryDirectory() as folder:
        prepare(case, Path(folder))
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in asked.only}
        for _ in range(asked.repeats):
            for name in asked.only:
                command = [
                    sys.executable, "-W", "ignore", __file__, asked.case, "--one", name,
                    "--folder", folder, "--threads", str(asked.threads),
                ]  # fmt: skip
                ran = subprocess.run(command, capture_output=True, text=True, check=False)
                if ran.returncode:
                    print(f"{name}: {ran.stderr.strip().splitlines()[-1]}", file=sys.stderr)
                    continue
                results[name].append(json.loads(ran.stdout.splitlines()[-1]))
        show(asked.case, results, differences(Path(folder)))


def show(name: str, results: dict[str, list[dict[str, Any]]], off: dict[str, float]) -> None:
    """Print one row for each contender, from the best of its repeats."""
    limit = min(results["bare"], key=lambda r: r["wall"])
    print(f"\n{name}: the bare network reaches {limit['rate']:.1f} G multiply-adds/s", end="")
    print(f" on {limit['shape']}; the floor is {limit['floor']:.4g}\n")
    print(
        "| contender | wall s | over limit | CPU over limit | work over floor | peak GB | error |"
    )
    print("|---|---|---|---|---|---|---|")
    for contender, runs in results.items():
        if not runs:
            print(f"| {contender} | did not run | | | | | |")
            continue
        best = min(runs, key=lambda r: r["wall"])
        error = f"{off[contender]:.1e}" if contender in off else ""
        print(
            f"| {contender} | {best['wall']:.4g} | {best['wall'] / limit['wall']:.2f}"
            f" | {min(r['cpu'] for r in runs) / limit['cpu']:.2f}"
            f" | {best['multiply_adds'] / limit['floor']:.2f} | {best['peak'] / 1e9:.2f}"
            f" | {error} |"
        )
    ours = [run for run in results.get("tilepipe", []) if "running" in run]
    if ours:
        best = min(ours, key=lambda r: r["running"])
        ratio = best["running"] / limit["wall"]
        print(
            f"\ntilepipe without its planning: {best['running']:.4g} s, {ratio:.2f} of the limit;"
        )
        print(
            f"strategy {best['strategy']}, bytes decoded over those of the source"
            f" {best['read']:.2f}"
        )


if __name__ == "__main__":
    main()
