"""A call of the library leaves the process as it was, also where it fails."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import tilepipe as tp
from tilepipe.host.process import borrowed

if TYPE_CHECKING:
    from collections.abc import Sequence

PROGRAM = r"""
import copy, logging, multiprocessing, os, random, resource, signal, sys, warnings
from pathlib import Path
import dask, numpy as np, torch, zarr
import distributed, scipy.ndimage, scipy.sparse.csgraph, sympy, tifffile, torch.export
import tilepipe as tp
from tilepipe.options import Options
from tilepipe.training.recipe import Recipe
from tilepipe.models.unet import UNet
from tests.support import noise, write_unet, write_volume

LOGGERS = (None, "tilepipe", "tifffile", "zarr", "distributed", "dask", "torch", "asyncio")


def faults():
    # 40 MB, given back and taken again: by default its pages are new ones each time.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(3):
        tensor = torch.full((10_000_000,), 1.0)
        del tensor
    return "kept" if resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 200 else "new"


def state():
    logs = {}
    for name in LOGGERS:
        logger = logging.getLogger(name)
        handlers = [(h, h.level, list(h.filters)) for h in logger.handlers]
        logs[name] = (logger.level, list(logger.filters), handlers, logger.disabled)
    return {
        "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
        "dtype": torch.get_default_dtype(), "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
                  torch.backends.cudnn.allow_tf32, torch.backends.cudnn.enabled),
        "tf32": torch.backends.cuda.matmul.allow_tf32,
        "matmul": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "torch random": torch.get_rng_state().numpy().tobytes(),
        "numpy random": repr(np.random.get_state()), "random": random.getstate(),
        "numpy errors": np.geterr(), "numpy print": np.get_printoptions(),
        "zarr": copy.deepcopy(zarr.config.config), "dask": copy.deepcopy(dask.config.config),
        "warnings": list(warnings.filters), "environment": dict(os.environ),
        "path": list(sys.path), "folder": os.getcwd(),
        "signals": {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)},
        "logs": logs, "main": sys.modules["__main__"].__spec__,
        "spawn": multiprocessing.get_start_method(allow_none=True),
        "hooks": (sys.excepthook, sys.unraisablehook), "recursion": sys.getrecursionlimit(),
        "memory": faults(),
    }


def leaves_all(what, call, fails=False):
    before = state()
    try:
        call()
        failed = False
    except (tp.BadRequest, ArithmeticError, KeyboardInterrupt) as error:
        failed = True
    assert failed == fails, what
    after = state()
    for name, value in before.items():
        if isinstance(value, dict) and value != after[name]:
            keys = [k for k in {**value, **after[name]} if value.get(k) != after[name].get(k)]
            print(f"{what} changes {name}: {keys}")
        elif value != after[name] and (what, name) != ("segment in processes", "random"):
            print(f"{what} changes {name}: {value!r:.300} -> {after[name]!r:.300}")


def fail(*_):
    raise ArithmeticError


Path("net.py").write_text('''
import os, random, sys, warnings
import numpy, torch, zarr
from tilepipe.models.unet import UNet
def build():
    torch.manual_seed(7), numpy.random.seed(7), random.seed(7)
    torch.set_num_threads(1), torch.set_default_dtype(torch.float64)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    warnings.simplefilter("ignore"), sys.path.append("nowhere")
    zarr.config.set({"async.concurrency": 3}), torch.use_deterministic_algorithms(True)
    os.environ["OF_A_NETWORK"] = "1"
    return UNet(ndim=2, base=2, depth=2).float()
''')
torch.set_num_threads(2)
torch.save(UNet(ndim=2, base=2, depth=2).state_dict(), "weights.pt")
write_volume(Path("v.zarr"), noise(64, 80), "yx", chunks=(32, 32))
write_volume(Path("l.zarr"), (noise(64, 80) > 128).astype("uint8"), "yx", chunks=(32, 32))
tifffile.imwrite("v.tif", noise(64, 80))
write_unet(Path("unet.pt"))
options = Options(threads=1, tile=(32, 32), chunks=(32, 32))
own = Options(network="net.py:build", threads=1, normalize="none", device="cpu")
recipe = Recipe(steps=1, base=2, depth=2, patch=(12, 12), threads=1, batch=1, device="cpu",
                elastic=0.0, target="classes", val_region=(":,40:80",), loaders=1)
