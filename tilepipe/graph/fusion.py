"""How a sweep goes through a graph: which operations it computes together, and which never."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from typing import TYPE_CHECKING

from tilepipe.graph.readings import Windowing
from tilepipe.graph.rules import SAME

if TYPE_CHECKING:
    from torch import fx

    from tilepipe.graph.graph import Graph, GraphNode


class Course:
    """How a sweep goes through a graph: what is computed, and what never has rows of its own."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.several = {item.node for item in graph.nodes if item.operation.several}
        """The operations that give several tensors of the same rows."""
        self.chains = _chains(graph)
        """The operations that are computed together, by the last of them."""
        self.views = {
            item.node: item
            for item in graph.nodes
            if _is_crop(graph, item) and item.node is not graph.output
        }
        """The crops along the image's axes, which are read from their source."""
        inner = {link.node for chain in self.chains.values() for link in chain[:-1]}
        self.computed = [i for i in graph.nodes if i.node not in inner and i.node not in self.views]
        """The operations whose rows are held, in the order in which they are computed."""
        heads = (chain[0] for chain in self.chains.values())
        self.unmade = {i.node for i in heads if i.operation.kind.joins} | set(self.views)
        """The nodes that are never made: whoever reads them reads their sources."""
        self.pieced = self._pieced(graph)
        """The nodes that only concatenations read, which take them piece by piece."""
        self.last_reads = self._last_reads(graph)
        """The nodes that nothing reads in a step after this one is computed."""

    def _pieced(self, graph: Graph) -> set[fx.Node]:
        pieced: set[fx.Node] = set()
        whole = {graph.output}
        for item in reversed(graph.nodes):
            cat = item.operation.kind.joins and not is_spatial(graph, item)
            view = item.node in self.views and item.node not in whole
            sources = (access.source for access in item.reading.accesses)
            (pieced if cat or view else whole).update(sources)
        return pieced - whole

    def _last_reads(self, graph: Graph) -> dict[fx.Node, list[fx.Node]]:
        ends = {link.node: end for end, chain in self.chains.items() for link in chain}
        order = {item.node: place for place, item in enumerate(graph.nodes)}
        last: dict[fx.Node, fx.Node] = {}
        for item in graph.nodes:
            if item.node in self.views:
                continue
            end = ends.get(item.node, item.node)
            for access in item.reading.accesses:
                source = access.source
                while (view := self.views.get(source)) is not None:
                    source = view.operation.source
                last[source] = max(last.get(source, end), end, key=order.__getitem__)
        reads: dict[fx.Node, list[fx.Node]] = {item.node: [] for item in graph.nodes}
        for source, end in last.items():
            reads[end].append(source)
        return reads


@lru_cache(maxsize=4)
def course_of(graph: Graph) -> Course:
    """Return how a sweep goes through a graph."""
    return Course(graph)


def _chains(graph: Graph) -> dict[fx.Node, tuple[GraphNode, ...]]:
    """Return the convolutions that only pointwise operations follow, by the last of these.

    A chain is a convolution, operations that take each row from the same row of the one before,
    and nothing else reads what lies between. It begins with the concatenation of channels that the
    convolution alone reads, which is then never made.
    """
    before = {item.node: item for item in graph.nodes}
    readers = Counter(access.source for item in graph.nodes for access in item.reading.accesses)
    chains: dict[fx.Node, tuple[GraphNode, ...]] = {}
    for item in graph.nodes:
        if _convolves(item):
            read = before.get(item.operation.source)
            plain = item.operation.number("groups", 1) == 1
            if plain and read and readers[read.node] == 1 and _joins_channels(graph, read):
                chains[item.node] = (read, item)
            else:
                chains[item.node] = (item,)
            continue
        operation = item.operation
        if len(item.reading.accesses) != 1 or not operation.kind.chains or operation.several:
            continue
        [access] = item.reading.accesses
        same = all(rule == SAME for rule in access.rules) and access.source in chains
        if (
            same
            and readers[access.source] == 1
            and graph.dims[item.node] == graph.dims[access.source]
        ):
            chains[item.node] = (*chains.pop(access.source), item)
    return {n: chain for n, chain in chains.items() if not _convolves(chain[-1])}


def _joins_channels(graph: Graph, item: GraphNode) -> bool:
    operation = item.operation
    if not operation.kind.joins or 1 in graph.dims[item.node]:
        return False
    return operation.number("dim") % len(operation.shape()) == 1


def _convolves(item: GraphNode) -> bool:
    """Whether an operation is a convolution, and not a transposed one."""
    operation = item.operation
    return operation.kind.window is Windowing.CONVOLUTION and not operation.is_transposed


def _is_crop(graph: Graph, item: GraphNode) -> bool:
    """Whether an operation crops along the image's axes, so that nothing is copied."""
    operation = item.operation
    plain = operation.kind.crops and operation.number("step", 1) == 1
    return plain and is_spatial(graph, item)


def is_spatial(graph: Graph, item: GraphNode) -> bool:
    """Whether an operation's ``dim`` is one of the image's axes."""
    return item.operation.number("dim") % len(item.operation.shape()) in graph.dims[item.node]
