"""What we use of other libraries that they do not promise: found at once where a release ends it.

Each assertion says where it is used and what would do instead. The suite runs with the newest
releases that `constraints.txt` allows, and with the oldest of `constraints-oldest.txt`.
"""

from __future__ import annotations

import inspect
import logging
import multiprocessing
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from torch import nn

import tilepipe
from tilepipe.graph.graph import export

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

ROOT = Path(tilepipe.__file__).parents[1]
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT, GROUPS = SETTINGS["project"], SETTINGS["dependency-groups"]


def has(owner: object, *names: str) -> bool:
    return all(hasattr(owner, name) for name in names)


def takes(function: Callable[..., object], *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def test_torch_operations_and_their_schemas() -> None:
    overload = torch.ops.aten.convolution.default
    assert isinstance(overload, torch._ops.OpOverload), (
        "tilepipe.graph.graph and operations tell operations by torch._ops.OpOverload:"
        " take type(torch.ops.aten.add.Tensor)"
    )
    schema = overload._schema
    assert [argument.name for argument in schema.arguments][:3] == ["input", "weight", "bias"], (
        "tilepipe.graph.operations binds arguments by OpOverload._schema: read str(overload)"
    )
    assert schema.name == "aten::convolution"
    assert not schema.is_mutable
    assert has(schema.returns[0], "alias_info"), "tilepipe.graph.graph._is_plain tells views by it"
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    reshape = torch.ops.aten.reshape.default
    assert reshape.has_kernel_for_dispatch_key(composite), (
        "tilepipe.graph.graph._is_plain tells what is to be decomposed by it: decompose always, by"
        " ExportedProgram.run_decompositions({})"
    )
    assert not overload.has_kernel_for_dispatch_key(composite)


def test_torch_export_gives_a_graph_as_it_is_read() -> None:
    graph = export(nn.Conv2d(1, 2, 3).to("meta"), (1, 1, 64, 64))
    node = next(n for n in graph.program.graph.nodes if n.op == "call_function")
    assert tuple(node.meta["val"].shape) == (1, 2, 62, 62), (
        "tilepipe.graph.readings.shape_of reads shapes in node.meta['val']: run torch.fx's"
        " ShapeProp on the exported module"
    )
    signature = graph.program.graph_signature
    assert has(
        signature, "user_inputs", "inputs_to_parameters", "inputs_to_buffers",
        "inputs_to_lifted_tensor_constants",
    ), "tilepipe.graph reads constants by them: go through signature.input_specs"  # fmt: skip


def test_torch_storages_can_be_watched() -> None:
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    assert issubclass(TorchDispatchMode, object)
    tensor = torch.zeros(3)
    watch = StorageWeakRef(tensor.untyped_storage())
    assert isinstance(tensor.untyped_storage()._cdata, int)
    assert not watch.expired()
    del tensor
    assert watch.expired(), (
        "tilepipe.models.cost.Liveness counts memory by it: use weakref.finalize"
    )


def test_torch_trees() -> None:
    from torch.utils._pytree import tree_leaves, tree_map

    assert tree_leaves({"a": [1, (2,)]}) == [1, 2], (
        "tilepipe.models.cost: torch.utils.pytree has it too"
    )
    assert tree_map(lambda n: n + 1, ([1], {"a": 2})) == ([2], {"a": 3}), (
        "tilepipe.graph.kernels.call_node: take torch.fx.node.map_arg"
    )


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="without oneDNN")
def test_torch_kernels_of_onednn() -> None:
    """Where they are missing slower ones are used; where they take other arguments, all fails."""
    image, weight = torch.rand(1, 2, 6, 6, 6), torch.rand(3, 2, 3, 3, 3)
    onto, none = torch.zeros(1, 3, 4, 4, 4), [0, 0, 0]
    ones = [1, 1, 1]
    truth = torch.conv3d(image, weight)
    said = (
        "tilepipe.graph.kernels calls it with these arguments: look them up anew, or leave it out"
    )
    found = torch.mkldnn_convolution(image, weight, None, none, ones, ones, 1)
    assert torch.allclose(found, truth, atol=1e-5), said
    if (added := getattr(torch.ops.mkldnn, "_convolution_pointwise_", None)) is not None:
        found = added.binary(
            onto, image, weight, None, none, ones, ones, 1, "add", 1.0, None, [], None
        )
        assert torch.allclose(found, truth, atol=1e-5), said
    transposed = getattr(torch.ops.mkldnn, "_convolution_transpose_pointwise", None)
    if transposed is not None:
        found = transposed(truth, weight, None, none, none, ones, ones, 1, "none", [], "")
        assert torch.allclose(found, torch.conv_transpose3d(truth, weight), atol=1e-4), said