network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3), torch.nn.BatchNorm2d(1)).train()
network[1].eval()
small = UNet(ndim=2, base=1, depth=1)


def context():
    tp.context(network)
    assert [m.training for m in network.modules()] == [True, True, False]
    assert all(p.requires_grad for p in network.parameters())


CALLS = {
    "open_volume": (lambda: tp.open_volume("v.tif"), False),
    "open_volume fails": (lambda: tp.open_volume("none.tif"), True),
    "load_model": (lambda: tp.load_model("weights.pt", network="net.py:build"), False),
    "load_model fails": (lambda: tp.load_model("weights.pt", network="net.py:none"), True),
    "context": (context, False),
    "context fails": (lambda: tp.context("unet.pt", network="net.py:build"), True),
    "plan": (lambda: tp.plan("v.zarr", model="unet.pt", options=options), False),
    "plan with code": (lambda: tp.plan("v.zarr", model="weights.pt", options=own), False),
    "plan fails": (lambda: tp.plan("v.zarr", model="unet.pt", options=own), True),
    "segment": (lambda: tp.segment("v.zarr", model="unet.pt", output="o.zarr", options=options),
                False),
    "segment fails": (lambda: tp.segment("v.zarr", model="unet.pt", output="p.zarr",
                                         options=options, progress=fail), True),
    "segment in processes": (lambda: tp.segment("v.zarr", model="unet.pt", output="q.zarr",
                                                options=options, engine="dask"), False),
    "evaluate": (lambda: tp.evaluate("o.zarr", "l.zarr"), False),
    "evaluate fails": (lambda: tp.evaluate("o.zarr", "none.zarr"), True),
    "save_checkpoint": (lambda: tp.save_checkpoint(
        "c.pt", small, architecture={"ndim": 2, "base": 1, "depth": 1},
        normalize="none", labels=("a", "b"), provenance={}), False),
    "write_synthetic": (lambda: tp.write_synthetic(Path("s.zarr"), (64, 64), seed=1), False),
    "label_components": (lambda: tp.label_components(
        tp.open_volume("l.zarr"), "ids.zarr", foreground=lambda values: values[0] > 0), False),
    "grow_objects": (lambda: tp.grow_objects(tp.open_volume("ids.zarr"), "grown.zarr"), False),
    "train": (lambda: tp.train([("v.zarr", "l.zarr")], output="t.pt", recipe=recipe), False),
    "train fails": (lambda: tp.train([("v.zarr", "l.zarr")], output="u.pt", recipe=recipe,
                                     progress=fail), True),
}
chosen = sys.argv[1:]
for what, (call, fails) in CALLS.items():
    if any(what in (name, f"{name} fails", f"{name} with code") for name in chosen):
        leaves_all(what, call, fails)
print("looked")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="resource is not on Windows")
@pytest.mark.parametrize(
    "functions",
    [
        [
            "open_volume",
            "load_model",
            "context",
            "plan",
            "segment",
            "evaluate",
            "save_checkpoint",
            "write_synthetic",
            "label_components",
            "grow_objects",
        ],
        pytest.param(["train"], marks=pytest.mark.long),
        pytest.param(["segment in processes"], marks=pytest.mark.long),
    ],
    ids=lambda functions: functions[-1],
)
def test_every_public_function_puts_back_what_it_changes(
    functions: Sequence[str], tmp_path: Path
) -> None:
    root = str(Path(tp.__file__).parents[1])
    ran = subprocess.run(
        [sys.executable, "-c", PROGRAM, *functions],
        cwd=tmp_path, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.splitlines() == ["looked"], ran.stdout


def test_every_public_function_is_looked_at() -> None:
    functions = {name for name in tp.__all__ if name.islower() and not name.startswith("_")}
    functions.remove("keep_memory")  # which is there to change the process
    assert functions <= {line.split('"')[1] for line in PROGRAM.splitlines() if '": (' in line}


def test_filters_of_warnings_outlive_calls_in_several_threads() -> None:
    """Each of them puts back what it found, which may be what another has set for a while."""
    before = list(warnings.filters)
    inside = threading.Barrier(2)

    def call(first: bool) -> None:
        with borrowed():
            if not first:
                inside.wait()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if first:
                    inside.wait()
                    time.sleep(0.05)  # the other one has seen this filter, and ends later
                else:
                    time.sleep(0.15)

    threads = [threading.Thread(target=call, args=(first,)) for first in (True, False)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert warnings.filters == before
