"""Networks and volumes that are compared on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from torch import Tensor, nn

from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.model import load_model
from tilepipe.models.unet import UNet

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.models.model import Model

SCALE = f"scale:{1 / 255},0"


@dataclass(frozen=True)
class Case:
    """A network and a volume."""

    architecture: dict[str, Any]
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    memory: int
    """Bytes that tilepipe may take."""
    block: tuple[int, ...]
    """Voxels that `map_overlap` gives to the network at once, and of MONAI's windows."""
    window: tuple[int, ...]
    bare: tuple[tuple[int, ...], ...]
    """Input shapes of the bare network."""
    network: str | None = None
    """What builds it, where it is not the U-Net of tilepipe."""


CASES = {
    "tiny": Case(
        {"ndim": 2, "base": 4, "depth": 4}, (512, 512), (128, 128), 900_000_000, (256, 256),
        (256, 256), ((268, 268),),
    ),
    "2d": Case(
        {"ndim": 2, "base": 16, "depth": 5}, (4096, 4096), (512, 512), 2_000_000_000,
        (1024, 1024), (512, 512), ((572, 572), (1212, 1212), (1980, 1980)),
    ),
    "2d-large": Case(
        {"ndim": 2, "base": 16, "depth": 5}, (8192, 8192), (512, 512), 2_000_000_000,
        (2048, 2048), (512, 512), ((572, 572), (1212, 1212), (1980, 1980)),
    ),
    "3d": Case(
        {"ndim": 3, "base": 8, "depth": 4}, (128, 256, 256), (64, 128, 128), 2_000_000_000,
        (128, 128, 128), (128, 128, 128), ((132, 132, 132), (164, 164, 164), (196, 196, 196)),
    ),
    "3d-large": Case(
        {"ndim": 3, "base": 8, "depth": 4}, (256, 512, 512), (64, 128, 128), 4_000_000_000,
        (128, 128, 128), (128, 128, 128), ((132, 132, 132), (164, 164, 164), (196, 196, 196)),
    ),
    "anisotropic": Case(
        {"ndim": 3, "base": 8, "depth": 4, "kernels": [[1, 3, 3], [3, 3, 3], [3, 3, 3], [3, 3, 3]],
         "pools": [[1, 2, 2], [1, 2, 2], [2, 2, 2]]},
        (64, 512, 512), (32, 128, 128), 2_000_000_000, (64, 256, 256), (64, 128, 128),
        ((36, 188, 188), (68, 188, 188), (68, 252, 252)),
    ),
    "padded": Case(
        {"ndim": 2, "base": 16, "depth": 5, "padding": "same"}, (4096, 4096), (512, 512),
        2_000_000_000, (1024, 1024), (512, 512), ((512, 512), (1024, 1024), (2048, 2048)),
    ),
    "align-corners": Case(
        {"base": 16}, (4096, 4096), (512, 512), 2_000_000_000, (1024, 1024), (512, 512),
        ((512, 512), (1024, 1024), (2048, 2048)), "cases:Bilinear",
    ),
}  # fmt: skip


class Bilinear(nn.Module):
    """Padded, with batch normalization, and bilinear upsampling with ``align_corners=True``.

    Much like milesial/Pytorch-UNet: what is upsampled is padded to the size of the skip.
    """

    def __init__(self, base: int) -> None:
        super().__init__()
        widths = [base, 2 * base, 4 * base, 8 * base, 8 * base]
        self.down = nn.ModuleList(
            _twice(before, width) for before, width in zip([1, *widths], widths, strict=False)
        )
        after = [4 * base, 2 * base, base, base]
        inputs = [16 * base, 8 * base, 4 * base, 2 * base]
        self.up = nn.ModuleList(_twice(n, m) for n, m in zip(inputs, after, strict=True))
        self.head = nn.Conv2d(base, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits of two classes."""
        skips = []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        for skip, block in zip(reversed(skips[:-1]), self.up, strict=True):
            x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True)
            down, right = (skip.shape[d] - x.shape[d] for d in (2, 3))
            x = F.pad(x, [right // 2, right - right // 2, down // 2, down - down // 2])
            x = block(torch.cat([skip, x], dim=1))
        logits: Tensor = self.head(x)
        return logits


def _twice(before: int, width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (before, width):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def prepare(case: Case, folder: Path) -> None:
    """Write the volume and the network."""
    random = np.random.default_rng(0)
    image = zarr.create_array(
        folder / "image.zarr", shape=case.shape, chunks=case.chunks, dtype="uint8",
        dimension_names=tuple("zyx"[-len(case.shape) :]),
    )  # fmt: skip
    image[:] = random.integers(0, 256, case.shape, dtype="uint8")
    torch.manual_seed(0)
    if case.network:
        torch.save(Bilinear(**case.architecture).state_dict(), folder / "unet.pt")
        return
    save_checkpoint(
        folder / "unet.pt", UNet(**case.architecture), architecture=case.architecture,
        normalize=SCALE, labels=["background", "object"], provenance={},
    )  # fmt: skip


def model_of(case: Case, folder: Path) -> Model:
    """Return the model that `prepare` wrote."""
    arguments = case.architecture if case.network else None
    return load_model(folder / "unet.pt", network=case.network, network_args=arguments)


def load(case: Case, folder: Path) -> Any:
    """Return the network, channels last."""
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    return model_of(case, folder).module.to(memory_format=layout)


def multiply_adds(case: Case, folder: Path, shape: tuple[int, ...]) -> int:
    """Return those of one pass."""
    return model_of(case, folder).cost(shape).multiply_adds