def test_torch_scripts_tell_their_last_operation() -> None:
    script = torch.jit.trace(nn.Sigmoid(), torch.rand(1))
    graph = script.inlined_graph
    assert next(iter(graph.outputs())).node().kind() == "aten::sigmoid", (
        "tilepipe.models.model.script_activation reads it: take torch.export's converter, or ask"
    )


def test_zarr_configuration_is_a_dict() -> None:
    import zarr

    assert isinstance(zarr.config.config, dict), (
        "tilepipe.host.process puts Zarr's configuration back by it: use zarr.config.set"
    )
    for key in ("threading.max_workers", "async.concurrency"):
        zarr.config.get(key)  # tilepipe.segmentation.worker bounds the memory of reading by them


def test_tifffile_complains_in_these_words(tmp_path: Path) -> None:
    import tifffile

    from tilepipe.volumes.tiff import _DAMAGED

    path = tmp_path / "v.tif"
    tifffile.imwrite(path, np.zeros((4, 64, 64), "uint8"), photometric="minisblack", metadata=None)
    with tifffile.TiffFile(path) as file:
        series = file.series[0]
        assert has(series, "levels", "dataoffset", "nbytes", "axes"), (
            "tilepipe.volumes.tiff reads them"
        )
        assert has(series[0], "dataoffsets", "databytecounts"), (
            "tilepipe.volumes.tiff finds the end so"
        )
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("tifffile").addHandler(handler)
    try:
        path.write_bytes(path.read_bytes()[:-64])  # its last pages are said at its end
        with tifffile.TiffFile(path) as file:
            len(file.pages)
    except tifffile.TiffFileError as error:
        records.append(str(error))
    finally:
        logging.getLogger("tifffile").removeHandler(handler)
    assert any(_DAMAGED.search(record) for record in records), (
        f"tilepipe.volumes.tiff knows a truncated file by tifffile's words; it says now: {records}"
    )


def test_dask_settings_have_these_names() -> None:
    import dask
    import distributed  # noqa: F401  whose settings they are

    from tilepipe.engines.dask import SETTINGS

    missing = object()
    for key in (*SETTINGS, "distributed.nanny.pre-spawn-environ"):
        assert dask.config.get(key, missing) is not missing, (
            f"tilepipe.engines.dask sets {key}: look for its new name in distributed.yaml"
        )


def test_dask_scheduler_may_be_given_other_extensions() -> None:
    from distributed import Scheduler
    from distributed.scheduler import DEFAULT_EXTENSIONS
    from distributed.spans import SpansSchedulerExtension

    from tilepipe.engines.dask import _NoSpans

    said = "tilepipe.engines.dask keeps the scheduler's memory flat by it: try without, or anew"
    assert DEFAULT_EXTENSIONS["spans"] is SpansSchedulerExtension, said
    assert takes(Scheduler.__init__, "extensions"), said
    for name in ("observe_tasks", "heartbeat"):
        ours, theirs = getattr(_NoSpans, name), getattr(SpansSchedulerExtension, name)
        assert takes(ours, *inspect.signature(theirs).parameters), said


