"""Options together: each row of docs/combinations.md is run, and holds one pair of choices or more.

The table is the test: a choice that is added to `CHOICES` and met by no row fails here.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from itertools import combinations, product
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr

from tests import slurm_cluster
from tests.support import noise, write_unet
from tilepipe.engines import dask
from tilepipe.engines.jobs import Jobs
from tilepipe.errors import BadRequest
from tilepipe.options import Options
from tilepipe.runs.array import ArrayTask
from tilepipe.segmentation.segment import segment
from tilepipe.storage.location import locate, zarr_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tilepipe.segmentation.report import Report

TABLE = Path(__file__).parents[1] / "docs" / "combinations.md"
CHOICES = {
    "engine": ("serial", "dask", "array", "slurm"),
    "history": ("once", "resumed", "overwritten", "two at once"),
    "axes": ("file", "given"),
    "boundary": ("mirror", "network"),
    "normalize": ("scale", "percentile"),
    "place": ("folder", "bucket"),
    "size": ("even", "odd"),
    "strategy": ("direct", "sweep"),
}
REFUSED = {frozenset({("engine", "array"), ("history", "overwritten")})}
"""Pairs that a plan refuses; each has a test below."""
TILE = (32, 32)


@dataclass(frozen=True)
class Row:
    """One combination."""

    engine: str
    history: str
    axes: str
    boundary: str
    normalize: str
    place: str
    size: str
    strategy: str

    @property
    def pairs(self) -> set[frozenset[tuple[str, str]]]:
        chosen = [(name, getattr(self, name)) for name in CHOICES]
        return {frozenset(pair) for pair in combinations(chosen, 2)}

    def __str__(self) -> str:
        return "-".join(getattr(self, name).replace(" ", "_") for name in CHOICES)


def rows() -> list[Row]:
    """Read the table of the document."""
    lines = [line for line in TABLE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == list(CHOICES)
    return [Row(*values) for values in cells[2:]]


def marked(row: Row) -> object:
    """Return a row as a parameter: what starts servers and workers takes longer."""
    slurm = (
        pytest.mark.slurm,
        pytest.mark.skipif(bool(slurm_cluster.missing()), reason=slurm_cluster.missing()),
    )
    long = row.engine != "serial" or row.place == "bucket"
    marks = [pytest.mark.long] * long + list(slurm) * (row.engine == "slurm")
    return pytest.param(row, id=str(row), marks=marks)


def test_every_pair_of_choices_is_in_the_table_or_refused() -> None:
    wanted = {
        frozenset({(one, a), (other, b)})
        for one, other in combinations(CHOICES, 2)
        for a, b in product(CHOICES[one], CHOICES[other])
    }
    table = rows()
    for row in table:
        assert all(getattr(row, name) in CHOICES[name] for name in CHOICES), row
    missing = wanted - set().union(*(row.pairs for row in table)) - REFUSED
    assert sorted(sorted(pair) for pair in missing) == []


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A padded network, and volumes of two channels that say their axes or do not."""
    folder = tmp_path_factory.mktemp("combinations")
    write_unet(folder / "net.pt", in_channels=2, padding="same", depth=2)
    for size, shape in (("even", (64, 96)), ("odd", (67, 91))):
        image = noise(2, *shape)
        zarr.create_array(
            folder / f"{size}-file.zarr", data=image, chunks=(1, 32, 32), dimension_names="cyx"
        )
        last = np.ascontiguousarray(np.moveaxis(image, 0, -1))
        zarr.create_array(folder / f"{size}-given.zarr", data=last, chunks=(32, 32, 2))
    return folder


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with dask.local_client(2, threads=2, dashboard=False) as client:
        yield str(client.scheduler_info()["address"])


@pytest.fixture(scope="module")
def jobs() -> Iterator[Jobs]:
    """Jobs of a cluster; only what is set here is taken back, since others set things meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DASK_JOBQUEUE__SLURM__DEATH_TIMEOUT", "40")
        patch.setenv("OMP_NUM_THREADS", "1")
        with slurm_cluster.cluster():
            yield Jobs(
                partition="debug", cores=1, memory=1_500_000_000, poll=0.5, walltime="00:10:00"
            )


def options_of(row: Row) -> Options:
    return Options(
        write="probabilities",
        axes="yxc" if row.axes == "given" else None,
        boundary=row.boundary,
        normalize="percentile:1,99" if row.normalize == "percentile" else "scale:0.004,0",
        strategy=row.strategy,
        tile=TILE,
        chunks=TILE,
        threads=1,
        device="cpu",
    )


def voxels(target: str) -> NDArray[np.generic]:
    store = zarr_store(locate(target, "output") / "0", read_only=True)
    return np.asarray(zarr.open_array(store, mode="r")[:])


def runner(row: Row, files: Path, request: pytest.FixtureRequest) -> Callable[..., None]:
    """Return what segments to a target, with the row's engine."""
    source, model = files / f"{row.size}-{row.axes}.zarr", files / "net.pt"

    requests: list[dict[str, object]] = [{"engine": "serial"}]
    if row.engine == "dask":
        requests = [{"engine": "dask", "scheduler": request.getfixturevalue("scheduler")}]
    elif row.engine == "array":
        requests = [{"task": ArrayTask(number, 2)} for number in (1, 2)]
    elif row.engine == "slurm":
        requests = [{"engine": "slurm", "jobs": request.getfixturevalue("jobs")}]

    def run(target: str, options: Options, **more: object) -> None:
        for each in requests:
            report = segment(
                source, model=model, output=target, options=options, **each, **more  # type: ignore[arg-type]
            )  # fmt: skip
            assert not report.failures
        assert not report.unfinished

    return run


def stop(report: Report) -> None:
    """Interrupt a run after its second tile."""
    if report.done == 2:
        raise KeyboardInterrupt


@pytest.mark.parametrize("row", [marked(row) for row in rows()])
def test_a_row_gives_the_bytes_of_one_undisturbed_run(
    row: Row, files: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    if row.engine == "slurm":  # where jobs of an output in a bucket write their logs
        request.getfixturevalue("monkeypatch").chdir(tmp_path)
    options, plain = options_of(row), replace(row, engine="serial")
    runner(plain, files, request)(str(tmp_path / "truth"), options)
    truth = voxels(str(tmp_path / "truth"))
    folder = str(tmp_path) if row.place == "folder" else request.getfixturevalue("prefix")()
    run, target = runner(row, files, request), f"{folder}/o.zarr"
    if row.history == "two at once":
        errors: list[BaseException] = []

        def other() -> None:
            try:
                run(f"{folder}/other.zarr", options)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        run(target, options)
        thread.join()
        assert not errors
        assert np.array_equal(voxels(f"{folder}/other.zarr"), truth)
    elif row.history == "once":
        run(target, options)
    else:
        before = options if row.history == "resumed" else replace(options, normalize="zscore")
        with pytest.raises(KeyboardInterrupt):
            run(target, before, progress=stop)
        run(target, options, **({} if row.history == "resumed" else {"overwrite": True}))
    assert np.array_equal(voxels(target), truth)


def test_an_array_does_not_overwrite(files: Path, tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="must not be with --overwrite"):
        segment(
            files / "even-file.zarr", model=files / "net.pt", output=tmp_path / "o.zarr",
            task=ArrayTask(1, 2), overwrite=True,
        )  # fmt: skip
