"""What belongs to the whole process, of which a library is a guest: it is put back.

What glibc does with memory cannot be put back (see `tilepipe.host.allocator`): only the command
line, and worker processes that we start, change it.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import threading
import warnings
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

_lock = threading.Lock()
_calls, _undo = 0, ExitStack()
"""Calls of the library that go on in this process, and what puts back the state before them."""


@contextmanager
def borrowed() -> Iterator[None]:
    """Put back what a call of the library changes: torch's threads, Zarr's configuration, filters.

    Of calls inside one another, or at the same time in several threads, when the last one ends.
    """
    global _calls, _undo
    with _lock:
        _calls += 1
        if _calls == 1:
            _undo = ExitStack()
            _undo.enter_context(_torch_speed())
            _undo.enter_context(_zarr_config())
            _undo.enter_context(_inductor_folder())
            # Calls in several threads put back each other's filters, in whatever order they end.
            _undo.enter_context(warnings.catch_warnings())
    try:
        yield
    finally:
        with _lock:
            _calls -= 1
            if not _calls:
                _undo.close()


@contextmanager
def undisturbed() -> Iterator[None]:
    """Put back whatever somebody else's code may change while it builds a network."""
    environment, path = dict(os.environ), list(sys.path)
    states = (_random_numbers(), _torch_speed(), _torch_modes(), _zarr_config())
    with ExitStack() as stack:
        for state in (*states, warnings.catch_warnings()):
            stack.enter_context(state)
        try:
            yield
        finally:
            sys.path[:] = path
            for name in os.environ.keys() - environment.keys():
                del os.environ[name]
            os.environ.update(environment)


@contextmanager
def seeded() -> Iterator[None]:
    """Put back torch's random state."""
    import torch

    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        yield


@contextmanager
def _torch_speed() -> Iterator[None]:
    """Put back torch's number of threads and what its kernels may do, if it is loaded at all."""
    if (torch := sys.modules.get("torch")) is None:
        yield
        return
    threads, kernels = torch.get_num_threads(), torch.backends.cudnn
    flags = [(kernels, name, getattr(kernels, name)) for name in ("benchmark", "deterministic")]
    if torch.cuda.is_available():  # elsewhere we do not change them
        products = torch.backends.cuda.matmul
        for part, newer in ((products, ()), (kernels, ("conv", "rnn"))):
            try:
                flags.append((part, "allow_tf32", part.allow_tf32))
            except RuntimeError:  # where torch's newer names were used, it refuses the older one
                parts = [getattr(part, name) for name in newer] or [part]
                flags += [(p, "fp32_precision", p.fp32_precision) for p in parts]
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        for part, name, value in flags:
            setattr(part, name, value)
        if device is not None:
            torch.cuda.set_device(device)


@contextmanager
def _inductor_folder() -> Iterator[None]:
    """Take back where torch keeps what it compiles, which an export puts into the environment."""
    name = "TORCHINDUCTOR_CACHE_DIR"
    before = os.environ.get(name)
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


@contextmanager
def _torch_modes() -> Iterator[None]:
    import torch

    dtype, grad = torch.get_default_dtype(), torch.is_grad_enabled()
    strict = _strictness()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(grad)
        if _strictness() != strict:  # setting it imports torch's compiler: 70 MB, and seconds
            torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


def _strictness() -> tuple[bool, bool]:
    import torch

    return (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )


@contextmanager
def _zarr_config() -> Iterator[None]:
    """Put back Zarr's configuration, if it is loaded at all."""
    if (zarr := sys.modules.get("zarr")) is None:
        yield
        return
    before = copy.deepcopy(zarr.config.config)
    try:
        yield
    finally:
        zarr.config.config.clear()
        zarr.config.config.update(before)


@contextmanager
def _random_numbers() -> Iterator[None]:
    import numpy as np

    python, numbers = random.getstate(), np.random.get_state()
    try:
        with seeded():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