def test_dask_clusters_workers_and_clients_have_what_is_asked_of_them() -> None:
    from dask.utils import key_split
    from distributed import Client, KilledWorker, Nanny, Scheduler, SpecCluster, Worker
    from distributed.cli import dask_worker
    from distributed.comm.core import connect
    from distributed.core import Status
    from distributed.scheduler import WorkerState
    from distributed.security import Security
    from distributed.utils import get_ip_interface, silence_logging_cmgr

    assert has(key_split, "cache_clear"), "tilepipe.engines.dask empties it: leave that out"
    assert takes(connect, "addr", "timeout"), "tilepipe.engines.dask greets a scheduler by it"
    assert has(Security, "get_connection_args", "get_tls_config_for_role", "temporary")
    assert has(SpecCluster, "scale", "sync", "new_worker_spec"), "tilepipe.engines.slurm"
    assert takes(SpecCluster.__init__, "workers", "scheduler", "silence_logs")
    assert takes(Nanny.__init__, "preload", "env", "nthreads", "memory_limit", "silence_logs")
    assert has(Client, "register_plugin", "unregister_worker_plugin", "nthreads", "scheduler_info")
    assert takes(KilledWorker.__init__, "last_worker"), "tilepipe.engines.dask asks who died"
    assert takes(Worker.close_gracefully, "reason"), (
        "tilepipe.engines.walltime leaves by it: worker.close"
    )
    assert isinstance(Worker.status, property) and Worker.status.fset, (  # noqa: PT018
        "tilepipe.engines.walltime pauses a worker by its status"
    )
    assert has(Status, "running", "paused", "closed")
    assert takes(Scheduler.remove_worker, "stimulus_id"), "tilepipe.engines.slurm lets one go"
    assert {"processing", "has_what", "name"} <= {*dir(WorkerState)}, "tilepipe.engines.slurm"
    assert callable(dask_worker.main), "tilepipe.engines.jobworker: run `dask worker` instead"
    assert callable(get_ip_interface)
    assert callable(silence_logging_cmgr)


def test_dask_jobqueue_takes_what_it_is_given() -> None:
    pytest.importorskip("dask_jobqueue")
    from distributed import SpecCluster

    from tilepipe.segmentation.slurm import engine

    engine()  # keeps the signals that importing dask-jobqueue takes
    from dask_jobqueue import slurm as jobqueue
    from dask_jobqueue.core import Job, JobQueueCluster

    assert issubclass(jobqueue.SLURMCluster, SpecCluster), "tilepipe.engines.slurm scales it"
    assert takes(JobQueueCluster.__init__, "job_cls", "security", "scheduler_options")
    given = ("worker_command", "worker_extra_args", "job_directives_skip", "job_extra_directives",
             "job_script_prologue", "log_directory", "job_name", "python", "interface")  # fmt: skip
    assert takes(Job.__init__, *given), "tilepipe.engines.slurm._arguments: rename them"
    assert has(jobqueue.SLURMJob, "job_script", "start", "close"), "tilepipe.engines.slurm"


def test_python_starts_processes_by_the_main_modules_specification() -> None:
    from multiprocessing import spawn

    main = sys.modules["__main__"]
    before = main.__spec__
    try:
        main.__spec__ = None
        main.__spec__ = sys.modules["tilepipe.errors"].__spec__
        found = spawn.get_preparation_data("worker")
    finally:
        main.__spec__ = before
    assert found["init_main_from_name"] == "tilepipe.errors", (
        "tilepipe.engines.dask keeps a user's script from being run again by it: ask for"
        " `if __name__ == '__main__'`"
    )
    method = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(method, force=True)
    assert multiprocessing.get_start_method(allow_none=True) == method


EXTRAS: dict[str, list[str]] = PROJECT["optional-dependencies"]


def bounds(requirements: Iterable[str]) -> dict[str, str]:
    """Return the oldest release that is allowed of each library; all of them have one."""
    plain = (line.split(";")[0].strip() for line in requirements)
    return dict(line.split(">=") for line in plain)


def test_the_oldest_releases_that_are_tried_are_those_that_are_allowed() -> None:
    lines = (ROOT / "constraints-oldest.txt").read_text().splitlines()
    tried = dict(line.split("==") for line in lines if "==" in line)
    allowed = bounds([*PROJECT["dependencies"], *GROUPS["test"]])
    assert tried.keys() == allowed.keys()
    for name, oldest in allowed.items():
        if name != "torch":
            parts = tried[name].split(".")
            assert parts[: oldest.count(".") + 1] == oldest.split("."), name
    for name in bounds(PROJECT["dependencies"]):
        assert version(name)


@pytest.mark.parametrize("extra", ["cloud", "slurm", "tensorboard", "testing"])
def test_the_tests_have_what_the_parts_that_are_optional_need(extra: str) -> None:
    assert {*EXTRAS[extra]} <= {*GROUPS["test"]}
