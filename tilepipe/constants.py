"""What an exported graph reads beside the image: weights, and tensors made of them alone."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import torch

from tilepipe.kernels import call
from tilepipe.operations import NoRule

if TYPE_CHECKING:
    from torch import fx, nn

    from tilepipe.network import Graph


def constants_of(graph: Graph, network: nn.Module) -> dict[fx.Node, object]:
    """Return the values of the nodes that do not depend on the image."""
    signature = graph.program.graph_signature
    named = (network.named_parameters, network.named_buffers)
    stored = dict(itertools.chain(*(names(remove_duplicate=False) for names in named)))
    names = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
    first = next(iter(stored.values()))
    found: dict[fx.Node, object] = {}
    for node in graph.program.graph.nodes:
        if node.op == "placeholder" and node.name in names:
            found[node] = stored[names[node.name]]
        elif node.op == "placeholder" and node.name in signature.inputs_to_lifted_tensor_constants:
            value = graph.program.constants[signature.inputs_to_lifted_tensor_constants[node.name]]
            if value.device.type == "meta":
                raise NoRule("a tensor that is made while the network runs")
            found[node] = value.to(first.device)
        elif (
            node.op == "call_function"
            and node not in graph.dims
            and all(n in found for n in node.all_input_nodes)
        ):
            if not node.all_input_nodes:
                raise NoRule(f"operation {node.target} makes a tensor while the network runs")
            with torch.no_grad():
                found[node] = call(node, found)
    return found
