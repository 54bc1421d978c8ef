"""One tile from source to output: what runs in every process, whatever the engine."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING
from uuid import uuid4

import numpy as np
import zarr

from tilepipe.engines import TileResult, one_line
from tilepipe.errors import TileError
from tilepipe.geometry import Region, halved
from tilepipe.host.allocator import compute_thread
from tilepipe.models.device import PRECISIONS
from tilepipe.models.model import load_model
from tilepipe.models.predictor import Predictor
from tilepipe.models.rehearsal import whole_graph
from tilepipe.models.transfer import is_out_of_memory
from tilepipe.models.windows import Window, Windows, cut, read_box
from tilepipe.planning.costs import READS, SLOTS, block_rows, blocks
from tilepipe.planning.regions import Regions, regions_of
from tilepipe.runs.fence import Fence
from tilepipe.segmentation.streams import RowReader, RowWriter
from tilepipe.volumes.borders import read_mirrored, read_zero_padded
from tilepipe.volumes.source import open_source

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.planning.plan import Plan
    from tilepipe.runs.fence import Right


log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SegmentJob:
    """A plan ready to be run, small enough to be sent to every worker."""

    plan: Plan
    right: Right
    """The right of the run to write to its output, which it names."""
    key: str = field(default_factory=lambda: uuid4().hex)
    """Of this run's work alone: others of the same plan, to another output, have another."""
    folder: str = field(default_factory=os.getcwd)
    """Where the run was begun: the network's own code may lie there, wherever a worker is."""

    @property
    def slots(self) -> int:
        """Return the tiles in flight in a process: one is read, one computed, one written.

        A sweep reads and writes its own rows meanwhile; beside it the next tile begins to read.
        """
        return SLOTS if self.plan.sizes.sweep is None else 2

    def open(self) -> Worker:
        """Load the model, open source and output; return what processes a tile by its index."""
        return Worker(self.plan, self.right, self.folder)


@dataclass(frozen=True, slots=True)
class Part:
    """A tile, with the voxels that its windows read."""

    write: Region
    windows: list[Window]
    box: Region
    image: NDArray[np.generic]
    """The voxels of ``box`` as in the source, shape (channels, *box.shape)."""


