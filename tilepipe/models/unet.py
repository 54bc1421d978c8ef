"""The U-Net of arXiv:1505.04597, in 2D and in 3D (arXiv:1606.06650), and two variants of it.

Shape suffixes: ``B`` batch, ``C`` channels, ``S`` the spatial axes (``y x`` or ``z y x``).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    PerAxis = int | Sequence[int]
    Layers = dict[int, Callable[..., nn.Module]]

CONVOLUTION: Layers = {2: nn.Conv2d, 3: nn.Conv3d}
UP_CONVOLUTION: Layers = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM: Layers = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
MAX_POOL: Layers = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
DROPOUT: Layers = {2: nn.Dropout2d, 3: nn.Dropout3d}


class UNet(nn.Module):
    """Two convolutions per level; down by max pooling, up by up-convolution, skips concatenated.

    Takes ``(B, in_channels, *S)`` and returns logits ``(B, classes, *S')``. With the defaults it
    is the paper's network: 23 convolutional layers, no padding, 572 voxels to 388. Options are
    plain JSON values, so that ``UNet(**architecture)`` builds the network of a checkpoint again.

    >>> UNet(base=2, depth=3)(torch.zeros(1, 1, 44, 52)).shape
    torch.Size([1, 2, 4, 12])

    Args:
        ndim: The number of spatial axes, 2 or 3.
        in_channels: The channels of the image.
        classes: The channels of the answer.
        base: The channels of the first level; each further level has twice as many.
        depth: The number of levels; there is one pooling less.
        padding: ``valid`` loses the border and crops the skips round their centre. ``same`` pads
            with zeros and crops nothing, so kernels must be odd, and each size must divide by the
            product of the pools (RuntimeError from torch otherwise).
        batch_norm: Whether each 3x3 convolution is normalised, and then has no bias.
        kernels: The kernel of each level's convolutions: one number, or one for each
            axis; by default 3.
        pools: The pooling and up-convolution between each level and the next: one number, or one
            for each axis; by default 2.
        dropout: The share of channels dropped in training at the end of the contracting path, where
            the authors' published network has it: after the two deepest levels.
        attention: Whether a `Gate` is put on every skip; it does not change the sizes.
        residual: Whether every pair of convolutions is a `Residual`; it does not change the sizes.

    Raises:
        BadRequest: The options make no network.
    """

    def __init__(
        self,
        *,
        ndim: int = 2,
        in_channels: int = 1,
        classes: int = 2,
        base: int = 64,
        depth: int = 5,
        padding: str = "valid",
        batch_norm: bool = False,
        kernels: Sequence[PerAxis] | None = None,
        pools: Sequence[PerAxis] | None = None,
        dropout: float = 0.0,
        attention: bool = False,
        residual: bool = False,
    ) -> None:
        super().__init__()
        _check(ndim, depth, padding, {"in_channels": in_channels, "classes": classes, "base": base})
        kernel_sizes = _per_level("kernels", kernels, 3, ndim=ndim, levels=depth)
        pool_sizes = _per_level("pools", pools, 2, ndim=ndim, levels=depth - 1)
        if padding == "same" and any(k % 2 == 0 for kernel in kernel_sizes for k in kernel):
            raise BadRequest(
                f"kernels (={kernels}) must be odd where padding is 'same'; use 'valid' or odd ones"
            )
        if not 0 <= dropout < 1:
            raise BadRequest(f"dropout (={dropout}) must lie in 0:1; 0 drops nothing")
        channels = [base * 2**level for level in range(depth)]
        inputs = [in_channels, *channels]
        same = padding == "same"
        self.down = nn.ModuleList(
            _block(inputs[i], channels[i], kernel_sizes[i], same, batch_norm, residual)
            for i in range(depth)
        )
        self.pool = nn.ModuleList(MAX_POOL[ndim](size) for size in pool_sizes)
        self.up = nn.ModuleList(
            UP_CONVOLUTION[ndim](channels[i + 1], channels[i], pool_sizes[i], pool_sizes[i])
            for i in range(depth - 1)
        )
        self.merge = nn.ModuleList(
            _block(2 * channels[i], channels[i], kernel_sizes[i], same, batch_norm, residual)
            for i in range(depth - 1)
        )
        self.gate = nn.ModuleList(
            Gate(channels[i], channels[i + 1], pool_sizes[i], smooth=same)
            for i in range(depth - 1 if attention else 0)
        )
        self.dropout = DROPOUT[ndim](dropout) if dropout else nn.Identity()
        self.head = CONVOLUTION[ndim](base, classes, 1)
        self.crops = not same
        initialise(self)

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return the logits ``(B, classes, *S')`` of ``image_BCS``."""
        deepest = len(self.down) - 1
        here, skips = image_BCS, []
        for level, block in enumerate(self.down):
            here = block(here)
            if level >= deepest - 1:
                here = self.dropout(here)
            if level < deepest:
                skips.append(here)
                here = self.pool[level](here)
        for level in reversed(range(deepest)):
            coarse, here = here, self.up[level](here)
            skip = _crop(skips[level], here) if self.crops else skips[level]
            if self.gate:
                skip = self.gate[level](skip, coarse)
            here = torch.cat((skip, here), dim=1)
            here = self.merge[level](here)
        logits: Tensor = self.head(here)
        return logits


class Gate(nn.Module):
    """The additive attention gate of arXiv:1804.03999: which voxels of a skip are let through.

    Each voxel of the coarser signal says how much of the skip's voxels over it is kept, 0:1:
    ``sigmoid(psi(relu(W_x skip + W_g coarse)))``, all three 1x1 convolutions, W_x with a stride of
    ``pool`` and half of the skip's channels between. Brought to the skip's size it is multiplied
    with it: linearly where ``smooth``, as in the paper, else each value for all voxels it covers.
    The latter reads no neighbour, so that a network without padding stays one: its answer depends
    on nothing beyond what its convolutions read, and the size of the window does not matter.
    """

    def __init__(
        self, channels: int, coarse_channels: int, pool: tuple[int, ...], *, smooth: bool
    ) -> None:
        super().__init__()
        ndim, between = len(pool), max(1, channels // 2)
        self.skip = CONVOLUTION[ndim](channels, between, 1, stride=pool, bias=False)
        self.coarse = CONVOLUTION[ndim](coarse_channels, between, 1)
        self.psi = CONVOLUTION[ndim](between, 1, 1)
        self.mode = {2: "bilinear", 3: "trilinear"}[ndim] if smooth else "nearest"

    def forward(self, skip_BCS: Tensor, coarse_BCS: Tensor) -> Tensor:
        """Return ``skip_BCS``, weighed; its size is that of ``coarse_BCS`` times ``pool``."""
        both = F.relu(self.skip(skip_BCS) + self.coarse(coarse_BCS))
        kept_B1S = torch.sigmoid(self.psi(both))
        return skip_BCS * F.interpolate(kept_B1S, size=skip_BCS.shape[2:], mode=self.mode)


class Residual(nn.Module):
    """Two convolutions that are added to what they read, before the last ReLU (He et al. 2015).

    A 1x1 convolution takes what is read to other channels; without padding its middle is added.
    """

    def __init__(self, body: nn.Module, shortcut: nn.Module, *, crops: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.crops = body, shortcut, crops

    def forward(self, image_BCS: Tensor) -> Tensor:
        """Return ``relu(body + shortcut)``, of the size that ``body`` gives."""
        answer = self.body(image_BCS)
        beside = _crop(image_BCS, answer) if self.crops else image_BCS
        return F.relu(answer + self.shortcut(beside))


def initialise(network: nn.Module) -> None:
    """Draw all convolution weights with deviation ``sqrt(2 / N)``; biases become 0.

    N is the number of inputs of one output voxel (the paper, section 3; He et al. 2015). For an
    up-convolution whose stride is its kernel that is its input channels.
    """
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            inputs = layer.in_channels * math.prod(layer.kernel_size)
        elif isinstance(layer, nn.ConvTranspose2d | nn.ConvTranspose3d):
            inputs = layer.in_channels
        else:
            continue
        nn.init.normal_(layer.weight, std=math.sqrt(2 / inputs))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def _block(
    inputs: int,
    channels: int,
    kernel: tuple[int, ...],
    same: bool,
    batch_norm: bool,
    residual: bool,
) -> nn.Module:
    """Return convolution, ReLU, convolution, ReLU; with batch normalisation before each ReLU."""
    border = tuple(k // 2 if same else 0 for k in kernel)
    first = _convolution(inputs, channels, kernel, border, batch_norm)
    second = _convolution(channels, channels, kernel, border, batch_norm)
    if not residual:
        return nn.Sequential(*first, nn.ReLU(), *second, nn.ReLU())
    shortcut: nn.Module = nn.Identity()
    if inputs != channels:
        ones, zeros = (1,) * len(kernel), (0,) * len(kernel)
        shortcut = nn.Sequential(*_convolution(inputs, channels, ones, zeros, batch_norm))
    return Residual(nn.Sequential(*first, nn.ReLU(), *second), shortcut, crops=not same)


def _convolution(
    inputs: int, channels: int, kernel: tuple[int, ...], border: tuple[int, ...], batch_norm: bool
) -> list[nn.Module]:
    """Return a convolution with a bias, or with batch normalisation behind it."""
    ndim = len(kernel)
    layer = CONVOLUTION[ndim](inputs, channels, kernel, padding=border, bias=not batch_norm)
    return [layer, BATCH_NORM[ndim](channels)] if batch_norm else [layer]


def _crop(skip_BCS: Tensor, like_BCS: Tensor) -> Tensor:
    """Return the middle of ``skip_BCS``, of the size of ``like_BCS``."""
    for axis in range(2, skip_BCS.dim()):
        size = like_BCS.shape[axis]
        start = (skip_BCS.shape[axis] - size) // 2
        skip_BCS = skip_BCS[(slice(None),) * axis + (slice(start, start + size),)]
    return skip_BCS


def _check(ndim: int, depth: int, padding: str, counts: Mapping[str, int]) -> None:
    if ndim not in (2, 3):
        raise BadRequest(f"ndim (={ndim}) must be 2 or 3")
    if padding not in ("valid", "same"):
        raise BadRequest(f"padding (={padding!r}) must be 'valid' or 'same'")
    for name, value in {**counts, "depth": depth}.items():
        if value < 1:
            raise BadRequest(f"{name} (={value}) must be at least 1")


def _per_level(
    name: str, values: Sequence[PerAxis] | None, default: int, *, ndim: int, levels: int
) -> list[tuple[int, ...]]:
    """Return one tuple of ``ndim`` sizes for each level."""
    sizes: Sequence[PerAxis] = [default] * levels if values is None else values
    if len(sizes) != levels:
        raise BadRequest(f"{name} (={values}) must have {levels} entries, one for each level")
    full = [(size,) * ndim if isinstance(size, int) else tuple(size) for size in sizes]
    if any(len(size) != ndim or min(size) < 1 for size in full):
        raise BadRequest(
            f"{name} (={values}) must have, in each entry, one number or {ndim}, each at least 1"
        )
    return full
