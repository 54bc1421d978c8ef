"""Networks that give several tensors: counting them, and choosing one."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn


class Head(nn.Module):
    """A network that returns several tensors, with one of them chosen."""

    def __init__(self, network: nn.Module, head: int) -> None:
        super().__init__()
        self.network, self.head = network, head

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Return output number ``head``, counted through nested tuples, lists and dicts."""
        outputs = list(tensors_of(self.network(image)))
        if self.head >= len(outputs):
            raise IndexError(f"head (={self.head}) must be below the {len(outputs)} outputs")
        return outputs[self.head]


def tensors_of(value: object) -> list[torch.Tensor]:
    """Return the tensors that a network gives, counted through nested tuples, lists and dicts."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_of(item)]
    return []