class Worker:
    """What one process has open to compute tiles of a plan.

    Reads and writes in the threads that call it, and computes in one of its own.
    """

    def __init__(self, plan: Plan, right: Right, folder: str) -> None:
        options = plan.options
        self._compute = compute_thread()
        _bound_reads()
        self._plan, self._folder = plan, folder
        self._volume = open_source(plan.source.path, options)
        self._fence = Fence(right)
        self._output = right.output.open(guard=self._fence, durable=options.durable)
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._reading = threading.Lock()  # one tile at a time, or memory is not what was planned
        self._sweeping = threading.Lock()
        self._narrowing = threading.Lock()
        self._narrowed = 0
        self._reads = ThreadPoolExecutor(1, thread_name_prefix="tilepipe-read")
        self._writes = ThreadPoolExecutor(1, thread_name_prefix="tilepipe-write")
        self._idle_since = time.perf_counter()
        self._predictor = self._compute.submit(self._load).result()

    def _load(self) -> Predictor:
        options = self._plan.options
        model = load_model(
            self._plan.model.path,
            network=options.network,
            network_args=options.network_args,
            head=options.head,
            folder=self._folder,
            channels=self._plan.profile.channels,
        )
        if model.digest != self._plan.model.digest:
            raise TileError(f"model (={model.path}) has changed since the plan was made")
        plan = self._plan
        graph = None
        if plan.strategy != "windows":
            graph = whole_graph(model, plan.profile, plan.box, PRECISIONS[options.precision])
            if graph is None:
                raise TileError(
                    f"model (={model.path}) cannot be computed by regions on this machine, as it"
                    " could where the plan was made; plan it on a machine like this one"
                )
        self._cuts: Windows | Regions
        if graph is None:
            self._cuts = Windows(plan.profile, plan.sizes.window, plan.limit)
        else:
            size = plan.sizes.window if plan.sizes.sweep is None else plan.sizes.tile
            self._cuts = regions_of(plan.profile, graph, plan.box, size)
        device = options.device if options.device != "auto" else self._plan.sizes.device
        return Predictor(
            model,
            device=device,
            precision=options.precision,
            threads=self._plan.sizes.threads,
            write=options.write,
            activation=self._plan.activation,
            threshold=0.5 if options.threshold is None else options.threshold,
            graph=graph,
        )

    def __call__(self, index: int) -> TileResult:
        """Read, compute and write one tile; its voxels are in the output when this returns.

        Where memory is short, on this tile and all that follow the network gets half as much.
        """
        while True:
            times, began = self._narrowed, time.perf_counter()
            try:
                result = self._process(index, times)
                seconds = time.perf_counter() - began
                log.info("tile %d, voxels %s: %.2f s", index, self._plan.grid[index].write, seconds)
                return result
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
                self._narrow(times, one_line(error))
            self._predictor.free()

    def close(self) -> None:
        """Write no more, and wait for the writes that have begun."""
        if not self._fence.close():
            log.warning("a write to %s has not ended yet", self._plan.target)

    def _narrow(self, times: int, why: str) -> None:
        """Halve what the network gets at once, unless another tile has done so meanwhile."""
        with self._narrowing:
            if times != self._narrowed:
                return
            if not self._can_narrow(times):
                raise TileError(f"memory is short for the smallest part of a tile: {why}")
            self._narrowed += 1
            log.warning("memory is short, tiles are computed in smaller parts: %s", why)

    def _can_narrow(self, times: int) -> bool:
        if self._plan.sizes.sweep is None:
            return self._cuts_for(times + 1).size != self._cuts_for(times).size
        parts = [len(self._strips(self._plan.grid[0].write, n)) for n in (times, times + 1)]
        return parts[1] > parts[0]

    def _strips(self, write: Region, times: int) -> list[Region]:
        """Return the parts of a tile that are swept one after the other; whole write units."""
        return halved(write, self._plan.sizes.unit, times, self._plan.sizes.sweep)

    def _cuts_for(self, times: int) -> Windows | Regions:
        """Return how tiles are cut into windows where memory was short so often."""
        size, step = list(self._cuts.size), self._plan.profile.context.step
        for _ in range(times):
            axis = max(range(len(size)), key=size.__getitem__)
            size[axis] = max(step[axis], size[axis] // 2 // step[axis] * step[axis])
        return replace(self._cuts, size=tuple(size))

    def _process(self, index: int, times: int) -> TileResult:
        write = self._plan.grid[index].write
        if (axis := self._plan.sizes.sweep) is not None:
            parts = [self._sweep(index, axis, part) for part in self._strips(write, times)]
            return replace(
                parts[0],
                voxels=write.size,
                nonfinite=sum(part.nonfinite for part in parts),
                read_seconds=sum(part.read_seconds for part in parts),
                compute_seconds=sum(part.compute_seconds for part in parts),
                write_seconds=sum(part.write_seconds for part in parts),
                starved_seconds=sum(part.starved_seconds for part in parts),
                narrowed=times,
            )
        cuts, began = self._cuts_for(times), time.perf_counter()
        part = self.read(write, cuts)
        spoiled = _spoiled(part.image[(slice(None), *write.within(part.box.start))])
        ready = time.perf_counter()
        answer, seconds, starved = self._compute.submit(self._timed, part, began, ready).result()
        done = time.perf_counter()
        self._output.write(write, answer if self._plan.answer.stacked else answer[0])
        return TileResult(
            index=index,
            voxels=write.size,
            nonfinite=spoiled,
            read_seconds=ready - began,
            compute_seconds=seconds,
            write_seconds=time.perf_counter() - done,
            worker=self._name,
            narrowed=times,
            starved_seconds=starved,
        )

    def _timed(
        self, part: Part, began: float, ready: float
    ) -> tuple[NDArray[np.generic], float, float]:
        """Return a tile's answer, the seconds it took, and those that its data were waited for."""
        starved = max(0.0, ready - max(began, self._idle_since))
        answer, seconds = self.answer(part)
        self._idle_since = time.perf_counter()
        return answer, seconds, starved

    def _sweep(self, index: int, axis: int, write: Region) -> TileResult:
        """Read, compute and write a tile, or a part, slab by slab, all three at once."""
        plan, cuts = self._plan, self._cuts
        assert isinstance(cuts, Regions)
        slab, unit = plan.sizes.window[axis], plan.sizes.unit[axis]
        spoiled, loading = 0, 0.0

        def load(region: Region) -> NDArray[np.float32]:
            nonlocal spoiled, loading
            began = time.perf_counter()
            image = self._read(region)
            inside = region.intersect(write)
            spoiled += _spoiled(image[(slice(None), *inside.within(region.start))])
            grey = np.moveaxis(self._normalized(image, region), (1 + axis, 0), (0, -1))
            loading += time.perf_counter() - began
            return np.ascontiguousarray(grey)

        box = read_box(cut(cuts, plan.profile.axes, write))
        rows = block_rows(slab, plan.source.chunks[axis])
        parts = list(blocks(box.start[axis], box.stop[axis], plan.source.shape[axis], rows))
        reader = RowReader(box, axis=axis, parts=parts, load=load, pool=self._reads)
        with self._sweeping:
            began = time.perf_counter()

            def rows_of(region_read: Region) -> NDArray[np.float32]:
                region_read = region_read.shift(cuts.origin)
                low, high = region_read.start[axis], region_read.stop[axis]
                if region_read != _with_rows(box, axis, low, high):
                    raise TileError(f"the network reads {region_read}; it is given rows of {box}")
                return reader.rows(low, high)

            swept = self._predictor.sweep(cuts.output_box(write), axis, slab, rows_of)
            writer = RowWriter(self._output, write, axis=axis, unit=unit, pool=self._writes)
            try:
                while (slab_answer := self._compute.submit(next, swept, None).result()) is not None:
                    writer.add(slab_answer[1] if plan.answer.stacked else slab_answer[1][0])
            except BaseException:
                writer.finish()  # when the tile is tried again, nobody else may write there
                raise
            computing = time.perf_counter() - began
        writing = writer.finish()
        return TileResult(
            index=index,
            voxels=write.size,
            nonfinite=spoiled,
            read_seconds=loading,
            compute_seconds=computing - reader.waited - writer.waited,
            write_seconds=writing,
            worker=self._name,
            starved_seconds=reader.waited,
        )

    def _read(self, region: Region) -> NDArray[np.generic]:
        """Return a region of the source, which goes on mirrored or as zeros."""
        read = read_mirrored if self._plan.limit is None else read_zero_padded
        return read(self._volume, region)

    def _normalized(self, image: NDArray[np.generic], region: Region) -> NDArray[np.float32]:
        """Return what the network is given for voxels of the source."""
        plan = self._plan
        assert plan.normalization is not None
        grey = plan.normalization.apply(image)
        if image.dtype.kind == "f":
            np.nan_to_num(grey, copy=False, nan=0.0, posinf=0.0, neginf=0.0)
        if plan.limit is not None:
            _clear_outside(grey, region, plan.source.shape)
        return grey

    def read(self, write: Region, cuts: Windows | Regions | None = None) -> Part:
        """Read what a tile needs: its halo comes straight from the source."""
        windows = cut(cuts or self._cuts, self._plan.profile.axes, write)
        box = read_box(windows)
        with self._reading:
            return Part(write, windows, box, self._read(box))

    def answer(self, part: Part) -> tuple[NDArray[np.generic], float]:
        """Run the network over a tile's windows; shape (channels, *write.shape), and seconds."""
        began = time.perf_counter()
        plan = self._plan
        leading = len(part.write.start) - plan.profile.axes
        answer = np.empty((plan.answer.channels, *part.write.shape), plan.answer.dtype)
        for window in part.windows:
            image = part.image[(slice(None), *window.read.within(part.box.start))]
            grey = self._normalized(image, window.read)
            grey = grey.reshape(grey.shape[0], *grey.shape[1 + leading :])
            keep = Region(window.keep.start[leading:], window.keep.stop[leading:])
            if isinstance(self._cuts, Regions):
                seen = Region(window.read.start[leading:], window.read.stop[leading:])
                rows = seen.shift([-n for n in self._cuts.origin])
                values = self._predictor(grey, self._cuts.output_box(keep), rows)
            else:
                first = zip(window.read.start[leading:], plan.profile.offset, strict=True)
                inner = keep.within([a + o for a, o in first])
                values = self._predictor(grey)[(slice(None), *inner)]
            place = (slice(None), *window.keep.within(part.write.start))
            answer[place] = values.reshape(answer[place].shape)
        return answer, time.perf_counter() - began


def _with_rows(box: Region, axis: int, low: int, high: int) -> Region:
    """Return a box with other rows along one axis."""
    return Region(
        (*box.start[:axis], low, *box.start[axis + 1 :]),
        (*box.stop[:axis], high, *box.stop[axis + 1 :]),
    )


def _bound_reads() -> None:
    """Let Zarr decode no more chunks at once than memory was planned for, on any number of cores.

    What the user's own configuration says of threads is left.
    """
    if zarr.config.get("threading.max_workers") is None:
        zarr.config.set({"threading.max_workers": READS})
    if zarr.config.get("async.concurrency") > READS:
        zarr.config.set({"async.concurrency": READS})


def _spoiled(image: NDArray[np.generic]) -> int:
    """Count the values that are not finite."""
    return int(image.size - np.isfinite(image).sum()) if image.dtype.kind == "f" else 0


def _clear_outside(grey: NDArray[np.float32], box: Region, shape: tuple[int, ...]) -> None:
    """Set what lies past the volume's end to zero, as the network would pad it."""
    for axis, (start, stop, length) in enumerate(zip(box.start, box.stop, shape, strict=True)):
        if stop > length:
            index: list[slice] = [slice(None)] * grey.ndim
            index[axis + 1] = slice(max(0, length - start), None)
            grey[tuple(index)] = 0
