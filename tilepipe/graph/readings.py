"""The forms in which operations are known: kinds of them, calls, and the rows that calls read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, cast

from tilepipe.graph.rules import SAME, AxisRule

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor, fx

    from tilepipe.geometry import Region
    from tilepipe.graph.channels import Axis
    from tilepipe.graph.evaluator import Fetch, RegionEvaluator
    from tilepipe.graph.graph import GraphNode
    from tilepipe.graph.ranges import Range

    Compute = Callable[[RegionEvaluator, GraphNode, Region, Fetch], object]
    """Computes a region of an operation, from what `Fetch` gives of those before it."""
    RangeOf = Callable[[object, Axis], Range]
    """Gives the range of a value, of which `Axis` says where its channels lie."""
    Values = Callable[[RangeOf, "Call", Axis], Range]
    """Gives the range of what a call gives, from the ranges of what it takes."""

Value = object
"""An argument in an exported graph: a node, a number, a list of them, or None."""


class NoRule(Exception):
    """An operation has no rule; the message says which and why."""


class Flattened(Exception):
    """The operation leaves no spatial axes behind; the message says how."""


@dataclass(frozen=True, slots=True)
class Access:
    """How one operation reads one of its inputs."""

    source: fx.Node
    rules: tuple[AxisRule, ...]
    """One rule for each spatial axis of the volume."""


@dataclass(frozen=True, slots=True)
class Reading:
    """What an operation reads, where its spatial axes lie, and what stands against tiling it."""

    accesses: tuple[Access, ...]
    dims: tuple[int, ...]
    """The tensor dimension that holds each spatial axis."""
    unbounded: str = ""
    """Not empty: the operation reads whole axes, and this says why."""
    lattice: str = ""
    """Not empty: the operation samples by the size of the whole, and this says why."""


class Windowing(Enum):
    """Which operations read a window of rows for each row that they give."""

    NONE = ""
    CONVOLUTION = "a convolution"
    POOLING = "pooling"


class Padding(Enum):
    """What a padding operation puts outside its tensor."""

    NONE = ""
    ARGUMENT = "what its argument `mode` says"
    CONSTANT = "constant"
    REFLECT = "reflect"
    REPLICATE = "replicate"


class Attending(Enum):
    """Which operations weigh pieces of the image against one another."""

    NEVER = 0
    OF_MATRICES = 1
    """Those whose result is a matrix, of more than one row and column."""
    ALWAYS = 2


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class OperationKind:
    """A kind of operation: one row of the table `tilepipe.graph.operations.TABLE`."""

    names: str
    """The ATen names, apart by spaces, without overload and underscore of in-place variants."""
    reads: Callable[[Operation], Reading]
    """Returns the rows of its inputs that a call reads, or raises `NoRule`."""
    values: Values
    """Returns what is known of the values that a call gives, which shows an activation before."""
    computes: Compute | None = None
    """Computes a region. None: the operation is called itself, on the same rows of its inputs."""
    multiply_adds: Callable[[Operation], int] = lambda _: 0
    """Returns the multiply-adds of a call for each row and column that it computes."""
    window: Windowing = Windowing.NONE
    """Which windows it reads: what they read is often cut or padded first, which takes memory."""
    transposed: bool = False
    """Whether it is a transposed convolution, whatever its argument ``transposed`` says."""
    axes: int = 0
    """The axes of the image in its name, 2 for ``conv2d``; 0: as many as the image has."""
    last: bool = False
    """Whether it works along the last dimensions of its tensor, which must be the image's axes."""
    mode: str = ""
    """How an interpolation samples: ``nearest``, ``nearest-exact``, ``linear`` or ``cubic``."""
    padding: Padding = Padding.NONE
    """What a padding puts outside its tensor."""
    crops: bool = False
    """Whether it is a slice: along the image's axes a sweep reads the source in its place."""
    joins: bool = False
    """Whether it concatenates: a sweep convolves what is joined along channels piece by piece."""
    into: Callable[[Tensor, Tensor], object] | None = None
    """Computes a tensor straight into the memory of another, in one pass. None: it is copied."""
    beside: int = 0
    """Halves of the result's bytes that are made beside the result while it is computed."""
    attends: Attending = Attending.NEVER
    """Whether it weighs pieces of the image against one another."""

    @property
    def chains(self) -> bool:
        """Whether a sweep may compute it with the convolution before it, a few rows at a time."""
        return self.computes is None


