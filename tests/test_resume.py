"""The law of going on: however a run was stopped and gone on with, the bytes are the same."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import psutil
import pytest
import torch
import zarr

from tests.commands import WAIT, Commands, script, until, words
from tilepipe.engines import dask
from tilepipe.errors import BadRequest
from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.unet import UNet
from tilepipe.options import Options
from tilepipe.runs.ledger import Ledger
from tilepipe.segmentation.segment import segment
from tilepipe.storage.names import LEDGER
from tilepipe.testing.storage import unavailable
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from distributed import Client

    from tilepipe.segmentation.report import Report

EDGE, TILES = 64, 36
OPTIONS = Options(write="probabilities", tile=(EDGE, EDGE), chunks=(EDGE, EDGE), threads=1)
ARGUMENTS = ("--write", "probabilities", "--tile", "64,64", "--chunks", "64,64")
GO_ON = "tilepipe: interrupted; run the same command again to go on"


@dataclass(frozen=True)
class Case:
    """A volume, a network, and what one undisturbed run made of them."""

    source: Path
    model: Path
    chunks: dict[str, bytes]

    def command(self, target: Path, *more: str, threads: int | None = 1) -> list[str]:
        """Return the arguments of the command line."""
        told = () if threads is None else ("--threads", str(threads))
        where = ("--model", str(self.model), "-o", str(target))
        return ["segment", str(self.source), *where, *ARGUMENTS, *told, *more]

    def segment(
        self,
        target: Path,
        *,
        options: Options = OPTIONS,
        engine: str = "serial",
        scheduler: str | None = None,
        workers: int | None = None,
        overwrite: bool = False,
        progress: Callable[[Report], None] | None = None,
    ) -> Report:
        return segment(
            self.source,
            model=self.model,
            output=target,
            options=options,
            engine=engine,
            scheduler=scheduler,
            workers=workers,
            overwrite=overwrite,
            progress=progress,
        )


def chunk_files(target: Path) -> dict[str, bytes]:
    """Return the bytes of every file of the array; leftovers of killed writers aside."""
    return {
        str(path.relative_to(target)): path.read_bytes()
        for path in (target / "0").rglob("*")
        if path.is_file() and path.suffix != ".partial"
    }


def check_whole(target: Path, case: Case) -> None:
    assert chunk_files(target) == case.chunks
    ledger = Ledger.open(Output.at(target), write=False)
    assert ledger is not None
    assert ledger.done == ledger.tiles == TILES
    assert ledger.failures == []
    assert Output.at(target).read_attributes()["state"] == "done"


def marked(target: Path) -> int:
    """Return how many tiles a ledger has, -1 where there is none yet."""
    try:
        return (target / LEDGER / "done").stat().st_size // 13
    except FileNotFoundError:
        return -1


def write_model(path: Path, *, base: int) -> Path:
    torch.manual_seed(0)
    save_checkpoint(
        path,
        UNet(ndim=2, base=base, depth=2),
        architecture={"ndim": 2, "base": base, "depth": 2},
        normalize="scale:0.004,0",
        labels=["one", "two"],
        provenance={},
    )
    return path


def make_case(folder: Path, *, base: int) -> Case:
    """Make a volume of 6 x 6 tiles and a network, and segment it undisturbed."""
    model = write_model(folder / "net.pt", base=base)
    voxels = np.random.default_rng(0).integers(0, 256, (6 * EDGE - 9, 6 * EDGE), dtype=np.uint8)
    array = zarr.create_array(
        folder / "source.zarr",
        shape=voxels.shape,
        chunks=(96, 96),
        dtype=voxels.dtype,
        dimension_names=["y", "x"],
    )
    array[:] = voxels
    case = Case(folder / "source.zarr", model, {})
    report = case.segment(folder / "undisturbed.zarr")
    assert (report.done, report.failures) == (TILES, [])
    return replace(case, chunks=chunk_files(folder / "undisturbed.zarr"))


@pytest.fixture(scope="module", autouse=True)
def patient() -> Iterator[None]:
    """Let threads of other processes sleep where they wait for each other: cores are few here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "passive")
        yield


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Case:
    case = make_case(tmp_path_factory.mktemp("quick"), base=2)
    assert len(case.chunks) == 1 + 2 * TILES
    return case


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """A run takes some seconds, so that it can be stopped on the way."""
    return make_case(tmp_path_factory.mktemp("slow"), base=64)


