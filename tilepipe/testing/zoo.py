"""Small networks by name, with random weights: all that the project claims to tile exactly.

A test of an engine, a storage or a planner runs over them, as ours do:

    from tilepipe.testing import zoo

    @pytest.mark.parametrize("name", [*zoo.FLAT, *zoo.SOLID])
    def test_my_engine_gives_the_whole_answer(name):
        model = zoo.build(name)
        ...
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from tilepipe.models.model import Model, wrap
from tilepipe.models.unet import UNet
from tilepipe.testing.networks import (
    Attention,
    Even,
    Modern,
    ResidualNetwork,
    Resizing,
    Restoring,
    Upsampling,
    Upscoring,
)

if TYPE_CHECKING:
    from collections.abc import Callable


def valid_unet() -> nn.Module:
    """Return a U-Net of four levels without padding, in 2D."""
    return UNet(ndim=2, base=2, depth=4)


def paper_unet() -> nn.Module:
    """Return the U-Net of the paper (arXiv:1505.04597) with 2 channels instead of 64."""
    return UNet(ndim=2, base=2, depth=5)


def same_unet() -> nn.Module:
    """Return a zero-padded U-Net with batch normalization, in 2D."""
    return UNet(ndim=2, base=2, depth=4, padding="same", batch_norm=True)


def gated_unet() -> nn.Module:
    """Return a U-Net with attention gates and without padding, in 2D."""
    return UNet(ndim=2, base=4, depth=3, attention=True)


def same_gated_unet() -> nn.Module:
    """Return a zero-padded U-Net with attention gates, in 2D."""
    return UNet(ndim=2, base=4, depth=3, padding="same", attention=True, batch_norm=True)


def residual_unet() -> nn.Module:
    """Return a U-Net of residual blocks, in 2D."""
    return UNet(ndim=2, base=3, depth=3, residual=True, batch_norm=True)


def valid_unet_3d() -> nn.Module:
    """Return a U-Net of three levels without padding, in 3D."""
    return UNet(ndim=3, base=2, depth=3)


def same_unet_3d() -> nn.Module:
    """Return a zero-padded U-Net of three levels, in 3D."""
    return UNet(ndim=3, base=2, depth=3, padding="same")


def anisotropic_unet_3d() -> nn.Module:
    """Return a 3D U-Net whose kernels and pools are flat, as for thick sections."""
    return UNet(
        ndim=3,
        base=2,
        depth=3,
        kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
        pools=((1, 2, 2), (1, 2, 2)),
    )


def both_unet_3d() -> nn.Module:
    """Return an anisotropic 3D U-Net with attention gates and residual blocks."""
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
    """Return the same zero-padded, with a pool of three voxels."""
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


def bilinear() -> nn.Module:
    """Return a zero-padded 2D network with bilinear upsampling."""
    return Upsampling("bilinear", align=False)


def trilinear() -> nn.Module:
    """Return a zero-padded 3D network with trilinear upsampling."""
    return Upsampling("trilinear", axes=3, align=False)


def nearest() -> nn.Module:
    """Return a zero-padded 2D network that repeats voxels to upsample."""
    return Upsampling("nearest")


def bicubic() -> nn.Module:
    """Return a zero-padded 2D network with bicubic upsampling."""
    return Upsampling("bicubic", align=False)


def align_corners() -> nn.Module:
    """Return a 2D network whose upsampling depends on the size of the whole image."""
    return Upsampling("bilinear", align=True)


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
    "residual": ResidualNetwork,
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
    """Return a network of the zoo in float64, with random weights and statistics.

    Args:
        name: A key of `FLAT`, `SOLID` or `SIZED`.
        seed: The seed of torch's random numbers, from which the weights are drawn.

    Returns:
        The network as `tilepipe.load_model` returns one, in evaluation mode.
    """
    torch.manual_seed(seed)
    module = (FLAT | SOLID | SIZED)[name]().double().eval()
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d):
            assert layer.running_mean is not None
            assert layer.running_var is not None
            nn.init.normal_(layer.running_mean)
            nn.init.uniform_(layer.running_var, 0.5, 2.0)
    return wrap(module)
