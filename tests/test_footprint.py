"""A network's own code takes memory too, and the budget holds with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tilepipe as tp
from tests.support import noise, write_volume
from tilepipe.errors import BadRequest
from tilepipe.models.process_memory import PROCESS, VARIES, process_memory
from tilepipe.models.unet import UNet
from tilepipe.options import Options

MB = 1_000_000
CODE = """
import numpy
from tilepipe.models.unet import UNet
BALLAST = numpy.ones({mb} * 125_000)
class Net(UNet):
    def forward(self, image):
        assert BALLAST is not None
        return super().forward(image)
"""
ARCHITECTURE = {"ndim": 2, "base": 32, "depth": 3}
RUN = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def write_network(folder: Path, mb: int) -> str:
    (folder / "net.py").write_text(CODE.format(mb=mb))
    torch.save(UNet(**ARCHITECTURE).state_dict(), folder / "weights.pt")  # type: ignore[arg-type]
    return f"{folder}/net.py:Net"


def test_what_the_plan_counts_is_what_a_process_takes(tmp_path: Path) -> None:
    network = write_network(tmp_path, 150)
    assert (
        process_memory(None, None) == process_memory("tilepipe.models.unet:UNet", None) == PROCESS
    )
    source = write_volume(tmp_path / "v.zarr", noise(64, 64), "yx")
    options = Options(network=network, network_args=ARCHITECTURE, normalize="none")
    plan = tp.plan(source, model=tmp_path / "weights.pt", options=options)
    less = PROCESS + 150 * MB
    assert less <= process_memory(network, ARCHITECTURE) <= less + VARIES
    assert less < plan.costs.memory


def test_code_that_no_other_process_can_import_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = write_network(tmp_path, 1)
    with (tmp_path / "net.py").open("a") as file:
        file.write(f"import os\nassert os.getpid() == {os.getpid()}, 'only here'\n")
    source = write_volume(tmp_path / "v.zarr", noise(64, 64), "yx")
    options = Options(network=network, network_args=ARCHITECTURE)
    with pytest.raises(BadRequest, match=r"not in a new process, as workers are: .*only here"):
        tp.plan(source, model=tmp_path / "weights.pt", options=options)


@pytest.mark.long
def test_a_run_stays_within_its_memory(tmp_path: Path) -> None:
    network = write_network(tmp_path, 150)
    write_volume(tmp_path / "v.zarr", noise(1200, 1500), "yx", chunks=(256, 256))
    command = [
        str(Path(sys.executable).with_name("tilepipe")), "segment", "v.zarr",
        "--model", "weights.pt", "-o", "o.zarr", "--network", network,
        "--network-args", json.dumps(ARCHITECTURE), "--normalize", "none",
        "--memory", "800MB", "--threads", "1",
    ]  # fmt: skip
    ran = subprocess.run(
        [sys.executable, "-c", RUN, *command],
        cwd=tmp_path, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(Path(tp.__file__).parents[1])},
    )  # fmt: skip
    assert int(ran.stdout.split()[-1]) <= 800 * MB
