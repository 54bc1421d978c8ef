"""One tile from source to target: what runs in every process, whatever the engine."""

from __future__ import annotations

import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.engines import TileResult
from tilepipe.errors import TileError
from tilepipe.geometry import Region
from tilepipe.model import load_model
from tilepipe.predict import Predictor
from tilepipe.target import open_target
from tilepipe.tiling import SLOTS
from tilepipe.volume import open_volume, read_mirrored, read_zero_padded

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from tilepipe.plan import Plan


@dataclass(frozen=True, slots=True)
class SegmentJob:
    """A plan ready to be run, small enough to be sent to every worker."""

    plan: Plan
    key: str
    """The plan's fingerprint: the same key is the same work."""

    @property
    def slots(self) -> int:
        """Tiles in flight in a process: one is read, one computed, one written."""
        return SLOTS

    def open(self) -> Callable[[int], TileResult]:
        """Load the model, open source and target; return what processes a tile by its index."""
        return _Worker(self.plan)


class _Worker:
    """Reads and writes in the caller's threads and computes in one of its own."""

    def __init__(self, plan: Plan) -> None:
        options = plan.options
        self._plan = plan
        self._volume = open_volume(plan.source.path, axes=options.axes, level=options.level)
        self._target = open_target(plan.target)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._reading = threading.Lock()  # one tile at a time, or memory is not what was planned
        self._compute = ThreadPoolExecutor(1, thread_name_prefix="tilepipe-compute")
        self._predictor = self._compute.submit(self._load).result()

    def _load(self) -> Predictor:
        options = self._plan.options
        model = load_model(
            self._plan.model.path,
            network=options.network,
            network_args=options.network_args,
            head=options.head,
        )
        if model.digest != self._plan.model.digest:
            raise TileError(f"model (={model.path}) has changed since the plan was made")
        device = options.device if options.device != "auto" else self._plan.sizes.device
        return Predictor(
            model,
            device=device,
            precision=options.precision,
            threads=self._plan.sizes.threads,
            write=options.write,
            activation=self._plan.profile.activation,
            threshold=0.5 if options.threshold is None else options.threshold,
        )

    def __call__(self, index: int) -> TileResult:
        """Read, compute and write one tile; its voxels are in the target when this returns."""
        plan, write = self._plan, self._plan.grid[index].write
        box = plan.windows.read(write)
        read = read_mirrored if plan.limit is None else read_zero_padded
        began = time.perf_counter()
        with self._reading:
            image = read(self._volume, box)
        spoiled = self._spoiled(image[(slice(None), *write.within(box.start))])
        ready = time.perf_counter()
        answer, seconds = self._compute.submit(self._answer, image, box, write).result()
        done = time.perf_counter()
        self._target.write(write, answer if plan.options.write != "labels" else answer[0])
        return TileResult(
            index=index,
            voxels=write.size,
            nonfinite=spoiled,
            read_seconds=ready - began,
            compute_seconds=seconds,
            write_seconds=time.perf_counter() - done,
            worker=self._name,
        )

    @staticmethod
    def _spoiled(image: NDArray[np.generic]) -> int:
        """Count the values that are not finite."""
        return int(image.size - np.isfinite(image).sum()) if image.dtype.kind == "f" else 0

    def _answer(
        self, image: NDArray[np.generic], box: Region, write: Region
    ) -> tuple[NDArray[np.generic], float]:
        """Run the network over a tile's windows; shape (channels, *write.shape)."""
        began = time.perf_counter()
        plan = self._plan
        assert plan.normalization is not None
        leading = len(write.start) - plan.profile.axes
        answer = np.empty((plan.answer.channels, *write.shape), plan.answer.dtype)
        for window in plan.windows.of(write):
            cut = image[(slice(None), *window.read.within(box.start))]
            grey = plan.normalization.apply(cut)
            if grey.dtype.kind == "f" and image.dtype.kind == "f":
                np.nan_to_num(grey, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
            if plan.limit is not None:
                _clear_outside(grey, window.read, plan.source.shape)
            found = self._predictor(grey.reshape(grey.shape[0], *grey.shape[1 + leading :]))
            keep = Region(window.keep.start[leading:], window.keep.stop[leading:])
            first = window.read.start[leading:]
            origin = [a + o for a, o in zip(first, plan.profile.offset, strict=True)]
            part = found[(slice(None), *keep.within(origin))]
            place = (slice(None), *window.keep.within(write.start))
            answer[place] = part.reshape(answer[place].shape)
        return answer, time.perf_counter() - began


def _clear_outside(grey: NDArray[np.float32], box: Region, shape: tuple[int, ...]) -> None:
    """Set what lies past the volume's end to zero, as the network would pad it."""
    for axis, (start, stop, length) in enumerate(zip(box.start, box.stop, shape, strict=True)):
        if stop > length:
            index: list[slice] = [slice(None)] * grey.ndim
            index[axis + 1] = slice(max(0, length - start), None)
            grey[tuple(index)] = 0
