"""Small networks that hold every operation the project claims, for the laws to be tested on."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tilepipe.models.model import Model, wrap
from tilepipe.models.unet import UNet

if TYPE_CHECKING:
    from collections.abc import Callable


def valid_unet() -> nn.Module:
    return UNet(ndim=2, base=2, depth=4)


def paper_unet() -> nn.Module:
    return UNet(ndim=2, base=2, depth=5)


def same_unet() -> nn.Module:
    return UNet(ndim=2, base=2, depth=4, padding="same", batch_norm=True)


def valid_unet_3d() -> nn.Module:
    return UNet(ndim=3, base=2, depth=3)


def anisotropic_unet_3d() -> nn.Module:
    return UNet(
        ndim=3,
        base=2,
        depth=3,
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        pools=((1, 2, 2), (1, 2, 2)),
    )


def gated_unet() -> nn.Module:
    return UNet(ndim=2, base=4, depth=3, attention=True)


def same_gated_unet() -> nn.Module:
    return UNet(ndim=2, base=4, depth=3, padding="same", attention=True, batch_norm=True)


def residual_unet() -> nn.Module:
    return UNet(ndim=2, base=3, depth=3, residual=True, batch_norm=True)


def both_unet_3d() -> nn.Module:
    return UNet(
        ndim=3,
        base=2,
        depth=3,
        kernels=((1, 3, 3), (3, 3, 3), (2, 3, 3)),
        pools=((1, 2, 2), (2, 2, 2)),
        attention=True,
        residual=True,
    )


def same_both_unet_3d() -> nn.Module:
    return UNet(
        ndim=3,
        base=2,
        depth=3,
        padding="same",
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        pools=((1, 2, 2), (1, 3, 2)),
        attention=True,
        residual=True,
    )


def same_unet_3d() -> nn.Module:
    return UNet(ndim=3, base=2, depth=3, padding="same")


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
            column = []
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


class Residual(nn.Module):
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
        a = self.stem(x)
        b = self.pool(a)
        b = b + self.block(b)
        c = self.shrink(b) + self.skip(b)
        d = F.silu(self.up(F.dropout(c, 0.5, self.training))) + b
        return self.up3(self.up2(d) + a)


class Attention(nn.Module):
    """Attention gates on the skips, average pooling, and a softmax at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 4, 3, padding=1)
        self.two = nn.Conv2d(4, 6, 3, padding=1)
        self.three = nn.Conv2d(6, 6, 3, padding=1)
        self.gate, self.gate_skip = nn.Conv2d(6, 3, 1), nn.Conv2d(6, 3, 1, stride=1)
        self.out = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        a = torch.relu(self.one(x)) + x.repeat(1, 4, 1, 1)
        b = torch.relu(self.two(F.avg_pool2d(a, 2)))
        c = torch.relu(self.three(F.avg_pool2d(b, 3, stride=2, padding=1)))
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
        x = F.leaky_relu(self.wide(F.gelu(self.even(x))))
        x = self.reflect(F.hardtanh(self.same(x)))
        return self.up(self.third(x))


class Modern(nn.Module):
    """Channels-last normalisation, pixel shuffle, and a linear layer over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 8, 4, stride=4)
        self.deep = nn.Conv2d(8, 8, 7, padding=3, groups=8)
        self.norm, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.out = nn.Conv2d(8, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
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
        y = self.layers(x)
        return y, y * 2


class GroupNormed(nn.Module):
    """No finite context: statistics over the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.one(x))


