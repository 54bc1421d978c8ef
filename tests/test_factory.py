"""Code of one's own: found where it was named, with what lies beside it, in every process."""

from __future__ import annotations

import importlib
import json
import os
import pickle
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import tilepipe as tp
from tests.support import noise, read, right_to, write_volume
from tilepipe.errors import BadRequest
from tilepipe.models.factory import build_network, code_of, find_factory
from tilepipe.models.model import load_model
from tilepipe.models.unet import UNet
from tilepipe.options import Options
from tilepipe.segmentation.resume import create_output
from tilepipe.segmentation.worker import SegmentJob
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(tp.__file__).parents[1]
SMALL = {"base": 2}
PARTS = "from tilepipe.models.unet import UNet as Inner\nDEPTH = 2\n"
MODEL = """
from .{name}_parts import DEPTH, Inner

def UNet(base):
    return Inner(ndim=2, base=base, depth=DEPTH)
"""


def save_unet(folder: Path, *, depth: int) -> None:
    torch.manual_seed(0)
    torch.save(UNet(ndim=2, base=2, depth=depth).state_dict(), folder / "weights.pt")


@pytest.fixture
def clone(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Path, str]]:
    """A clone like milesial/Pytorch-UNet, its package of a name of its own, and its weights."""
    name = f"unet{abs(hash(request.node.name)) % 10**8}"
    package = tmp_path / "clone" / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from .model import UNet\n")
    (package / "model.py").write_text(MODEL.format(name=name))
    (package / f"{name}_parts.py").write_text(PARTS)
    (tmp_path / "clone" / f"{name}_evil.py").write_text("raise SystemError('imported')\n")
    save_unet(tmp_path, depth=2)
    yield tmp_path / "clone", name
    for loaded in [module for module in sys.modules if module.split(".")[0].startswith(name)]:
        del sys.modules[loaded]


