"""A network's graph at one size and its index arithmetic, and what forbids tiling.

The network is exported on ``meta`` tensors, without memory, so every crop, pad and size in it is
a number. Walking the rules of its operations from the output to the input says what a region of
the output reads.
"""

from __future__ import annotations

import logging
import math
import threading
import warnings
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from tilepipe.geometry import Context
from tilepipe.graph.operations import kind_of, name_of, operation_of
from tilepipe.graph.readings import (
    Attending,
    Flattened,
    NoRule,
    Operation,
    Reading,
    Windowing,
    shape_of,
)
from tilepipe.text import first_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import nn
    from torch.export import ExportedProgram

    from tilepipe.geometry import Shape

log = logging.getLogger(__name__)

_exporting = threading.Lock()
"""torch.export keeps what it does in variables of the process: two at once fail, or mix."""


class NotExported(Exception):
    """The network cannot be exported; the message says why."""


@dataclass(frozen=True, slots=True)
class GraphNode:
    """One operation on the image, with what it reads."""

    node: fx.Node
    operation: Operation
    reading: Reading
    place: str
    """Where the operation is in the network: layer and class, or the line of the user's code."""


@dataclass(frozen=True, slots=True, eq=False)
class Graph:
    """The operations between a network's input and output, in order, at one input size."""

    program: ExportedProgram
    nodes: tuple[GraphNode, ...]
    dims: Mapping[fx.Node, tuple[int, ...]]
    """The tensor dimension that holds each spatial axis, of every node that has them."""
    source: fx.Node
    output: fx.Node
    shape: tuple[int, ...]
    """Input shape with batch and channels."""
    troubles: tuple[str, ...]
    """The operations that read the whole image, each with its layer; empty if there are none."""
    off_lattice: tuple[str, ...]
    """The operations that sample by the size of the whole image, each with its layer."""
    autocast: str = ""
    """The types that `torch.autocast` sets inside the network, which the operations do not say."""

    @property
    def out_shape(self) -> tuple[int, ...]:
        """Output shape with batch and channels."""
        return shape_of(self.output)


def register_tensors(module: nn.Module) -> None:
    """Make buffers of tensors that are plain attributes: they go where the weights go."""
    for part in module.modules():
        for name, value in list(vars(part).items()):
            if isinstance(value, torch.Tensor):
                delattr(part, name)
                part.register_buffer(name, value.detach(), persistent=False)


def export(module: nn.Module, shape: tuple[int, ...]) -> Graph:
    """Export a network that lies on ``meta`` at an input ``shape`` with batch and channels."""
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    example = torch.empty(shape, dtype=dtype, device="meta")
    try:
        with _exporting, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with _AutocastSeen() as autocast:
                module(example)
            program = torch.export.export(module, (example,), strict=False)
            if not all(_is_plain(node) for node in program.graph.nodes):
                program = program.run_decompositions({})  # which takes longer than the export
    except Exception as error:
        # torch.export raises whatever the traced code and its own parts raise.
        raise NotExported(first_line(error)) from error
    return replace(_read_graph(program, shape), autocast=autocast.types)