class Squeezing(nn.Module):
    """No finite context: the mean of the whole image weighs the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.weigh = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.one(x)
        return x * torch.sigmoid(self.weigh(x.mean(dim=(2, 3))))[:, :, None, None]


class Reading(nn.Module):
    """No finite context: the whole image is read ``how`` networks do it."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 1)
        self.linear = nn.Linear(4, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """Weigh what a convolution gives by what the whole image gives."""
        y = self.one(x)
        small = F.max_pool2d(y, 16)
        high, wide = small.shape[-2:]
        if self.how == "kernel of its size":
            weights = self.two(F.avg_pool2d(small, (high, wide)))
        elif self.how == "kernel of its width":
            weights = self.two(F.max_pool2d(small, (1, wide)))
            weights = F.interpolate(weights, size=y.shape[-2:])
        elif self.how == "squeezed and expanded":
            weights = self.linear(F.adaptive_avg_pool2d(small, 1).flatten(1))[:, :, None, None]
            return y * torch.sigmoid(weights).expand_as(y)
        else:
            tokens = small.flatten(2).transpose(1, 2)
            if self.how == "attention":
                tokens = self.attention(tokens, tokens, tokens, need_weights=False)[0]
            else:
                scores = torch.softmax(tokens @ tokens.transpose(1, 2) / 2, dim=-1)
                tokens = scores @ tokens
            grid = tokens.transpose(1, 2).reshape(1, 4, high, wide)
            return y + F.interpolate(grid, scale_factor=16.0)
        return y * torch.sigmoid(weights)


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
        return self.up(tokens.transpose(1, 2).reshape(y.shape))


class Folding(nn.Module):
    """Its first convolution sees four times the channels of the input."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.last = nn.Conv2d(7, 4, 1)
        self.first = nn.Conv2d(4 * channels, 7, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Fold squares of four voxels into channels, and unfold the answer."""
        return F.pixel_shuffle(self.last(torch.relu(self.first(F.pixel_unshuffle(x, 2)))), 2)


class Rolling(nn.Module):
    """An operation without a rule."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.roll(self.one(x), 1, dims=2)


class Shrinking(nn.Module):
    """An output of half the resolution."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Conv2d(1, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x)


def bilinear() -> nn.Module:
    return Upsampling("bilinear", align=False)


def trilinear() -> nn.Module:
    return Upsampling("trilinear", axes=3, align=False)


def nearest() -> nn.Module:
    return Upsampling("nearest")


def bicubic() -> nn.Module:
    return Upsampling("bicubic", align=False)


def align_corners() -> nn.Module:
    return Upsampling("bilinear", align=True)


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
        return F.interpolate(x, size=like.shape[2:], mode=self.mode, align_corners=self.align)

    def forward(self, image: Tensor) -> Tensor:
        x = torch.tanh(self.stem(image))
        skips = [x]
        for layer in self.down:
            skips.append(torch.tanh(layer(skips[-1])))
        x = skips.pop()
        for layer in self.up:
            skip = skips.pop()
            x = torch.tanh(layer(torch.cat([self.resize(x, skip), skip], 1)))
        return self.out(self.resize(x, image))


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
        return F.interpolate(self.down(image), size=image.shape[2:], mode=self.mode)


SIZED: dict[str, Callable[[], nn.Module]] = {
    "resizing": Resizing,
    "resizing nearest": lambda: Resizing("nearest"),
    "resizing nearest-exact": lambda: Resizing("nearest-exact"),
    "resizing bicubic": lambda: Resizing("bicubic"),
    "resizing aligned": lambda: Resizing("bilinear", align=True),
    "resizing aligned bicubic": lambda: Resizing("bicubic", align=True),
    "upscoring": Upscoring,
    "upscoring nearest": lambda: Upscoring("nearest"),
}
"""2D networks that take every size and read the sizes of their own tensors."""

FLAT: dict[str, Callable[[], nn.Module]] = {
    "valid unet": valid_unet,
    "same unet": same_unet,
    "bilinear": bilinear,
    "nearest": nearest,
    "bicubic": bicubic,
    "residual": Residual,
    "attention": Attention,
    "gated unet": gated_unet,
    "same gated unet": same_gated_unet,
    "residual unet": residual_unet,
    "even": Even,
    "modern": Modern,
}
"""2D networks that tile exactly."""
SOLID: dict[str, Callable[[], nn.Module]] = {
    "valid unet 3d": valid_unet_3d,
    "anisotropic": anisotropic_unet_3d,
    "same unet 3d": same_unet_3d,
    "trilinear": trilinear,
    "restoring": Restoring,
    "both 3d": both_unet_3d,
    "same both 3d": same_both_unet_3d,
}
"""3D networks that tile exactly."""
PADDED = ("same unet", "bilinear", "nearest", "bicubic", "residual", "attention",
          "same gated unet", "same unet 3d", "trilinear", "same both 3d")  # fmt: skip
"""Those of them that pad their input and accept ``boundary="network"``."""


def build(name: str, *, seed: int = 0) -> Model:
    """Return a network of the zoo in float64 with random weights and statistics."""
    torch.manual_seed(seed)
    module = (FLAT | SOLID | SIZED)[name]().double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return wrap(module)
