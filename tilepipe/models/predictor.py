"""The network on its device: a window of grey values in, a window of the answer out."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import TileError
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.sweep import Sweep
from tilepipe.models.device import PRECISIONS
from tilepipe.models.transfer import Transfer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import numpy as np
    from numpy.typing import NDArray

    from tilepipe.geometry import Region
    from tilepipe.graph.bounds import Rows
    from tilepipe.graph.graph import Graph
    from tilepipe.models.model import Model
    from tilepipe.planning.activation import Activation

log = logging.getLogger(__name__)


class Predictor:
    """A network on a device. One per process; call it from one thread at a time."""

    def __init__(
        self,
        model: Model,
        *,
        device: str,
        precision: str,
        threads: int,
        write: str,
        activation: Activation,
        threshold: float,
        graph: Graph | None = None,
    ) -> None:
        """With ``graph``, calls give regions of the one pass that it was exported for."""
        self._device = torch.device(device)
        self._dtype = PRECISIONS[precision]
        self._threads = threads
        self._write, self._activation, self._threshold = write, activation, threshold
        layout = torch.channels_last if model.axes == 2 else torch.channels_last_3d
        self._layout = layout
        network = model.module.to(self._device, self._dtype)
        for parameter in network.parameters():
            if parameter.ndim == model.axes + 2:
                parameter.data = parameter.data.contiguous(memory_format=layout)
        if self._device.type == "cuda":  # for the whole process, which runs one network
            torch.backends.cudnn.allow_tf32 = precision == "tf32"
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        self._network = network
        self._transfer = Transfer(self._device, self._dtype)
        self._evaluator = None if graph is None else RegionEvaluator(graph, network)

    def __call__(
        self,
        image: NDArray[np.floating],
        region: Region | None = None,
        rows: Region | None = None,
    ) -> NDArray[np.generic]:
        """Return the answer for a window of shape (channels, *axes), normalized, float.

        With ``region``, rows of the graph's output, ``image`` is what that region reads: ``rows``
        of the graph's input. The answer has shape (classes, *axes), or (1, *axes) of unsigned
        integers for labels of classes that exclude one another. Raises `TileError` where the region
        reads other rows.
        """
        self._set_threads()
        with torch.inference_mode():
            tensor = self._transfer.send(image)[None].contiguous(memory_format=self._layout)
            if region is None or self._evaluator is None:
                answer = self._network(tensor)
            else:

                def read(wanted: Region) -> torch.Tensor:
                    if wanted != rows:
                        raise TileError(f"the network reads rows {wanted}; it is given {rows}")
                    return tensor

                answer = self._evaluator(region, read)
            return self._transfer.fetch(self._finish(answer[0]))()

    def sweep(
        self, region: Region, axis: int, slab: int, read: Callable[[Region], NDArray[np.floating]]
    ) -> Iterator[tuple[Rows, NDArray[np.generic]]]:
        """Yield the answer for a region of the graph's output, ``slab`` rows of ``axis`` at a time.

        ``read`` gives rows of the graph's input, normalized, with ``axis`` in front and the
        channels last. What is yielded is shaped as that of a call, a slab after it was begun: on a
        device it comes back while the next one is computed.
        """
        assert self._evaluator is not None
        rank = len(region.start)
        order = [rank, *(1 + n - (n > axis) if n != axis else 0 for n in range(rank))]

        def load(box: Region) -> torch.Tensor:
            return self._transfer.send(read(box)).permute(order)[None]

        swept = Sweep(self._evaluator, region, axis).run(slab, load)
        before: tuple[Rows, Callable[[], NDArray[np.generic]]] | None = None
        while True:
            self._set_threads()
            with torch.inference_mode():
                part = next(swept, None)
                now = part and (part[0], self._transfer.fetch(self._finish(part[1][0])))
            if before is not None:
                yield before[0], before[1]()
            if now is None:
                return
            before = now

    def free(self) -> None:
        """Give back the device's memory that is kept for later."""
        self._transfer.free()

    def _set_threads(self) -> None:
        if self._device.type == "cpu" and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)

    def _finish(self, answer: torch.Tensor) -> torch.Tensor:
        """Turn what the network gives into what is written."""
        answer = answer.float()
        if self._write in ("logits", "values"):
            return answer
        several, applied = answer.shape[0] > 1, self._activation
        if self._write == "labels" and several and not applied.apart:
            return answer.argmax(dim=0, keepdim=True).to(label_type(answer.shape[0]))
        if applied.by == "tilepipe":
            answer = answer.sigmoid() if applied.name == "sigmoid" else answer.softmax(dim=0)
        if self._write == "labels":
            return (answer > self._threshold).to(torch.uint8)
        return answer


def label_type(classes: int) -> torch.dtype:
    """Return the smallest unsigned type that holds the labels of so many classes."""
    return torch.uint8 if classes <= 256 else torch.uint16
