"""What goes to a device and what comes back, beside what is computed there.

On a CUDA device arrays move through pinned memory on streams of their own: while one slab is
computed, the next one goes there and the answer of the one before comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray
    from torch import Tensor


class Transfer:
    """Moves arrays to one device and answers back; call it from one thread."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self._device, self._dtype = device, dtype
        self._cuda = device.type == "cuda"
        self._in = torch.cuda.Stream(device) if self._cuda else None
        self._out = torch.cuda.Stream(device) if self._cuda else None

    def send(self, array: NDArray[np.floating]) -> Tensor:
        """Return an array on the device; what is computed next waits for it, nothing before."""
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self._in is None:
            return tensor.to(self._dtype)
        here = torch.cuda.current_stream(self._device)
        with torch.cuda.stream(self._in):
            sent = tensor.pin_memory().to(self._device, non_blocking=True).to(self._dtype)
        here.wait_stream(self._in)
        sent.record_stream(here)
        return sent

    def fetch(self, answer: Tensor) -> Callable[[], NDArray[np.generic]]:
        """Begin to bring an answer back; the call that is returned waits until it is here."""
        if self._out is None:
            return answer.numpy
        self._out.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._out):
            pinned = torch.empty(answer.shape, dtype=answer.dtype, pin_memory=True)
            pinned.copy_(answer, non_blocking=True)
            done = self._out.record_event()
        answer.record_stream(self._out)

        def arrived() -> NDArray[np.generic]:
            done.synchronize()
            return pinned.numpy()

        return arrived

    def free(self) -> None:
        """Give back to the device what is kept for later."""
        if self._cuda:
            torch.cuda.empty_cache()


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether a device, or the processor's own memory, was too small for a tensor."""
    return isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(error)
