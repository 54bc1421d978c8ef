"""Small networks of the kinds that are published, with every operation that has a rule."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Upsampling(nn.Module):
    """Depth 3, zero-padded, upsampled by ``mode``, as most published U-Nets."""

    def __init__(self, mode: str, *, axes: int = 2, align: bool | None = None) -> None:
        super().__init__()
        conv = nn.Conv2d if axes == 2 else nn.Conv3d
        self.mode, self.align, self.axes = mode, align, axes
        self.down = nn.ModuleList(
            conv(a, b, 3, padding=1) for a, b in ((1, 3), (3, 4), (4, 5), (5, 6))
        )
        self.up = nn.ModuleList(conv(a, b, 3, padding=1) for a, b in ((11, 4), (8, 3), (6, 2)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        skips = []
        pool = F.max_pool2d if self.axes == 2 else F.max_pool3d
        for level, layer in enumerate(self.down):
            x = torch.tanh(layer(x if level == 0 else pool(x, 2)))
            skips.append(x)
        x = skips.pop()
        for layer in self.up:
            skip = skips.pop()
            x = F.interpolate(x, scale_factor=2.0, mode=self.mode, align_corners=self.align)
            pads = [
                edge
                for d in range(x.ndim - 1, 1, -1)
                for edge in (
                    (skip.shape[d] - x.shape[d]) // 2,
                    -(-(skip.shape[d] - x.shape[d]) // 2),
                )
            ]
            x = layer(torch.cat([skip, F.pad(x, pads)], dim=1))
        return x


class Nested(nn.Module):
    """A nested U-Net (UNet++), padded by 1 and upsampled, by default with aligned corners."""

    def __init__(self, *, levels: int = 5, convolutions: int = 2, align: bool = True) -> None:
        super().__init__()
        self.align = align
        widths = [3 + level for level in range(levels)]
        self.first = nn.ModuleList(
            _block(a, b, convolutions) for a, b in zip([1, *widths], widths, strict=False)
        )
        self.others = nn.ModuleList(
            nn.ModuleList(
                _block(widths[level] * column + widths[level + 1], widths[level], convolutions)
                for level in range(levels - column)
            )
            for column in range(1, levels)
        )
        self.last = nn.Conv2d(widths[0], 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Join each level with all before it and what is upsampled from the one below."""
        columns: list[list[Tensor]] = [[]]
        for level, layer in enumerate(self.first):
            x = layer(F.max_pool2d(x, 2) if level else x)
            columns[0].append(x)
        for layers in self.others:
            column: list[Tensor] = []
            assert isinstance(layers, nn.ModuleList)
            for level, layer in enumerate(layers):
                up = F.interpolate(
                    columns[-1][level + 1],
                    scale_factor=2.0,
                    mode="bilinear",
                    align_corners=self.align,
                )
                column.append(layer(torch.cat([*(c[level] for c in columns), up], dim=1)))
            columns.append(column)
        y: Tensor = self.last(columns[-1][0])
        return y


def _block(a: int, b: int, convolutions: int) -> nn.Module:
    layers = []
    for _ in range(convolutions):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.ReLU()]
        a = b
    return nn.Sequential(*layers)


class ResidualNetwork(nn.Module):
    """A 7x7 stem of stride 2, padded 3x3 pooling, residual blocks, additive fusion."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(2, 4, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(4), nn.ReLU()
        )
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(4, 4, 3, padding=1), nn.ELU(), nn.Conv2d(4, 4, 3, padding=1)
        )
        self.shrink = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(4, 6, 1, stride=2)
        self.up = nn.ConvTranspose2d(6, 4, 4, stride=2, padding=1)
        self.up2 = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1, output_padding=1)
        self.up3 = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        a = self.stem(x)
        b = self.pool(a)
        b = b + self.block(b)
        c = self.shrink(b) + self.skip(b)
        d = F.silu(self.up(F.dropout(c, 0.5, self.training))) + b
        answer: Tensor = self.up3(self.up2(d) + a)
        return answer


class Attention(nn.Module):
    """Attention gates on the skips, average pooling, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 6, 3, padding=1)
        self.third = nn.Conv2d(6, 6, 3, padding=1)
        self.gate, self.gate_skip = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1, stride=1)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        a = torch.relu(self.first(x)) + x.repeat(1, 4, 1, 1)
        b = torch.relu(self.second(F.avg_pool2d(a, 2)))
        c = torch.relu(self.third(F.avg_pool2d(b, 3, stride=2, padding=1)))
        up = F.interpolate(c, scale_factor=2, mode="nearest")
        gate = torch.sigmoid(self.gate(up) + self.gate_skip(b)).mean(dim=1, keepdim=True)
        both = torch.cat(
            [F.interpolate(t, scale_factor=2, mode="nearest") for t in (up, b * gate)], 1
        )
        return torch.softmax(self.out(torch.cat([a, both], dim=1)), dim=1)