class _AutocastSeen(TorchFunctionMode):
    """Sees whether `torch.autocast` is on while a network runs, however it was turned on."""

    def __init__(self) -> None:
        super().__init__()
        self.types = ""

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Look at the state, and call the function."""
        for device in ("cpu", "cuda", "xpu", "mps"):
            if torch.is_autocast_enabled(device):
                self.types = f"{device}, {str(torch.get_autocast_dtype(device))[6:]}"
        return func(*args, **(kwargs or {}))


def _is_plain(node: fx.Node) -> bool:
    """Whether an operation neither changes what it is given nor stands for views of it."""
    if not isinstance(operation := node.target, torch._ops.OpOverload):
        return node.op != "call_function"
    schema, composite = operation._schema, torch._C.DispatchKey.CompositeImplicitAutograd
    views = any(value.alias_info is not None for value in schema.returns)
    return not schema.is_mutable and not (
        views and operation.has_kernel_for_dispatch_key(composite)
    )


def _read_graph(program: ExportedProgram, shape: tuple[int, ...]) -> Graph:
    """Read every operation that lies between the image and the output."""
    graph, source_name = program.graph, program.graph_signature.user_inputs[0]
    source = next(node for node in graph.nodes if node.name == source_name)
    # Before the network's own outputs stand the buffers that it changes.
    output_name = program.graph_signature.user_outputs[0]
    output = next(node for node in graph.nodes if node.name == output_name)
    dims: dict[fx.Node, tuple[int, ...]] = {source: tuple(range(2, len(shape)))}
    flattened: set[fx.Node] = {source}
    nodes: list[GraphNode] = []
    troubles: list[str] = []
    off_lattice: list[str] = []
    for node in ancestors(graph, output):
        if node.op != "call_function" or not flattened & set(node.all_input_nodes):
            continue
        flattened.add(node)  # it depends on the image
        place = _place(node)
        if not any(before in dims for before in node.all_input_nodes):
            if _attends(node):  # which says more than that its input was folded before it
                troubles.insert(0, f"attention over the whole image ({place})")
            continue  # the image's axes are lost before it
        operation = operation_of(node, dims)
        try:
            reading = operation.kind.reads(operation)
        except Flattened as reason:
            troubles.append(f"{reason} ({place})")
            continue
        except NoRule as reason:
            if troubles:
                continue  # the network reads the whole image: its axes need not be followed
            raise NoRule(f"{reason} ({place})") from None
        dims[node] = reading.dims
        nodes.append(GraphNode(node, operation, reading, place))
        if reading.unbounded:
            troubles.append(f"{reading.unbounded} ({place})")
        if reading.lattice:
            off_lattice.append(f"{reading.lattice} ({place})")
    lost = dims.get(output) != dims[source]
    if lost and not troubles:
        troubles.append("the output has lost the image's axes")
    return Graph(
        program, tuple(nodes), dims, source, output, shape, tuple(troubles), tuple(off_lattice)
    )


def _attends(node: fx.Node) -> bool:
    """Whether an operation weighs many pieces of the image against as many."""
    attends = kind_of(name_of(node.target)).attends
    if attends is not Attending.OF_MATRICES:
        return attends is Attending.ALWAYS
    shape = shape_of(node)
    return len(shape) > 2 and min(shape[-2:]) > 1


def ancestors(graph: fx.Graph, output: fx.Node) -> list[fx.Node]:
    """Return the nodes that the output depends on, in the graph's order."""
    wanted, stack = {output}, [output]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in wanted:
                wanted.add(node)
                stack.append(node)
    return [node for node in graph.nodes if node in wanted]


def _place(node: fx.Node) -> str:
    """Say where an operation comes from: its layer, else the last line of the user's code."""
    stack = [(str(v[0]), str(v[1])) for v in (node.meta.get("nn_module_stack") or {}).values()]
    name, kind = stack[-1] if stack else ("", "")
    if name := name.removeprefix("network").removeprefix("."):
        return f"layer {name}, {kind.rsplit('.', 1)[-1]}"
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    return f"in {lines[-1]!r}" if lines else f"node {node.name}"


def walk(graph: Graph, axis: int, start: int, stop: int) -> tuple[int, int]:
    """Return the input rows that output rows ``start:stop`` along ``axis`` read.

    Rows outside the image are counted as far as the operations' padding reaches. Operations
    without finite context count as pointwise: `Graph.troubles` names them.
    """
    need = {graph.output: (start, stop)}
    for item in reversed(graph.nodes):
        if item.node not in need:
            continue
        for access in item.reading.accesses:
            rows = need[item.node]
            if not item.reading.unbounded:
                rows = access.rules[axis].need(*rows)
            lo, hi = need.get(access.source, rows)
            need[access.source] = min(lo, rows[0]), max(hi, rows[1])
    return need.get(graph.source, (start, stop))


