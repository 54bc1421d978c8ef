"""What an exported graph reads beside the image: weights, and tensors made of them alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from tilepipe.graph.graph import ancestors
from tilepipe.graph.kernels import call_node
from tilepipe.graph.readings import NoRule

if TYPE_CHECKING:
    from torch import fx, nn

    from tilepipe.graph.graph import Graph


def constants_of(graph: Graph, network: nn.Module) -> dict[fx.Node, object]:
    """Return the values of the nodes that the output reads and that do not depend on the image.

    A tensor has as many names as there are ways to it, and the graph uses any of them.
    """
    signature = graph.program.graph_signature
    named = (network.named_parameters, network.named_buffers)
    stored = dict(itertools.chain(*(names(remove_duplicate=False) for names in named)))
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    like = next((t for t in stored.values() if t.is_floating_point()), torch.empty(0))
    values: dict[fx.Node, object] = {}
    for node in ancestors(graph.program.graph, graph.output):
        if node.op == "placeholder" and node.name in names:
            values[node] = stored[names[node.name]]
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            value = graph.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            if value.device.type == "meta":
                raise NoRule("a tensor that is made while the network runs")
            dtype = like.dtype if value.is_floating_point() else value.dtype
            values[node] = value.to(like.device, dtype)
        elif (
            node.op == "call_function"
            and node not in graph.dims
            and all(n in values for n in node.all_input_nodes)
        ):
            if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
                raise NoRule(f"operation {node.target} makes random numbers while the network runs")
            inputs = {n: _contiguous(values[n]) for n in node.all_input_nodes}
            with torch.no_grad():
                values[node] = call_node(node, inputs, like.device)
    return values


def _contiguous(value: object) -> object:
    """Return a tensor in the layout that it was exported in, which views of it rely on."""
    return value.contiguous() if isinstance(value, torch.Tensor) else value
