"""What a worker does where memory is short, and what moves to a device and back."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

import tilepipe as tp
from tests.support import assert_close, noise, read, right_to, write_unet, write_volume
from tilepipe.engines import TileFailure, serial
from tilepipe.models.predictor import Predictor
from tilepipe.models.transfer import Transfer, is_out_of_memory
from tilepipe.options import Options
from tilepipe.segmentation.worker import SegmentJob

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from tilepipe.geometry import Region
    from tilepipe.graph.bounds import Rows


class Small(Predictor):
    """A network on a device whose memory holds ``room`` voxels of the answer across a slab."""

    room = 0

    def __call__(
        self,
        image: NDArray[np.floating],
        region: Region | None = None,
        rows: Region | None = None,
    ) -> NDArray[np.generic]:
        assert region is not None
        self._check(region.size)
        return super().__call__(image, region, rows)

    def sweep(
        self, region: Region, axis: int, slab: int, read: Callable[[Region], NDArray[np.floating]]
    ) -> Iterator[tuple[Rows, NDArray[np.generic]]]:
        slabs = super().sweep(region, axis, slab, read)
        yield next(slabs)  # it is in the middle that memory runs out
        self._check(region.size // region.shape[axis])
        yield from slabs

    def _check(self, voxels: int) -> None:
        if voxels > self.room:
            raise torch.OutOfMemoryError(f"{voxels} voxels do not fit {self.room}")


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    model = write_unet(tmp_path / "unet.pt")
    return model, write_volume(tmp_path / "v.zarr", noise(96, 200), "yx")


@pytest.mark.parametrize(("strategy", "room"), [("sweep", 60), ("direct", 20 * 40)])
def test_where_memory_is_short_tiles_are_computed_in_parts(
    files: tuple[Path, Path], strategy: str, room: int, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    model, source = files
    options = Options(write="logits", tile=(96, 200), chunks=(16, 20), strategy=strategy)
    whole = tp.segment(source, model=model, output=tmp_path / "whole.zarr", options=options)
    assert whole.narrowed == 0
    monkeypatch.setattr(Small, "room", room)
    monkeypatch.setattr("tilepipe.segmentation.worker.Predictor", Small)
    report = tp.segment(source, model=model, output=tmp_path / "parts.zarr", options=options)
    assert report.done == report.narrowed == 1
    assert not report.failures
    assert_close(read(tmp_path / "parts.zarr"), read(tmp_path / "whole.zarr"))


def test_a_worker_remembers_and_gives_up_at_the_smallest_part(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = files
    options = Options(tile=(48, 100), chunks=(48, 25), strategy="sweep")
    tp.segment(source, model=model, output=tmp_path / "o", options=options)
    plan = tp.plan(source, model=model, output=tmp_path / "o", options=options)
    monkeypatch.setattr("tilepipe.segmentation.worker.Predictor", Small)
    monkeypatch.setattr(Small, "room", 50)
    with right_to(tmp_path / "o") as right:
        worker = SegmentJob(plan, right).open()
        assert [worker(index).narrowed for index in (0, 1)] == [1, 1]
        monkeypatch.setattr(Small, "room", 10)
        [failure] = serial.run(SegmentJob(plan, right), [0])
    assert isinstance(failure, TileFailure)
    assert "smallest part of a tile: OutOfMemoryError" in failure.cause


def test_arrays_go_and_come_back() -> None:
    moved = Transfer(torch.device("cpu"), torch.float32)
    array = noise(3, 4, 5, dtype="float32")
    assert np.array_equal(moved.fetch(moved.send(array))(), array)
    assert is_out_of_memory(torch.OutOfMemoryError("short"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))


@pytest.mark.gpu
@pytest.mark.parametrize("strategy", ["sweep", "direct"])
def test_a_gpu_gives_the_same_answer(
    files: tuple[Path, Path], strategy: str, tmp_path: Path
) -> None:
    model, source = files
    for device in ("cpu", "cuda"):
        options = Options(write="logits", tile=(48, 200), strategy=strategy, device=device)
        tp.segment(source, model=model, output=tmp_path / device, options=options)
    assert_close(read(tmp_path / "cuda"), read(tmp_path / "cpu"))


@pytest.mark.gpu
def test_a_gpu_that_is_short_of_memory(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt", base=32)
    source = write_volume(tmp_path / "v.zarr", noise(512, 4096), "yx")
    options = Options(write="logits", tile=(512, 4096), strategy="sweep", device="cuda")
    whole = tp.segment(source, model=model, output=tmp_path / "whole", options=options)
    needed = torch.cuda.max_memory_allocated()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(0.6 * needed / total)
    try:
        parts = tp.segment(source, model=model, output=tmp_path / "parts", options=options)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert (whole.narrowed, parts.narrowed) == (0, 1)
    assert_close(read(tmp_path / "parts"), read(tmp_path / "whole"))