def covering(graph: Graph) -> frozenset[str]:
    """Return the names of windowed operations that hold a whole axis of the image, and leave one.

    At one size that may be chance: a layer that does so at two was given its size by the image.
    """
    return frozenset(item.node.name for item in graph.nodes if _covers(item))


def _covers(item: GraphNode) -> bool:
    operation = item.operation
    windowed = operation.kind.window is not Windowing.NONE and not operation.is_transposed
    if not windowed or item.reading.unbounded:
        return False
    before, after = shape_of(operation.source), shape_of(item.node)
    return any(
        before[d] > 1 and after[d] == 1 and rule.last - rule.first + 1 >= before[d]
        for d, rule in zip(item.reading.dims, item.reading.accesses[0].rules, strict=True)
    )


def unbound(graph: Graph, names: frozenset[str]) -> Graph:
    """Return the graph with these operations named as ones that read the whole image."""
    nodes, troubles = [], []
    for item in graph.nodes:
        if item.node.name in names:
            reason = f"{item.operation.kind.window.value} over the whole image"
            item = replace(item, reading=replace(item.reading, unbounded=reason))
            troubles.append(f"{reason} ({item.place})")
        nodes.append(item)
    return replace(graph, nodes=tuple(nodes), troubles=(*graph.troubles, *troubles))


def strides(graph: Graph, axis: int) -> Iterator[tuple[GraphNode, Fraction]]:
    """Yield every operation with the input voxels between two rows of its output.

    Where two paths meet with different strides, both are given.
    """
    known: dict[fx.Node, Fraction | None] = {graph.source: Fraction(1)}
    for item in graph.nodes:
        at_node: set[Fraction] = set()
        for access in item.reading.accesses:
            before, rule = known.get(access.source), access.rules[axis]
            if before is None:
                continue
            if item.reading.lattice:
                rows = shape_of(access.source)[2 + axis], shape_of(item.node)[2 + axis]
                at_node.add(before * Fraction(*rows))
            elif item.reading.unbounded:
                at_node.add(before)
            elif rule.num:
                at_node.add(before * rule.num / rule.den)
        known[item.node] = min(at_node, default=None)
        for stride in at_node:
            yield item, stride


@lru_cache(maxsize=4)
def lattice(graph: Graph) -> tuple[Shape, tuple[str, ...]]:
    """Return the step per axis, and the operations that no lattice fits at this size."""
    steps, misfits = [], []
    for axis in range(len(graph.shape) - 2):
        step, seen = 1, dict[fx.Node, Fraction]()
        for item, stride in strides(graph, axis):
            # A step longer than any real network's is a ratio of two sizes, not a lattice.
            if stride.numerator > 256 or seen.setdefault(item.node, stride) != stride:
                misfits.append(f"sizes that do not divide meet here ({item.place})")
            elif item.node is graph.output and stride != 1:
                misfits.append(f"the output is resized by {1 / stride} ({item.place})")
            else:
                step = math.lcm(step, stride.numerator)
        steps.append(step)
    return tuple(steps), tuple(dict.fromkeys(misfits))


def own_context(graph: Graph, step: Shape | None = None) -> Context:
    """Return what regions on the graph's lattice read round the rows that lie under them.

    ``step`` may be a multiple of the lattice's own. What is cropped is consumed, even if nothing
    reads it.
    """
    step = step or lattice(graph)[0]
    shrink = [a - b for a, b in zip(graph.shape[2:], graph.out_shape[2:], strict=True)]
    rows = [walk(graph, axis, 0, n) for axis, n in enumerate(step)]
    before = tuple(max(s // 2, s // 2 - low) for s, (low, _) in zip(shrink, rows, strict=True))
    ends = zip(shrink, step, rows, strict=True)
    after = tuple(max(s - s // 2, high - n - s // 2) for s, n, (_, high) in ends)
    return Context(before, after, step)