@pytest.fixture(scope="module")
def cluster(patient: None) -> Iterator[Client]:
    with dask.local_client(2, threads=3, dashboard=False) as client:
        yield client


def address_of(client: Client) -> str:
    return str(client.scheduler_info()["address"])


@pytest.fixture(scope="module", autouse=True)  # it imports while the first tests run
def commands(tmp_path_factory: pytest.TempPathFactory, patient: None) -> Iterator[Commands]:
    made = Commands(tmp_path_factory.mktemp("commands"))
    with made.server as server:
        yield made
        assert server.stdin is not None
        server.stdin.close()


@pytest.mark.long
def test_one_worker_gives_the_same_bytes(quick: Case, tmp_path: Path) -> None:
    report = quick.segment(tmp_path / "o", engine="dask", workers=1)
    assert (report.before, report.done, report.left) == (0, TILES, 0)
    check_whole(tmp_path / "o", quick)


def test_two_workers_give_the_same_bytes(quick: Case, cluster: Client, tmp_path: Path) -> None:
    report = quick.segment(tmp_path / "o", engine="dask", scheduler=address_of(cluster))
    assert (report.before, report.done, report.left) == (0, TILES, 0)
    check_whole(tmp_path / "o", quick)


def test_a_worker_that_is_killed_is_no_loss(slow: Case, cluster: Client, tmp_path: Path) -> None:
    workers = [*cluster.run(os.getpid).values()]

    def kill(report: Report) -> None:
        if report.done == 5:
            os.kill(workers[0], signal.SIGKILL)

    report = slow.segment(
        tmp_path / "o", engine="dask", scheduler=address_of(cluster), progress=kill
    )
    assert not psutil.pid_exists(workers[0])
    assert (report.done, report.failures) == (TILES, [])
    check_whole(tmp_path / "o", slow)


def test_killed_at_any_moment_it_goes_on(slow: Case, commands: Commands, tmp_path: Path) -> None:
    target, chance = tmp_path / "o", random.Random()
    arguments = slow.command(target, "--engine", "serial")
    kept: list[int] = []
    for tiles in (None, 0, *sorted(chance.sample(range(1, 20), 2))):
        pid = commands.start(arguments)
        if tiles is None:
            until(target.exists)  # it is being created
        else:
            least = max(tiles, *kept)
            until(lambda least=least: marked(target) >= least)  # type: ignore[misc]
            time.sleep(chance.random() * 0.05)
        os.killpg(pid, signal.SIGKILL)
        code, said = commands.end()
        assert code == -signal.SIGKILL, said
        kept.append(marked(target))
    assert kept == sorted(kept)
    code, said = commands.run(arguments)
    assert (code, f"{kept[-1]} of them before" in said) == (0, True), said
    check_whole(target, slow)


