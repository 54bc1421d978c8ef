"""Tensors of a network go by any of their names, and lie where its weights do."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.geometry import Region
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import export
from tilepipe.graph.readings import NoRule
from tilepipe.models.model import wrap

if TYPE_CHECKING:
    from collections.abc import Callable


class Listed(nn.Module):
    """A convolution that is also in a list, as in nnU-Net, and one used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.all = nn.Sequential(self.conv, self.norm, nn.ReLU())
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.again = nn.ModuleList([self.second, self.second])

    def forward(self, x: Tensor) -> Tensor:
        x = self.all(x)
        for layer in self.again:
            x = layer(x)
        return self.norm(self.second(x))


class Tied(nn.Module):
    """Two convolutions of one weight, and a third that takes it transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(1, 4, 3, padding=1)
        self.two.weight = self.one.weight
        self.register_buffer("scale", torch.rand(1, 4, 1, 1))
        self.register_buffer("same", self.scale)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x) * self.scale + self.two(x) * self.same
        return F.conv_transpose2d(y, self.one.weight, padding=1)


class Plain(nn.Module):
    """Tensors that are plain attributes, one of them made for the device of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.spread = torch.rand(1, 1, 1, 1), torch.rand(2, requires_grad=True) * 2
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x - self.mean) * self.spread.to(x.device).view(1, -1, 1, 1)
        return y.to(device=x.device, dtype=x.dtype)


class Made(nn.Module):
    """Tensors that are made while the network runs, of no size of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(2, device=x.device, dtype=x.dtype).view(1, 2, 1, 1)
        y = self.one(x) + ramp + torch.full((1, 2, 1, 1), 0.5, device=x.device, dtype=x.dtype)
        return y + torch.zeros_like(y, device=x.device)


class Counting(nn.Module):
    """Changes a buffer in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("passes", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        return self.one(x)


class Noisy(nn.Module):
    """A random number in every pass."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + torch.rand(1, 2, 1, 1, device=x.device, dtype=x.dtype)


@pytest.mark.parametrize("network", [Listed, Tied, Plain, Made, Counting])
def test_tensors_are_found_by_each_of_their_names(network: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = wrap(network().eval().double())
    model.module.double()
    graph = export(model.on_meta(), (1, 1, 40, 37))
    image = torch.rand(1, 1, 40, 37, dtype=torch.float64)
    box = Region((3, 7), (33, 30))
    with torch.inference_mode():
        truth = model.module(image)[(..., *box.slices)]
        found = RegionEvaluator(graph, model.module)(box, lambda r: image[(..., *r.slices)])
    assert (found - truth).abs().max() <= 1e-12


def test_random_numbers_are_refused() -> None:
    model = wrap(Noisy().eval())
    graph = export(model.on_meta(), (1, 1, 40, 37))
    with pytest.raises(NoRule, match="random numbers"):
        RegionEvaluator(graph, model.module)


class Standardized(nn.Module):
    """A weight that is viewed as a matrix before it is used, as in ResNetV2 and spectral norms."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self.two.weight.view(4, -1)
        weight = (rows - rows.mean(1, keepdim=True)).view(4, 4, 3, 3)
        return F.conv2d(torch.relu(self.one(x)), weight, padding=1)


def test_weights_in_another_layout_are_viewed_as_they_were() -> None:
    torch.manual_seed(0)
    model, image = wrap(Standardized()), torch.rand(1, 1, 20, 24)
    graph = export(model.on_meta(), (1, 1, 20, 24))
    with torch.no_grad():
        truth = model.module(image)
        model.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        box = Region((0, 0), (20, 24))
        found = RegionEvaluator(graph, model.module)(box, lambda r: image[(..., *r.slices)])
    assert (found - truth).abs().max() <= 1e-5
