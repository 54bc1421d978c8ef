"""Regions computed on ``meta`` tensors: what cannot run is known before anything is begun."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from tilepipe.geometry import Region
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import Graph, NotExported, export
from tilepipe.graph.readings import NoRule
from tilepipe.graph.sweep import Sweep
from tilepipe.text import first_line

if TYPE_CHECKING:
    from torch import nn

    from tilepipe.geometry import Shape
    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile

log = logging.getLogger(__name__)

_graphs: dict[tuple[str, Shape, torch.dtype], Graph] = {}
"""The last graph that was exported, which takes seconds: a plan's worker often needs the same."""

ROWS = 96
"""Rows of a region that is rehearsed, along each axis."""
SLAB = 40
"""Rows of a slab of it."""


def whole_graph(model: Model, profile: Profile, box: Region, dtype: torch.dtype) -> Graph | None:
    """Return the graph of the one pass over ``box`` whose regions the tiles are.

    ``dtype`` is what the network is run in. None where that cannot be had: a
    script, a program of fixed size, a network without finite context, or an operation that cannot
    be computed by regions. Windows are left then.
    """
    if not profile.by_regions:
        return None
    key = model.digest, box.shape, dtype
    graph = _graphs.get(key)
    if graph is None:
        try:
            graph = export(model.on_meta(), (1, model.channels, *box.shape))
            rehearse(graph, model.on_meta(dtype))
        except (NotExported, NoRule) as reason:
            log.info("tiles are computed in windows: %s", reason)
            return None
        _graphs.clear()
        _graphs[key] = graph
    return graph


def rehearse(graph: Graph, network: nn.Module) -> None:
    """Compute the first and the last region of a graph without memory, and sweep the first.

    ``network`` lies on ``meta``, in the type that it will be run in. Raises `NoRule` for whatever
    cannot be computed by regions.
    """
    evaluator, sizes = RegionEvaluator(graph, network), graph.out_shape[2:]
    dtype = next((p.dtype for p in network.parameters() if p.is_floating_point()), torch.float32)

    def read(rows: Region) -> torch.Tensor:
        return torch.empty((*graph.shape[:2], *rows.shape), dtype=dtype, device="meta")

    first = Region((0,) * len(sizes), tuple(min(n, ROWS) for n in sizes))
    last = Region(tuple(max(0, n - ROWS) for n in sizes), tuple(sizes))
    try:
        with torch.inference_mode():
            for box in (first, last):
                evaluator(box, read)
            for axis in range(len(sizes)):
                for _ in Sweep(evaluator, first, axis).run(SLAB, read):
                    pass
    except Exception as error:
        # Operations raise whatever the library raises; nothing was computed yet.
        raise NoRule(f"a region cannot be computed: {first_line(error)}") from error
