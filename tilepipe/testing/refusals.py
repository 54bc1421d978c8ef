"""Small networks that no plan can tile exactly, each for another reason."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class GroupNormed(nn.Module):
    """No finite context: statistics over the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        answer: Tensor = self.norm(self.first(x))
        return answer


class Squeezing(nn.Module):
    """No finite context: the mean of the whole image weighs the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weigh = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        x = self.first(x)
        answer: Tensor = x * torch.sigmoid(self.weigh(x.mean(dim=(2, 3))))[:, :, None, None]
        return answer


class WholeImageReading(nn.Module):
    """No finite context: the whole image is read ``how`` networks do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh what a convolution gives by what the whole image gives."""
        y: Tensor = self.first(x)
        small = F.max_pool2d(y, 16)
        high, wide = small.shape[-2:]
        if self.how == "kernel of its size":
            return y * torch.sigmoid(self.second(F.avg_pool2d(small, (high, wide))))
        if self.how == "kernel of its width":
            weights = self.second(F.max_pool2d(small, (1, wide)))
            return y * torch.sigmoid(F.interpolate(weights, size=y.shape[-2:]))
        if self.how == "squeezed and expanded":
            weights = self.linear(F.adaptive_avg_pool2d(small, 1).flatten(1))[:, :, None, None]
            return y * torch.sigmoid(weights).expand_as(y)
        tokens = small.flatten(2).transpose(1, 2)
        if self.how == "attention":
            tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
        else:
            scores = torch.softmax(tokens @ tokens.transpose(1, 2) / 2, dim=-1)
            tokens = scores @ tokens
        grid = tokens.transpose(1, 2).reshape(1, 4, high, wide)
        return y + F.interpolate(grid, scale_factor=16.0)


class Placed(nn.Module):
    """Of one size: an embedding of the place in the image, and attention."""

    def __init__(self, side: int = 96) -> None:
        super().__init__()
        self.side = side
        self.patches = nn.Conv2d(1, 8, 16, stride=16)
        self.place = nn.Parameter(torch.rand(1, (side // 16) ** 2, 8))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up = nn.ConvTranspose2d(8, 2, 16, stride=16)

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches, look at all of them, put together."""
        y = self.patches(x)
        tokens = y.flatten(2).transpose(1, 2) + self.place
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        answer: Tensor = self.up(tokens.transpose(1, 2).reshape(y.shape))
        return answer


class Rolling(nn.Module):
    """An operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        return torch.roll(self.first(x), 1, dims=2)


class Shrinking(nn.Module):
    """An output of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        answer: Tensor = self.first(x)
        return answer
