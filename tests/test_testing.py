"""What is shipped for tests of others: it fails where it should, and only there."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

import numpy as np
import pytest
import zarr
from hypothesis import given, settings

import tilepipe as tp
from tests.support import noise, read, write_unet, write_volume
from tilepipe.engines import TileFailure, TileResult, serial
from tilepipe.errors import TileError
from tilepipe.options import Options
from tilepipe.storage.guarded import GuardedStore, NoGuard
from tilepipe.testing.engines import FileJob, check_engine
from tilepipe.testing.storage import FailingStore, unavailable
from tilepipe.testing.strategies import regions, volumes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tilepipe.engines import Job
    from tilepipe.geometry import Region

    Outcomes = Iterator[TileResult | TileFailure]

OPTIONS = Options(write="logits", tile=(32, 32), chunks=(32, 32), threads=1)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A volume of 3 x 3 tiles, a network, and its answer."""
    folder = tmp_path_factory.mktemp("testing")
    write_unet(folder / "net.pt", depth=2)
    write_volume(folder / "v.zarr", noise(96, 96), "yx", (32, 32))
    assert run(folder, folder / "whole.zarr").done == 9
    return folder


def run(files: Path, output: Path, engine: str = "serial") -> tp.Report:
    return tp.segment(
        files / "v.zarr", model=files / "net.pt", output=output, options=OPTIONS, engine=engine
    )


@pytest.mark.parametrize("engine", ["serial", pytest.param("dask", marks=pytest.mark.long)])
def test_tiles_that_cannot_be_written_are_set_aside_and_done_later(
    files: Path, tmp_path: Path, engine: str
) -> None:
    """Of an output whose second row of chunks is out of reach for all processes."""
    output = tmp_path / "o.zarr"
    with pytest.raises(KeyboardInterrupt):
        tp.segment(
            files / "v.zarr", model=files / "net.pt", output=output, options=OPTIONS,
            engine="serial", progress=interrupt,
        )  # fmt: skip
    with unavailable(output / "0" / "c" / "0" / "1"):
        report = run(files, output, engine)
    assert [failure.index for failure in report.failures] == [3, 4, 5]
    assert report.unfinished == 3
    report = run(files, output)
    assert (report.before, report.done, report.failures) == (6, 3, [])
    assert np.array_equal(read(output), read(files / "whole.zarr"))


def interrupt(report: tp.Report) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("name", ["c/0/0", "c/0", "c/9/9"])
def test_what_was_unavailable_is_put_back(tmp_path: Path, name: str) -> None:
    image = noise(8, 8)
    path = write_volume(tmp_path / "v.zarr", image, "yx", (4, 4))
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    with unavailable(path / name):
        for access in ((path / name).read_bytes, (path / name / "below").read_bytes):
            with pytest.raises(OSError, match=name) as caught:
                access()
            assert caught.value.errno == errno.ELOOP
    assert {file: file.read_bytes() for file in path.rglob("*") if file.is_file()} == before
    assert np.array_equal(zarr.open_array(path, mode="r")[:], image)


def test_what_is_written_meanwhile_stays(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    with unavailable(tmp_path / "file"):
        (tmp_path / "new").write_bytes(b"new")
        (tmp_path / "new").replace(tmp_path / "file")
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"file": b"new"}


@settings(max_examples=20)
@given(image=volumes(shape=(8, 6)), region=regions((8, 6), empty=False))
def test_a_store_that_works_gives_what_was_written(
    image: NDArray[np.generic], region: Region
) -> None:
    store = FailingStore(zarr.storage.MemoryStore())
    array = zarr.create_array(store, data=image, chunks=(3, 2))
    np.testing.assert_array_equal(array[region.slices], image[region.slices])


def test_what_fails_in_a_store_is_as_asked() -> None:
    store = FailingStore(zarr.storage.MemoryStore())
    array = zarr.create_array(store, data=noise(8), chunks=4)
    with store.failing("c/*", directions={"writing"}) as fault:
        for part in (slice(0, 4), slice(4, 8)):
            with pytest.raises(OSError, match="Input/output error"):
                array[part] = 1
        before = array[:]
    assert fault.count == 2
    assert np.array_equal(before, noise(8))
    with store.failing("c/0", times=2):
        for _ in range(2):
            with pytest.raises(OSError, match="c/0"):
                array[:4]
        assert np.array_equal(array[:], noise(8))
    with store.failing("zarr.json"), pytest.raises(OSError, match=r"zarr\.json"):
        zarr.open_array(store, mode="r")
    array[:] = 0
    assert not np.any(zarr.open_array(store, mode="r")[:])


def test_a_guarded_store_counts_only_what_was_written() -> None:
    """What has failed is not among what would have to be forced to disk."""
    store = FailingStore(zarr.storage.MemoryStore())
    guarded = GuardedStore(store, NoGuard(), None, durable=True)
    array = zarr.create_array(guarded, shape=(8,), chunks=(4,), dtype="uint8")
    guarded.sync()
    with store.failing("c/1", directions={"writing"}), pytest.raises(OSError, match="c/1"):
        array[4:] = 1
    assert guarded._written == set()
    array[4:] = 1
    assert guarded._written == {"c/1"}


def forget(job: Job, tiles: Iterable[int], retries: int) -> Outcomes:
    """Lose a tile."""
    return serial.run(job, [index for index in tiles if index != 5], retries=retries)


def repeat(job: Job, tiles: Iterable[int], retries: int) -> Outcomes:
    """Process a tile twice."""
    return serial.run(job, [*tiles, 5], retries=retries)


def give_up(job: Job, tiles: Iterable[int], retries: int) -> Outcomes:
    """Try nothing again."""
    return serial.run(job, tiles, retries=0)


@pytest.mark.parametrize("engine", [forget, repeat, give_up])
def test_an_engine_that_breaks_the_law_is_found(
    engine: Callable[..., Outcomes], tmp_path: Path
) -> None:
    with pytest.raises(AssertionError):
        check_engine(engine, tmp_path)


def test_a_job_that_is_broken_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(TileError, match="no such model"):
        list(serial.run(FileJob(str(tmp_path), broken=True), range(3)))