def test_a_package_in_the_working_directory(
    clone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = clone
    monkeypatch.chdir(folder)
    before = list(sys.path)
    model = load_model(tmp_path / "weights.pt", network=f"{name}:UNet", network_args=SMALL)
    assert model.kind == "state dict"
    assert sys.path == before
    monkeypatch.chdir(tmp_path)
    again = load_model(
        tmp_path / "weights.pt", network=f"{name}:UNet", network_args=SMALL, folder=folder
    )
    assert again.digest == model.digest


@pytest.mark.parametrize("beside", ["relative", "absolute"])
def test_a_file_may_import_its_neighbours(
    beside: str, clone: tuple[Path, str], tmp_path: Path
) -> None:
    folder, name = clone
    if beside == "absolute":
        (folder / name / "model.py").write_text(MODEL.format(name=name).replace(f".{name}", name))
    before = list(sys.path)
    file = folder / name / "model.py"
    model = load_model(tmp_path / "weights.pt", network=f"{file}:UNet", network_args=SMALL)
    assert model.parameters
    assert sys.path == before


def test_changed_neighbours_are_another_model(clone: tuple[Path, str], tmp_path: Path) -> None:
    folder, name = clone
    digests = set()
    parts, other = folder / name / f"{name}_parts.py", folder / name / "other.py"
    for depth in (2, 3):
        parts.write_text(PARTS.replace("= 2", f"= {depth}"))
        save_unet(tmp_path, depth=depth)
        for network in (f"{name}:UNet", f"{folder}/{name}/model.py:UNet"):
            model = load_model(
                tmp_path / "weights.pt", network=network, network_args=SMALL, folder=folder
            )
            digests.add(model.digest)
            plain = UNet(ndim=2, base=2, depth=depth)  # it is the changed code that is used
            assert len(model.module.state_dict()) == len(plain.state_dict())
    assert len(digests) == 4
    other.write_text("# what is not imported says nothing\n")
    assert other not in code_of(find_factory(f"{name}:UNet", folder))


def test_what_only_a_neighbour_needs_fails_in_a_line(
    clone: tuple[Path, str], tmp_path: Path
) -> None:
    folder, name = clone
    (folder / name / f"{name}_parts.py").write_text("import there_is_none")
    before = list(sys.path)
    with pytest.raises(BadRequest, match="No module named 'there_is_none'") as caught:
        load_model(tmp_path / "weights.pt", network=f"{name}:UNet", folder=folder)
    assert "\n" not in str(caught.value)
    assert sys.path == before
    with pytest.raises(BadRequest, match=r"there is no .*nets\.py"):
        load_model(tmp_path / "weights.pt", network="nets.py:UNet", folder=folder)


def test_a_name_that_stands_for_two_packages_is_refused(
    clone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, name = clone
    other = tmp_path / "installed" / name
    other.mkdir(parents=True)
    (other / "__init__.py").write_text("def UNet(base): raise RuntimeError('another one')\n")
    monkeypatch.syspath_prepend(other.parent)
    with pytest.raises(BadRequest, match="is in this folder and installed, too"):
        load_model(tmp_path / "weights.pt", network=f"{name}:UNet", folder=folder)
    named = f"{name}/__init__.py:UNet"
    model = load_model(tmp_path / "weights.pt", network=named, network_args=SMALL, folder=folder)
    assert model.parameters
    for loaded in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[loaded]
    importlib.import_module(name)  # the other one
    with pytest.raises(BadRequest, match=f"this process has loaded {name} from"):
        load_model(tmp_path / "weights.pt", network=named, network_args=SMALL, folder=folder)


def test_a_folder_of_the_name_of_an_installed_package_hides_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch").mkdir()
    factory = find_factory("torch.nn:Conv2d", tmp_path)
    assert not factory.roots
    assert not code_of(factory)


def test_no_checkpoint_imports_code_by_itself(
    clone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tilepipe.models.checkpoint import save_checkpoint

    folder, name = clone
    monkeypatch.chdir(folder)
    save_checkpoint(
        tmp_path / "own.pt", UNet(ndim=2, base=2, depth=2), normalize="none", labels=["a", "b"],
        architecture={"name": "network", "network": f"{name}:UNet", "arguments": SMALL},
        provenance={},
    )  # fmt: skip
    with pytest.raises(BadRequest, match="--network"):
        load_model(tmp_path / "own.pt")
    assert name not in sys.modules
    assert load_model(tmp_path / "own.pt", network=f"{name}:UNet").parameters
    assert f"{name}_evil" not in sys.modules


@pytest.mark.parametrize("engine", ["serial", pytest.param("dask", marks=pytest.mark.long)])
def test_from_the_command_line(engine: str, clone: tuple[Path, str], tmp_path: Path) -> None:
    """As the users of a clone begin."""
    folder, name = clone
    write_volume(tmp_path / "v.zarr", noise(40, 40), "yx", chunks=(16, 16))
    command = [
        str(Path(sys.executable).with_name("tilepipe")), "segment", str(tmp_path / "v.zarr"),
        "--model", str(tmp_path / "weights.pt"), "-o", str(tmp_path / "o.zarr"),
        "--network", f"{name}:UNet", "--network-args", json.dumps(SMALL),
        "--normalize", "none", "--engine", engine, "--tile", "32,32", "--chunks", "16,16",
    ]  # fmt: skip
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert np.ptp(read(tmp_path / "o.zarr")) == 1


WORKER = """
import pickle, sys
job = pickle.load(open(sys.argv[1], "rb"))
print(job.open()(0).voxels)
"""


@pytest.mark.parametrize("network", ["{}:UNet", "{}/model.py:UNet"])
def test_a_worker_elsewhere_finds_the_same_code(
    network: str, clone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a scheduler that already runs, or of a job: its working directory is another."""
    folder, name = clone
    source = write_volume(tmp_path / "v.zarr", noise(40, 40), "yx", chunks=(16, 16))
    monkeypatch.chdir(folder)
    options = Options(network=network.format(name), network_args=SMALL, normalize="none")
    plan = tp.plan(
        source, model=tmp_path / "weights.pt", output=tmp_path / "o.zarr", options=options
    )
    create_output(Output.at(plan.target), plan, {}, overwrite=False)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    with right_to(plan.target) as right:
        (tmp_path / "job").write_bytes(pickle.dumps(SegmentJob(plan, right)))
        ran = subprocess.run(
            [sys.executable, "-c", WORKER, "job"],
            cwd=tmp_path, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split() == ["1600"]


def test_networks_built_at_once_each_find_what_lies_beside_them(tmp_path: Path) -> None:
    """Each changes the process's search path while it is built, and puts it back."""
    built: list[object] = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"beside_{name}.py").write_text("from torch.nn import Identity")
        (tmp_path / name / f"net_{name}.py").write_text(
            "import time\n"
            "def build(seconds):\n"
            "    time.sleep(seconds)\n"
            f"    from beside_{name} import Identity\n"
            "    return Identity()\n"
        )

    def build(name: str, seconds: float) -> None:
        reference = f"{tmp_path / name / f'net_{name}.py'}:build"
        built.append(build_network(reference, {"seconds": seconds}, tmp_path))

    before = list(sys.path)
    threads = [
        threading.Thread(target=build, args=("first", 0.5)),
        threading.Thread(target=build, args=("second", 1.0)),
    ]
    for thread in threads:
        thread.start()
        time.sleep(0.2)
    for thread in threads:
        thread.join()
    assert len(built) == 2
    assert sys.path == before
