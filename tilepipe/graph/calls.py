"""The operations of a network as plain calls, one form for exported graphs and for TorchScript."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, cast

import torch

from tilepipe.graph.operations import kind_of, operation_of
from tilepipe.graph.readings import Call, shape_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tilepipe.graph.graph import Graph

CHANGING = ("append", "insert", "extend", "pop", "clear", "remove", "reverse", "sort", "_set_item",
            "__setitem__", "__delitem__", "Delete", "update", "setdefault", "popitem")  # fmt: skip
"""Operations that change a list or a dict in place, so that what it was made of says nothing."""
LARGEST = 64
"""Values of a constant tensor that are looked at: one number, or one for each channel."""


def graph_calls(graph: Graph) -> Call:
    """Return the call that gives the output of an exported graph."""
    calls: dict[torch.fx.Node, Call] = {}

    def value(argument: object) -> object:
        if isinstance(argument, torch.fx.Node):
            return calls[argument]
        return [value(a) for a in argument] if isinstance(argument, list | tuple) else argument

    for node in graph.program.graph.nodes:
        if node.op == "output":
            break
        if node.op != "call_function":
            calls[node] = _call("input" if node is graph.source else "weight", {})
            continue
        operation = operation_of(node, {})
        bound = {name: value(argument) for name, argument in operation.arguments.items()}
        shape = shape_of(node) if _has_shape(node) else None
        calls[node] = _call(operation.name, bound, shape)
    return calls[graph.output]


def _has_shape(node: torch.fx.Node) -> bool:
    value = node.meta.get("val")
    first = value[0] if isinstance(value, list | tuple) and value else value
    return isinstance(first, torch.Tensor)


def script_calls(script: torch.jit.ScriptModule, head: int) -> Call | None:
    """Return the call that gives output number ``head`` of a script; None where that is not seen.

    Its graph is read and not run.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated; files of its kind live on
        try:
            graph = torch.jit.freeze(script, optimize_numerics=False).graph
        except RuntimeError:  # it is frozen already, or holds what cannot be
            graph = script.inlined_graph
    changed = {
        next(iter(node.inputs())).debugName()
        for kind in CHANGING
        for node in graph.findAllNodes(f"aten::{kind}")
    }
    values: dict[str, object] = {value.debugName(): _call("input", {}) for value in graph.inputs()}
    for node in graph.nodes():
        inputs = [values.get(value.debugName()) for value in node.inputs()]
        for number, value in enumerate(node.outputs()):
            name = value.debugName()
            is_known = name not in changed
            values[name] = _script_value(node, inputs, number) if is_known else _call("changed", {})
    outputs = _tensors([values.get(value.debugName()) for value in graph.outputs()])
    return outputs[head] if outputs is not None and head < len(outputs) else None


def _script_value(node: torch._C.Node, inputs: list[object], number: int) -> object:
    """Return what an output of a node is: a constant, a list, or a call."""
    kind = node.kind()
    first = inputs[0] if inputs else None
    if kind == "prim::Constant":
        return _constant(next(iter(node.outputs())).toIValue())
    if kind in ("prim::ListConstruct", "prim::TupleConstruct"):
        return inputs
    if kind == "prim::DictConstruct":
        return dict(zip(inputs[::2], inputs[1::2], strict=True))
    if kind in ("prim::ListUnpack", "prim::TupleUnpack"):
        if isinstance(first, list) and number < len(first):
            return first[number]
        return _call("getitem", {"0": first, "1": number})
    if kind in ("aten::__getitem__", "prim::TupleIndex"):
        place = inputs[1]
        if isinstance(first, list) and isinstance(place, int) and place < len(first):
            return first[place]
        if isinstance(first, dict) and isinstance(place, str | int):
            return first.get(place)
        return _call("getitem", {"0": first, "1": place})
    if kind == "prim::ConstantChunk":
        return _call("getitem", {"0": _call("chunk", {"self": first, "dim": node.i("dim")}),
                                "1": number})  # fmt: skip
    if kind == "prim::GetAttr":
        return _call("weight", {})
    if kind.startswith("aten::"):
        schema = torch._C.parse_schema(node.schema())
        names = [argument.name for argument in schema.arguments]
        bound = dict(zip(names, inputs, strict=False))
        name = kind.removeprefix("aten::").rstrip("_")
        call = _call(name, bound)
        return _call("getitem", {"0": call, "1": number}) if node.outputsSize() > 1 else call
    return _call(kind, {})


def _constant(value: object) -> object:
    """Return numbers as they are, and small tensors as lists."""
    if not isinstance(value, torch.Tensor):
        return value
    if value.is_meta or not 0 < value.numel() <= LARGEST:
        return _call("weight", {})
    numbers = value.flatten().tolist()
    if len(numbers) == 1:
        return numbers[0]
    return Call("constant", kind_of("constant"), {}, values=tuple(numbers))


def _tensors(values: list[object]) -> list[Call] | None:
    """Return the tensors among outputs, counted through lists and dicts; None if one is unseen."""
    tensors: list[Call] = []
    for value in values:
        if isinstance(value, Call):
            tensors.append(value)
        elif isinstance(value, list | dict):
            inner = list(value.values()) if isinstance(value, dict) else value
            below = _tensors(cast("list[object]", inner))
            if below is None:
                return None
            tensors += below
        else:
            return None
    return tensors


def _call(name: str, arguments: Mapping[str, object], shape: tuple[int, ...] | None = None) -> Call:
    return Call(name, kind_of(name), arguments, shape)
