"""What may be asked of a segmentation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.text import comma

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tilepipe.geometry import Shape

CHOICES = {
    "write": ("labels", "probabilities", "logits", "values"),
    "activation": ("auto", "none", "sigmoid", "softmax"),
    "boundary": ("mirror", "network"),
    "strategy": ("auto", "sweep", "direct"),
    "precision": ("float32", "tf32", "bfloat16", "float16"),
    "ome_version": ("0.5", "0.4"),
}
"""What each of these options may be; the first is the default."""

ENGINES = ("auto", "serial", "dask", "local-cuda", "slurm")
"""What may run the tiles."""
KINDS = ("auto", "classes", "mask", "instances", "membrane")
"""What is compared in an evaluation."""
COMPONENTS = ("plane", "volume")
"""Within what objects lie in an evaluation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What may be asked of a segmentation. None leaves a choice to the plan.

    Sizes are voxels in the order of the volume's axes, without channels.
    """

    axes: str | None = None
    """Axes of the source, such as ``czyx``, where its file does not say them."""
    level: int = 0
    """Resolution of an OME-Zarr or TIFF pyramid; 0 is the full one."""
    series: int | None = None
    """Image of a TIFF or a Zarr group that holds several."""
    channels: tuple[int | str, ...] | None = None
    """Channels of the source that the network is given, in this order, by number or by name."""
    network: str | None = None
    """``package.module:factory`` or ``file.py:factory`` that builds a state dict's network."""
    network_args: Mapping[str, object] | None = None
    """Arguments of the factory that ``network`` names, by name; what JSON holds."""
    head: int = 0
    """Which of several output tensors."""
    write: str = "labels"
    """``labels``, ``probabilities``, ``logits``, or ``values``: the network's output as it is."""
    threshold: float | None = None
    """Probability above which a channel says 1; 0.5 by default."""
    activation: str = "auto"
    """What is applied to the network's output: ``none`` where it gives probabilities already,
    ``sigmoid`` or ``softmax`` where it gives logits; ``auto``: as its graph says."""
    normalize: str | None = None
    """``none``, ``scale:A,B``, ``percentile:LO,HI`` or ``zscore``; by default the model's own."""
    boundary: str = "mirror"
    """``mirror``, or ``network``: the network's own padding at the volume's border."""
    tile: Shape | None = None
    """Voxels of a tile along each axis: a multiple of the step and of the write unit."""
    memory: int | None = None
    """Bytes per worker."""
    strategy: str = "auto"
    """``sweep``: slab by slab along an axis; ``direct``: box by box; ``auto``: what costs least."""
    threads: int | None = None
    """Compute threads per worker; part of the plan, since rounding depends on it."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    precision: str = "float32"
    """``float32``, ``tf32``, ``bfloat16`` or ``float16``."""
    chunks: Shape | None = None
    """Voxels of a chunk of the output along each axis."""
    shards: Shape | None = None
    """Voxels of a shard of the output along each axis; only in OME-Zarr 0.5."""
    ome_version: str = "0.5"
    """Version of OME-Zarr that is written: ``0.5`` (Zarr v3) or ``0.4`` (Zarr v2)."""
    durable: bool = True
    """A tile counts as finished only when it is on the disk: it outlives a power failure."""
    inexact: bool = False
    """Run a network that no tiling makes exact in windows all the same."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise BadRequest(f"{name} (={value}) must be one of {', '.join(choices)}")
        for name in ("tile", "chunks", "shards"):
            sizes = getattr(self, name)
            if sizes is not None and min(sizes, default=0) <= 0:
                raise BadRequest(f"{name} (={comma(sizes)}) must be positive along every axis")
        if self.shards is not None and self.ome_version == "0.4":
            raise BadRequest(
                f"shards (={comma(self.shards)}) need Zarr v3, and ome_version (=0.4) is Zarr v2:"
                " leave out --shards, or give --ome-version 0.5"
            )
        for name in ("memory", "threads"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise BadRequest(f"{name} (={value}) must be positive")
        if self.threshold is not None:
            if not (math.isfinite(self.threshold) and 0 <= self.threshold <= 1):
                raise BadRequest(f"threshold (={self.threshold}) must lie between 0 and 1")
            if self.write != "labels":
                raise BadRequest(f"threshold (={self.threshold}) is for labels, not {self.write}")
        if self.activation != "auto" and self.write in ("logits", "values"):
            raise BadRequest(
                f"activation (={self.activation}) is for labels and probabilities, not"
                f" {self.write}: leave it out"
            )


def _check_types(options: Options) -> None:
    """Refuse sizes and numbers that are text, as a command line has them."""
    for name in ("tile", "chunks", "shards"):
        sizes = getattr(options, name)
        whole = isinstance(sizes, tuple | list) and all(type(n) is int for n in sizes)
        if sizes is not None and not whole:
            raise BadRequest(f"{name} (={sizes!r}) must be whole numbers, as in (64, 128, 128)")
    if not _is_json(options.network_args):
        raise BadRequest(
            f"network_args (={options.network_args!r}) must be what JSON holds, names with numbers"
            ' that are finite, text, lists and the like, as in {"base": 16}'
        )
    check_channels(options.channels)
    numbers = {"memory": 4_000_000_000, "threads": 2, "level": 0, "series": 1, "head": 0}
    for name, like in numbers.items():
        value = getattr(options, name)
        if value is not None and type(value) is not int:
            raise BadRequest(f"{name} (={value!r}) must be a whole number, as in {like}")


def _is_json(arguments: object) -> bool:
    """Whether JSON gives the arguments back as they are, or tuples as lists."""
    if arguments is None:
        return True
    if not isinstance(arguments, dict):
        return False
    try:
        return bool(json.loads(json.dumps(arguments, allow_nan=False)) == _listed(arguments))
    except (TypeError, ValueError, RecursionError):
        return False


def _listed(value: object) -> object:
    if isinstance(value, dict):
        return {name: _listed(item) for name, item in value.items()}
    return [_listed(item) for item in value] if isinstance(value, list | tuple) else value


def check_channels(channels: object) -> None:
    """Refuse channels that are neither numbers nor names."""
    listed = isinstance(channels, tuple | list) and all(
        type(channel) is int or isinstance(channel, str) for channel in channels
    )
    if channels is not None and not (listed and channels):
        raise BadRequest(f"channels (={channels!r}) must be numbers or names, as in (0, 'DAPI')")