@pytest.mark.long
def test_a_run_with_workers_that_is_killed_goes_on_without(
    slow: Case, commands: Commands, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    pid = commands.start(slow.command(target, "--engine", "dask", "--workers", "1"))
    workers = psutil.Process(pid)
    until(lambda: marked(target) >= 3)
    children = workers.children(recursive=True)
    os.kill(pid, signal.SIGKILL)  # the workers are left to notice
    assert commands.end()[0] == -signal.SIGKILL
    code, said = commands.run(slow.command(target))
    assert code == 0, said
    check_whole(target, slow)
    assert psutil.wait_procs(children, timeout=10)[1] == []


def test_interrupted_it_says_how_to_go_on_and_does_on_another_engine(
    slow: Case, cluster: Client, commands: Commands, tmp_path: Path
) -> None:
    target, whole = tmp_path / "o", tmp_path / "whole"
    with script(slow.command(target, threads=2)) as process:
        try:
            until(lambda: marked(target) >= 2)
            process.send_signal(signal.SIGINT)
            _, said = process.communicate(timeout=WAIT)
        finally:
            process.kill()
    assert (process.returncode, words(said).splitlines()) == (130, [GO_ON])
    before = marked(target)
    assert 2 <= before < TILES
    options = Options(write="probabilities")  # threads and sizes are those it began with
    report = slow.segment(target, options=options, engine="dask", scheduler=address_of(cluster))
    assert (report.before, report.done) == (before, TILES - before)
    sizes = report.plan.sizes
    assert (sizes.threads, sizes.tile, sizes.chunks) == (2, (EDGE, EDGE), (EDGE, EDGE))
    code, said = commands.run(slow.command(whole, "--engine", "serial", threads=2))
    assert code == 0, said
    check_whole(target, replace(slow, chunks=chunk_files(whole)))


@pytest.mark.long
def test_interrupted_with_its_workers_it_says_the_same(
    slow: Case, commands: Commands, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    pid = commands.start(slow.command(target, "--engine", "dask", "--workers", "1"))
    until(lambda: marked(target) >= 2)
    children = psutil.Process(pid).children(recursive=True)
    os.killpg(pid, signal.SIGINT)  # as a terminal does
    code, said = commands.end()
    assert (code, said.splitlines()[-1]) == (130, GO_ON), said
    assert "Traceback" not in said
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert 2 <= marked(target) < TILES
    code, said = commands.run(slow.command(target, "--engine", "serial"))
    assert code == 0, said
    check_whole(target, slow)


def test_a_finished_run_is_not_run_again(quick: Case, commands: Commands, tmp_path: Path) -> None:
    target = tmp_path / "o"
    shutil.copytree(quick.source.with_name("undisturbed.zarr"), target)

    def state() -> dict[Path, int]:
        found = (path for path in target.rglob("*") if path.is_file() and path.name != "lock")
        return {path: path.stat().st_mtime_ns for path in found if path.parent != target}

    before = state()
    code, said = commands.run(quick.command(target, "--engine", "dask", "--workers", "2"))
    nothing = "all 36 tiles were done before; nothing was left to do"
    assert (code, said.splitlines()[-1]) == (0, nothing)
    assert state() == before
    check_whole(target, quick)


OTHERS = {
    "threads 1, not 2": replace(OPTIONS, threads=2),
    "write probabilities, not logits, precision float32, not bfloat16, ome_version 0.5, not 0.4,"
    " normalize scale:0.004,0, not zscore": replace(
        OPTIONS, write="logits", normalize="zscore", precision="bfloat16", ome_version="0.4"
    ),
    "tile 64,64, not 128,64, chunks 64,64, not 32,64, shards none, not 64,64": replace(
        OPTIONS, tile=(2 * EDGE, EDGE), chunks=(EDGE // 2, EDGE), shards=(EDGE, EDGE)
    ),
}


@pytest.fixture(scope="module")
def begun(quick: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target of which a third is done."""
    target = tmp_path_factory.mktemp("begun") / "o"

    def stop(report: Report) -> None:
        if report.done == TILES // 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick.segment(target, progress=stop)
    assert marked(target) == TILES // 3
    return target


@pytest.mark.parametrize("names", OTHERS)
def test_another_plan_is_refused_by_what_differs(quick: Case, begun: Path, names: str) -> None:
    before = chunk_files(begun)
    with pytest.raises(BadRequest) as caught:
        quick.segment(begun, options=OTHERS[names])
    assert f"was begun with another plan ({names}); go on" in str(caught.value)
    assert str(caught.value).endswith("replace it with --overwrite")
    assert "\n" not in str(caught.value)
    assert (chunk_files(begun), marked(begun)) == (before, TILES // 3)


def test_another_source_and_model_are_refused(quick: Case, begun: Path, tmp_path: Path) -> None:
    shutil.copytree(quick.source, tmp_path / "source.zarr")
    model = write_model(tmp_path / "net.pt", base=3)
    changed = replace(quick, source=tmp_path / "source.zarr", model=model)
    with pytest.raises(BadRequest, match=r"another plan \(source \w{12}, not \w{12}, model with"):
        changed.segment(begun)


def test_overwriting_begins_anew(quick: Case, begun: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    shutil.copytree(begun, target)
    (target / "0" / "c" / "0" / "0" / "9").write_bytes(b"of another grid")
    (target / LEDGER / "jobs").mkdir()
    (target / LEDGER / "jobs" / "1.out").write_bytes(b"log of a job")
    report = quick.segment(target, overwrite=True)
    assert (report.before, report.done) == (0, TILES)
    check_whole(target, quick)


@pytest.mark.parametrize("part", ["zarr.json", "0/zarr.json"])
def test_a_damaged_output_is_refused_until_it_is_overwritten(
    quick: Case, begun: Path, tmp_path: Path, part: str
) -> None:
    target = tmp_path / "o"
    shutil.copytree(begun, target)
    content = json.loads((target / part).read_text())
    (target / part).write_text(json.dumps({**content, "shape": [1, 1], "attributes": {}}))
    with pytest.raises(BadRequest, match=r"is damaged .*; replace it with --overwrite"):
        quick.segment(target)
    assert marked(target) == TILES // 3
    quick.segment(target, overwrite=True)
    check_whole(target, quick)


def test_what_others_put_into_an_output_is_never_removed(
    quick: Case, begun: Path, tmp_path: Path
) -> None:
    target = tmp_path / "o"
    shutil.copytree(begun, target)
    (target / "notes.txt").write_text("of weeks")
    with pytest.raises(BadRequest, match=r"holds notes\.txt"):
        quick.segment(target, overwrite=True)
    assert marked(target) == TILES // 3
    assert (target / "notes.txt").read_text() == "of weeks"


def test_a_running_output_is_not_overwritten(quick: Case, begun: Path, tmp_path: Path) -> None:
    target = tmp_path / "o"
    shutil.copytree(begun, target)
    with Ledger.open(Output.at(target)) as other:  # type: ignore[union-attr]
        with pytest.raises(BadRequest, match="is being written by another run"):
            quick.segment(target, overwrite=True)
        assert other.done == marked(target) == TILES // 3


@pytest.mark.parametrize("normalize", ["zscore", "percentile:1,99"])
def test_a_normalization_needs_every_voxel(quick: Case, tmp_path: Path, normalize: str) -> None:
    source = tmp_path / "source.zarr"
    shutil.copytree(quick.source, source)
    case = replace(quick, source=source)
    with (
        unavailable(source / "c" / "0" / "3"),
        pytest.raises(BadRequest, match=r"needs every voxel .* mend the source"),
    ):
        case.segment(tmp_path / "o", options=replace(OPTIONS, normalize=normalize))
    assert not (tmp_path / "o").exists()


def test_what_cannot_be_read_is_set_aside_and_done_when_it_is_mended(
    quick: Case, commands: Commands, tmp_path: Path
) -> None:
    source, target = tmp_path / "source.zarr", tmp_path / "o"
    shutil.copytree(quick.source, source)
    case = replace(quick, source=source)
    with unavailable(source / "c" / "0" / "3"):  # columns 288:384
        code, said = commands.run(case.command(target, "--engine", "serial"))
    assert code == 1, said
    ledger = Ledger.open(Output.at(target), write=False)
    assert ledger is not None
    failed = {failure.index for failure in ledger.failures}
    assert failed == {index for index in range(TILES) if index not in ledger} != set()
    # Columns 288:384 of rows 0:96, and the halo round them: 20 before and after.
    assert failed == {6 * y + x for y in (0, 1) for x in (4, 5)}
    for failure in ledger.failures:
        y, x = divmod(failure.index, 6)
        voxels = f"{y * EDGE}:{(y + 1) * EDGE},{x * EDGE}:{(x + 1) * EDGE}"
        assert failure.cause.startswith(f"voxels {voxels}: ")
        assert str(source) in failure.cause
        assert f"tile {failure.index}, {failure.cause}" in said
        assert failure.attempts == 3
    report = case.segment(target)
    assert (report.before, report.done) == (TILES - len(failed), len(failed))
    check_whole(target, case)