@dataclass(frozen=True, slots=True)
class Operation:
    """One call in an exported graph with its arguments by name."""

    node: fx.Node
    name: str
    """The ATen name without overload and without the underscore of in-place variants."""
    kind: OperationKind
    """What the table says of operations of this name."""
    arguments: Mapping[str, Value]
    dims: Mapping[fx.Node, tuple[int, ...]]
    """Spatial dimensions of every spatial node before this one."""

    @property
    def is_transposed(self) -> bool:
        """Whether this is a transposed convolution."""
        return self.kind.transposed or bool(self.arguments.get("transposed"))

    @property
    def several(self) -> bool:
        """Whether this gives several tensors."""
        return isinstance(self.node.meta["val"], tuple | list)

    @property
    def source(self) -> fx.Node:
        """The first argument: the tensor that the operation reads."""
        return cast("fx.Node", next(iter(self.arguments.values())))

    def shape(self, node: fx.Node | None = None) -> tuple[int, ...]:
        """Return the shape of a node's (first) tensor; of this operation's own by default."""
        return shape_of(node or self.node)

    def number(self, name: str, default: int = 0) -> int:
        """Return an integer argument."""
        value = self.arguments.get(name)
        return default if value is None else int(cast("int", value))

    def window(self, name: str, axes: int, default: Sequence[int] | None = None) -> list[int]:
        """Return a per-axis argument; one number stands for all axes."""
        value = self.arguments.get(name)
        if value is None or value == []:
            if default is None:
                raise NoRule(f"operation {self.name} has no {name}")
            return list(default)
        numbers = [value] if isinstance(value, int) else list(cast("Sequence[int]", value))
        return numbers * axes if len(numbers) == 1 else numbers

    def pointwise(self) -> Reading:
        """Return a reading that takes each row from the same row of the source."""
        dims = self.dims[self.source]
        return Reading((Access(self.source, (SAME,) * len(dims)),), dims)

    def along(self, rules: Sequence[AxisRule], *, lattice: str = "") -> Reading:
        """Return a reading whose ``rules`` belong to the last dimensions of the tensor."""
        dims = self.dims[self.source]
        offset = len(self.shape()) - len(rules)
        chosen = tuple(rules[d - offset] if d >= offset else SAME for d in dims)
        return Reading((Access(self.source, chosen),), dims, lattice=lattice)

    def whole(self, reason: str) -> Reading:
        """Return a reading of everything along every axis."""
        sources = [node for node in self.node.all_input_nodes if node in self.dims]
        accesses = tuple(
            Access(node, tuple(AxisRule(0, 1, 0, self.shape(node)[d] - 1) for d in self.dims[node]))
            for node in sources
        )
        dims = self.dims[sources[0]]
        if max(dims) >= len(self.shape()):
            raise Flattened(reason)
        return Reading(accesses, dims, unbounded=reason)


@dataclass(frozen=True, eq=False, slots=True)
class Call:
    """An operation whose arguments are calls, or what these take from elsewhere: ``weight``."""

    name: str
    """The ATen name, without overload and without the underscore of in-place variants."""
    kind: OperationKind
    """What the table says of operations of this name."""
    arguments: Mapping[str, object]
    """Its calls, numbers, lists of them and None, by the names in the operation's schema."""
    shape: tuple[int, ...] | None = None
    """The shape of its first tensor; None where that is not known, as in TorchScript."""
    values: tuple[float, ...] = ()
    """The numbers of a small constant tensor; empty for all others."""

    def source(self) -> object:
        """Return the first argument."""
        return next(iter(self.arguments.values()), None)

    def number(self, name: str, default: float | None = None) -> float | None:
        """Return an argument that is a number, else the default."""
        value = self.arguments.get(name)
        return float(value) if isinstance(value, int | float) else default


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor, the first one where there are several."""
    if "shape" not in node.meta:  # read once: it is asked for again and again
        value = node.meta["val"]
        first = value[0] if isinstance(value, list | tuple) else value
        node.meta["shape"] = tuple(int(n) for n in first.shape)
    return cast("tuple[int, ...]", node.meta["shape"])
