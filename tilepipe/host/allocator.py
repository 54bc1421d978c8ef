"""glibc's memory: kept from one layer to the next, and taken from one place.

By default every large tensor is mapped anew and its pages are faulted in again, which costs a CPU
more than a third of its time. Threads have arenas of their own besides, which hand memory back
whatever is asked of them; only the first, the main arena, keeps it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distributed import Worker

TRIM_THRESHOLD, MMAP_MAX, ARENA_MAX = -1, -4, -8
"""Parameters of ``mallopt``, as ``malloc.h`` numbers them."""
IN_OTHER_ARENA = 4
"""The bit of a block's size, which lies before the block, that is not set in the main arena."""
_kept = threading.Event()
"""Set where `keep_memory` was called in this process."""
TRIES = 64
"""Threads that are begun at most to find one in the main arena; there are 8 arenas a core."""


def keep_memory() -> None:
    """Let glibc keep the memory that a layer frees for the next one, which is faster on a CPU.

    It holds for the whole process and until its end: what glibc was told before cannot be asked,
    and its number of arenas cannot be put back. So no function of the library calls this, but the
    command line and the workers that it starts do. Call it once at the beginning of a program of
    your own that computes on a CPU. Where there is no glibc, nothing is changed.
    """
    _kept.set()
    if (libc := _glibc()) is not None:
        libc.mallopt(ARENA_MAX, 1)
        libc.mallopt(MMAP_MAX, 0)
        libc.mallopt(TRIM_THRESHOLD, -1)  # never


def compute_thread() -> ThreadPoolExecutor:
    """Return a thread for what `keep_memory` was called for: its memory is the main arena's.

    Any thread where it was not called.

    No arena more is made from then on, and new threads are given in turn those that there are:
    of libraries that began threads before. So threads are begun until one has the main arena.
    """
    begun: list[ThreadPoolExecutor] = []
    for _ in range(TRIES if _kept.is_set() else 1):
        begun.append(ThreadPoolExecutor(1, thread_name_prefix="tilepipe-compute"))
        if begun[-1].submit(in_main_arena).result():
            break
    for other in begun[:-1]:
        other.shutdown()
    return begun[-1]


def dask_setup(worker: Worker) -> None:
    """Do so in a worker of Dask: it calls this where it is given ``--preload``."""
    keep_memory()


def in_main_arena() -> bool:
    """Whether this thread takes its memory from glibc's main arena, or there is no glibc."""
    if (libc := _glibc()) is None:
        return True
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    block = libc.malloc(1 << 16)  # too large for what a thread keeps at hand
    try:
        size = ctypes.c_size_t.from_address(block - ctypes.sizeof(ctypes.c_size_t)).value
    finally:
        libc.free(block)
    return not size & IN_OTHER_ARENA


def _glibc() -> ctypes.CDLL | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        libc = ctypes.CDLL("libc.so.6")
    except OSError:
        return None
    return libc if hasattr(libc, "gnu_get_libc_version") and hasattr(libc, "mallopt") else None
