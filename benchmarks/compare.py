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
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from cases import CASES, SCALE, Case, load, multiply_adds, prepare
from peers import map_overlap, monai, per_pixel, timed, torch_em

CONTENDERS = (
    "bare", "tilepipe", "map_overlap", "torch-em", "monai 0.25", "monai 0.5", "per pixel"
)  # fmt: skip


def contend(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Run one contender in this process and return what it took."""
    import torch

    from tilepipe.host.allocator import keep_memory

    for module in ("tilepipe.segmentation.segment", "torch.export", "torch._dynamo"):
        importlib.import_module(module)  # outside the timer, what the first export imports, too

    torch.set_num_threads(threads)
    keep_memory()
    functions = {
        "bare": bare, "tilepipe": tilepipe, "map_overlap": map_overlap,
        "torch-em": torch_em, "monai 0.25": monai, "monai 0.5": monai, "per pixel": per_pixel,
    }  # fmt: skip
    with torch.inference_mode():
        found = functions[name](name, case, folder, threads)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "peak": peak}


def options(case: Case, threads: int | None = None) -> Any:
    """Return what tilepipe is asked for."""
    import tilepipe as tp

    return tp.Options(
        memory=case.memory, threads=threads, write="logits", network=case.network,
        network_args=case.architecture if case.network else None, normalize=SCALE,
    )  # fmt: skip


def bare(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Time the network alone; the seconds are those of the whole at its best rate."""
    import torch

    from tilepipe.planning.plan import plan

    network, best = load(case, folder), (0.0, 0.0, (0,))
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    for shape in case.bare:
        image = torch.rand(1, 1, *shape).contiguous(memory_format=layout)
        network(image)
        work = multiply_adds(case, folder, shape)
        runs = [timed(partial(network, image)) for _ in range(3)]
        found = min(runs, key=lambda run: run["wall"])
        best = max(best, (work / found["wall"], work / found["cpu"], shape))
    floor = plan(folder / "image.zarr", model=folder / "unet.pt", options=options(case)).costs.floor
    return {
        "wall": floor / best[0], "cpu": floor / best[1], "rate": best[0] / 1e9,
        "shape": best[2], "multiply_adds": floor, "floor": floor,
    }  # fmt: skip


def tilepipe(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Run the product, from Zarr to Zarr, its planning included."""
    import tilepipe as tp

    reports = []
    found = timed(
        lambda: reports.append(
            tp.segment(
                folder / "image.zarr", model=folder / "unet.pt", output=folder / "tilepipe.zarr",
                options=options(case, threads), engine="serial", overwrite=True,
            )
        )
    )  # fmt: skip
    costs, source = reports[0].plan.costs, reports[0].plan.source
    return {
        **found, "multiply_adds": costs.multiply_adds, "running": reports[0].seconds,
        "read": costs.read_bytes / source.nbytes, "strategy": reports[0].plan.strategy,
    }  # fmt: skip


def differences(folder: Path) -> dict[str, float]:
    """Return the largest difference of each answer from tilepipe's, over the range of values."""
    import zarr

    if not (folder / "tilepipe.zarr").exists():
        return {}
    truth = zarr.open_array(folder / "tilepipe.zarr" / "0", mode="r")[:]
    places = {"map_overlap": "overlap.zarr", "torch-em": "torch-em.zarr", "monai 0.5": "monai.zarr"}
    found = {"tilepipe": 0.0}
    for name, place in places.items():
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