class Even(nn.Module):
    """Even kernels, dilation, groups, stride 3, 'same' padding by name, reflect padding."""

    def __init__(self) -> None:
        super().__init__()
        self.even = nn.Conv2d(1, 4, 2)
        self.wide = nn.Conv2d(4, 4, 3, dilation=3, groups=2)
        self.same = nn.Conv2d(4, 4, 4, padding="same", dilation=2)
        self.reflect = nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        self.third = nn.Conv2d(4, 4, 3, stride=3)
        self.up = nn.ConvTranspose2d(4, 2, 5, stride=3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        x = F.leaky_relu(self.wide(F.gelu(self.even(x))))
        x = self.reflect(F.hardtanh(self.same(x)))
        answer: Tensor = self.up(self.third(x))
        return answer


class Modern(nn.Module):
    """Channels-last normalisation, pixel shuffle, and a linear layer over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, stride=4)
        self.deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.out = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        x = self.stem(x)
        y = self.mix(F.gelu(self.norm(self.deep(x).permute(0, 2, 3, 1)))).permute(0, 3, 1, 2)
        return F.pixel_shuffle(F.pixel_shuffle(self.out(x + y), 2), 2)


class Restoring(nn.Module):
    """Three convolutions without padding, as in restoration; returns two tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv3d(1, 3, 3),
            nn.PReLU(),
            nn.Conv3d(3, 3, (1, 5, 3)),
            nn.Softplus(),
            nn.Conv3d(3, 1, 1),
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        y = self.layers(x)
        return y, y * 2


class Folding(nn.Module):
    """Its first convolution sees four times the channels of the input."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.last = nn.Conv2d(7, 4, 1)
        self.first = nn.Conv2d(4 * channels, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Fold squares of four voxels into channels, and unfold the answer."""
        return F.pixel_shuffle(self.last(torch.relu(self.first(F.pixel_unshuffle(x, 2)))), 2)


class Resizing(nn.Module):
    """An encoder of stride 2 whose decoder resizes to the size of each skip."""

    def __init__(self, mode: str = "bilinear", *, align: bool | None = None) -> None:
        super().__init__()
        self.mode, self.align = mode, align
        self.stem = nn.Conv2d(1, 4, 7, stride=2, padding=3)
        self.down = nn.ModuleList(nn.Conv2d(4, 4, 3, stride=2, padding=1) for _ in range(3))
        self.up = nn.ModuleList(nn.Conv2d(8, 4, 3, padding=1) for _ in range(3))
        self.out = nn.Conv2d(4, 3, 3, padding=1)

    def resize(self, x: Tensor, like: Tensor) -> Tensor:
        """Return a tensor resized to the height and width of another."""
        return F.interpolate(x, size=like.shape[2:], mode=self.mode, align_corners=self.align)

    def forward(self, image: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        x = torch.tanh(self.stem(image))
        skips = [x]
        for layer in self.down:
            skips.append(torch.tanh(layer(skips[-1])))
        x = skips.pop()
        for layer in self.up:
            skip = skips.pop()
            x = torch.tanh(layer(torch.cat([self.resize(x, skip), skip], 1)))
        answer: Tensor = self.out(self.resize(x, image))
        return answer


class Upscoring(nn.Module):
    """Scores at an eighth of the resolution, resized to the image's size at once."""

    def __init__(self, mode: str = "bilinear") -> None:
        super().__init__()
        self.mode = mode
        self.down = nn.Sequential(
            nn.Conv2d(1, 4, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(3, 2, 1),
            nn.Conv2d(4, 6, 3, stride=2, padding=1), nn.Tanh(),
            nn.Conv2d(6, 6, 3, padding=2, dilation=2), nn.Tanh(), nn.Conv2d(6, 3, 1),
        )  # fmt: skip

    def forward(self, image: Tensor) -> Tensor:
        """Return the answer to a batch ``(n, channels, y, x)``."""
        return F.interpolate(self.down(image), size=image.shape[2:], mode=self.mode)
