"""What one pass of a network costs, counted on ``meta`` tensors: nothing is computed."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from tilepipe.graph.operations import kind_of, name_of
from tilepipe.graph.readings import Windowing

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of one pass."""

    multiply_adds: int
    """As `torch.utils.flop_counter` counts them: convolutions and matrix products, halved."""
    peak: int
    """Bytes of tensors alive at once, input and output included; in 3D a convolution's too."""


class Liveness(TorchDispatchMode):
    """Adds up the bytes of the tensors that are alive after each operation.

    ``peak`` is the most of them, with what kernels reorder beside.
    """

    def __init__(self, image: torch.Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0
        self._note(image)

    def _note(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()

    def __torch_dispatch__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: Sequence[object] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._note(leaf)
        self.alive = {key: held for key, held in self.alive.items() if not held[0].expired()}
        copies = 0
        convolves = kind_of(name_of(func)).window is Windowing.CONVOLUTION
        if convolves and isinstance(out, torch.Tensor) and out.ndim == 5:
            image = args[0]
            assert isinstance(image, torch.Tensor)
            copies = image.nbytes + out.nbytes  # reordered for the 3D kernels
        alive = sum(size for _, size in self.alive.values())
        self.peak = max(self.peak, alive + copies)
        return out


def measure_cost(network: nn.Module, image: torch.Tensor) -> Cost:
    """Return the cost of ``network(image)``; both lie on ``meta``."""
    liveness = Liveness(image)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with FlopCounterMode(display=False) as flops, liveness:
            network(image)
    return Cost(flops.get_total_flops() // 2, liveness.peak)
