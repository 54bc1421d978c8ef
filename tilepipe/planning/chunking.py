"""The chunks and shards of an output: what is written at once, and how many files that makes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from tilepipe.geometry import Shape, TileGrid, ceil_to

if TYPE_CHECKING:
    from tilepipe.planning.costs import Tiling

CHUNK_EDGES = {1: (16, 256, 256), 2: (1024, 1024), 3: (128, 128, 128)}
"""Chunk edges: for slices, planes and volumes of small numbers; about 1 to 2 MB."""
SHARD_CHUNKS = 16384
"""Chunks above which an array is written in shards, to be kind to file systems."""
SHARD_BYTES = 64 << 20
"""Size of a shard, before compression, at most."""


def choose_chunks(tiling: Tiling, tile: Shape | None) -> Shape:
    """Return the edges of chunks: multiples of the step, or divisors of a tile that was chosen."""
    rank = len(tiling.shape)
    edges = CHUNK_EDGES[2 if rank == 2 else 3 if not tiling.leading else 1]
    edges = (1,) * (rank - len(edges)) + edges
    if tiling.answer_bytes > 2:
        edges = tuple(edge // 2 if edge > 16 else edge for edge in edges)
    chunks = []
    for axis, (edge, step, length) in enumerate(zip(edges, tiling.step, tiling.shape, strict=True)):
        chunk = ceil_to(edge, step)
        if tile is not None:
            multiple = step if tile[axis] % step == 0 else 1
            divisors = [d for d in range(multiple, chunk + 1, multiple) if tile[axis] % d == 0]
            chunk = max((d for d in divisors if d >= chunk // 8), default=tile[axis])
        chunks.append(min(chunk, ceil_to(length, step)))
    return tuple(chunks)


def choose_shards(tiling: Tiling, chunks: Shape, tile: Shape | None) -> Shape | None:
    """Return shard edges where chunks alone would make too many files, else None.

    The edges divide a tile that the user asks for.
    """
    counts = TileGrid(tiling.shape, chunks).counts
    if math.prod(counts) <= SHARD_CHUNKS:
        return None
    shards = list(chunks)
    while True:
        larger = {
            axis: _larger(edge, chunk, length, tile[axis] if tile else length)
            for axis, (edge, chunk, length) in enumerate(
                zip(shards, chunks, tiling.shape, strict=True)
            )
        }
        size = math.prod(shards) * tiling.answer_bytes
        fitting = [
            axis
            for axis, edge in larger.items()
            if edge is not None and size // shards[axis] * edge <= SHARD_BYTES
        ]
        if not fitting:
            return None if shards == list(chunks) else tuple(shards)
        axis = min(fitting, key=lambda a: shards[a])
        shards[axis] = larger[axis] or 0


def _larger(edge: int, chunk: int, length: int, tile: int) -> int | None:
    """Return the next edge of a shard along an axis: twice as long, or the tile's next divisor."""
    if edge >= length:
        return None
    if tile >= length:
        return 2 * edge
    return next((n for n in range(edge + chunk, tile + 1, chunk) if tile % n == 0), None)
