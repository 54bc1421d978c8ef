"""The engine of one process, and the oracle for the others."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING

from tilepipe.engines import RETRIES, Job, TileFailure, TileResult, one_line
from tilepipe.errors import TileError

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable


def run(
    job: Job, tiles: Iterable[int], *, retries: int = RETRIES
) -> Generator[TileResult | TileFailure, None, None]:
    """Process tiles in this process, as many at once as the job has slots.

    What fails is tried again after the tiles that are already begun. Closing the generator, or
    an interrupt, lets the tiles in flight end and begins no others. Raises `TileError` where the
    job cannot be opened.
    """
    try:
        process = job.open()
    except Exception as cause:
        raise TileError(f"this process cannot begin: {one_line(cause)}") from cause
    source, running = iter(tiles), dict[Future[TileResult], int]()
    again, attempts = deque[int](), dict[int, int]()
    with (
        closing(process),
        ThreadPoolExecutor(job.slots, thread_name_prefix="tilepipe-tile") as pool,
    ):
        while True:
            while len(running) < job.slots:
                index = again.popleft() if again else next(source, None)
                if index is None:
                    break
                running[pool.submit(process, index)] = index
            if not running:
                return
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                index = running.pop(future)
                attempts[index] = attempts.get(index, 0) + 1
                error = future.exception()
                if error is None:
                    yield replace(future.result(), attempts=attempts.pop(index))
                elif attempts[index] > retries:
                    yield TileFailure(index, one_line(error), attempts.pop(index))
                else:
                    again.append(index)
