"""One call in an exported graph, and the form of what is known of it: the rows that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch

from tilepipe.graph.rules import SAME, Rule

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

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
    rules: tuple[Rule, ...]
    """One per spatial axis of the volume."""


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


@dataclass(frozen=True, slots=True)
class Operation:
    """One call in an exported graph with its arguments by name."""

    node: fx.Node
    name: str
    """The ATen name without overload and without the underscore of in-place variants."""
    arguments: Mapping[str, Value]
    dims: Mapping[fx.Node, tuple[int, ...]]
    """Spatial dimensions of every spatial node before this one."""

    @classmethod
    def of(cls, node: fx.Node, dims: Mapping[fx.Node, tuple[int, ...]]) -> Operation:
        """Bind a call's arguments to the names in the operation's schema."""
        if not isinstance(node.target, torch._ops.OpOverload):
            name = getattr(node.target, "__name__", str(node.target))
            return cls(node, name, {str(i): value for i, value in enumerate(node.args)}, dims)
        schema = node.target._schema
        names = [argument.name for argument in schema.arguments]
        bound: dict[str, Value] = dict(zip(names, node.args, strict=False))
        return cls(node, schema.name.split("::")[1].rstrip("_"), bound | dict(node.kwargs), dims)

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

    def along(self, rules: Sequence[Rule], *, lattice: str = "") -> Reading:
        """Return a reading whose ``rules`` belong to the last dimensions of the tensor."""
        dims = self.dims[self.source]
        offset = len(self.shape()) - len(rules)
        chosen = tuple(rules[d - offset] if d >= offset else SAME for d in dims)
        return Reading((Access(self.source, chosen),), dims, lattice=lattice)

    def whole(self, reason: str) -> Reading:
        """Return a reading of everything along every axis."""
        sources = [node for node in self.node.all_input_nodes if node in self.dims]
        accesses = tuple(
            Access(node, tuple(Rule(0, 1, 0, self.shape(node)[d] - 1) for d in self.dims[node]))
            for node in sources
        )
        dims = self.dims[sources[0]]
        if max(dims) >= len(self.shape()):
            raise Flattened(reason)
        return Reading(accesses, dims, unbounded=reason)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Return the shape of a node's tensor, the first one where there are several."""
    if "shape" not in node.meta:  # read once: it is asked for again and again
        value = node.meta["val"]
        first = value[0] if isinstance(value, list | tuple) else value
        node.meta["shape"] = tuple(int(n) for n in first.shape)
    return cast("tuple[int, ...]", node.meta["shape"])
