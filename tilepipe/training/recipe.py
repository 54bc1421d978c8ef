"""The recipe of a training: all options that decide what a network learns, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.options import check_channels

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from tilepipe.geometry import Shape

CHOICES = {
    "target": ("classes", "mask", "foreground", "membrane", "border", "values"),
    "padding": ("valid", "same"),
    "loss": ("cross-entropy", "dice", "both", "l1", "l2"),
    "rotate": ("any", "quarter", "none"),
    "optimizer": ("adamw", "sgd"),
    "schedule": ("cosine", "constant"),
    "precision": ("float32", "bfloat16", "float16"),
}
"""What each of these options may be; the first is the default, but for the loss of values."""
SEEDS = 2**32


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """All options of a training, as plain JSON values. None leaves a choice to the training.

    Sizes of patches are voxels along the network's axes, ``(z) y x``; regions are in the order of
    the volume's axes, without channels.
    """

    target: str = "classes"
    """What labels become: ``classes``, ``mask``, ``foreground``, ``membrane``, ``border`` or
    ``values``; see `tilepipe.training.targets`."""
    classes: int | None = None
    """Channels of the answer; by default those that the target has, or that the labels hold."""
    names: tuple[str, ...] | None = None
    """The name of each channel of the answer; by default what the target calls it."""
    ignore: int | None = None
    """Voxels with this label are not learned from."""
    axes: str | None = None
    """Axes of the images, such as ``czyx``, where their files do not say them."""
    level: int = 0
    """Resolution of the images' and the labels' pyramids; 0 is the full one."""
    series: int | None = None
    """Number of the image that is read of each file that holds several."""
    channels: tuple[int | str, ...] | None = None
    """Channels of the images that are learned from, in this order, by number or by name."""
    train_region: tuple[str, ...] = ()
    """Regions of each volume that are learned from, such as ``0:20,:,:``; by default all that is
    not held out."""
    val_region: tuple[str, ...] = ()
    """Regions of each volume that are held out; by default the last eighth of the first axis, or
    of a large volume a corner of that. ``none`` holds nothing out."""
    normalize: str = "zscore"
    """What is done to grey values: ``none``, ``scale:A,B``, ``percentile:LO,HI`` or ``zscore``."""

    ndim: int | None = None
    """Spatial axes of the network, 2 or 3; by default those of the volume."""
    base: int = 32
    """Channels of the network's first level; each further level has twice as many."""
    depth: int = 4
    """Levels of the network."""
    padding: str = "valid"
    """``valid``: convolutions lose the border; ``same``: they pad it with zeros."""
    batch_norm: bool = False
    """Normalize every batch after each convolution."""
    attention: bool = False
    """Put an attention gate on every skip."""
    residual: bool = False
    """Make every pair of convolutions a residual block."""
    dropout: float = 0.0
    """Share of the channels that are dropped at the end of the contracting path."""
    kernels: Sequence[int | Shape] | None = None
    """Kernel of each level's convolutions, a number or one for each axis. [3]"""
    pools: Sequence[int | Shape] | None = None
    """Pooling between each level and the next, a number or one for each axis. [2]"""
    network: str | None = None
    """``package.module:factory`` or ``file.py:factory`` that builds another network than the
    U-Net; the fields from ``base`` to ``pools`` are the U-Net's alone."""
    network_args: Mapping[str, object] | None = None
    """Arguments of the factory that ``network`` names, by name; what JSON holds."""

    patch: Shape | None = None
    """Voxels that the loss sees, grown to what the network gives; by default 256 along each axis
    in 2D and 48 in 3D."""
    balance: bool = False
    """Whether patches lie round voxels of every class equally often."""
    cache: int = 1_000_000_000
    """Bytes of decoded chunks that are kept in memory."""
    augment: bool = True
    """Whether patches are deformed and their grey values changed, as the fields below say."""
    elastic: float | None = None
    """Standard deviation of the random displacements, in voxels; 0 for none. By default as much of
    the patch as in the paper, where it is 10 of 388."""
    rotate: str = "any"
    """How patches are turned: by ``any`` angle, ``quarter`` turns, or ``none``."""
    flip: bool = True
    """Flip patches along each axis at random."""
    scale: float = 0.1
    """Patches are scaled at random by a factor of at most 1 plus this, up or down."""
    grey: float = 0.1
    """Share by which contrast, brightness and gamma are changed at most; 0 for none."""
    noise: float = 0.0
    """Largest standard deviation of the noise, as a share of that of the patch; 0 for none."""
    in_plane: bool = False
    """Whether patches are deformed along y and x alone, and neighbours along z do not count."""

    loss: str | None = None
    """What is made small; by default ``cross-entropy``, and ``l2`` for values."""
    class_weights: bool = False
    """Whether each class weighs by the inverse of its frequency, as in the paper."""
    weight_map: bool = False
    """Whether the voxels between two objects that are close weigh more, as in the paper."""
    w0: float = 10.0
    """Weight of such a voxel where objects touch."""
    sigma: float = 5.0
    """Standard deviation, in voxels, of the Gaussian by which it falls with their distance."""

    steps: int | None = None
    """Steps after which the training ends; None leaves that to ``minutes``."""
    minutes: float | None = None
    """Minutes after which the training ends; None leaves that to ``steps``."""
    batch: int = 2
    """Patches of a batch, on each device."""
    accumulate: int = 1
    """Batches whose gradients are added up for one step."""
    optimizer: str = "adamw"
    """``adamw`` or ``sgd``."""
    lr: float | None = None
    """Highest learning rate; by default 1e-3 for adamw and 1e-2 for sgd."""
    weight_decay: float = 1e-4
    """Share of each weight that a step takes off, times the learning rate."""
    schedule: str = "cosine"
    """How the learning rate goes on: ``cosine`` down to 0, or ``constant``."""
    warmup: float = 0.03
    """Share of the training in which the learning rate rises to its highest."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 for no limit."""
    average: float = 0.0
    """Share of the old in the running mean of the weights, as 0.999; 0 saves the last weights."""
    precision: str = "float32"
    """``float32``, ``bfloat16`` or ``float16``."""
    compile: bool = False
    """Compile the network with ``torch.compile``."""
    seed: int = 0
    """Seed of all random numbers: weights, patches and how they are changed."""
    validate_every: int | None = None
    """Steps between two validations; by default a twentieth of the training."""
    patience: int | None = None
    """Validations without a better one after which the training ends; by default it goes on."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    threads: int | None = None
    """Compute threads of the process. [as torch chooses]"""
    loaders: int = 2
    """Threads that make patches."""

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            value = getattr(self, name)
            if value not in choices and not (name == "loss" and value is None):
                raise BadRequest(f"{name} (={value}) must be one of {', '.join(choices)}")
        check_channels(self.channels)
        for name in ("batch", "accumulate", "base", "depth", "loaders", "cache"):
            _at_least(name, getattr(self, name), 1)
        for name in ("steps", "validate_every", "patience", "threads", "classes"):
            if getattr(self, name) is not None:
                _at_least(name, getattr(self, name), 1)
        if type(self.seed) is not int or not 0 <= self.seed < SEEDS:
            raise BadRequest(f"seed (={self.seed!r}) must be a whole number in 0:{SEEDS}")
        for name in ("scale", "grey", "noise", "w0", "clip", "weight_decay"):
            _between(name, getattr(self, name), 0, math.inf)
        for name in ("dropout", "average", "warmup"):
            _between(name, getattr(self, name), 0, 1, last=False)
        if self.elastic is not None:
            _between("elastic", self.elastic, 0, math.inf)
        for name in ("lr", "minutes", "sigma"):
            if getattr(self, name) is not None:
                _between(name, getattr(self, name), 0, math.inf, first=False)
        if self.steps is None and self.minutes is None:
            raise BadRequest(
                "steps (=None) and minutes (=None): a training needs one; give --steps"
            )
        if (self.target == "values") != (self.loss_name in ("l1", "l2")):
            raise BadRequest(
                f"loss (={self.loss}) does not fit target (={self.target}): values need l1 or l2,"
                " classes cross-entropy, dice or both"
            )
        for_classes = ("classes", "balance", "class_weights", "weight_map")
        if self.target == "values" and (named := [n for n in for_classes if getattr(self, n)]):
            raise BadRequest(f"target (=values) has no classes: leave out {', '.join(named)}")

    @property
    def loss_name(self) -> str:
        """The loss that is taken."""
        return self.loss or ("l2" if self.target == "values" else "cross-entropy")

    @property
    def highest_lr(self) -> float:
        """The highest learning rate."""
        return self.lr or {"adamw": 1e-3, "sgd": 1e-2}[self.optimizer]

    def displacement(self, patch: Shape) -> float:
        """Return the standard deviation of random displacements for a patch of this size.

        >>> round(Recipe(steps=1).displacement((388, 388)), 3), Recipe(steps=1, elastic=4).elastic
        (10.0, 4)
        """
        moved = patch[-2:] if self.in_plane else patch
        return min(moved) * 10 / 388 if self.elastic is None else self.elastic

    def asdict(self) -> dict[str, object]:
        """Return the recipe as JSON has it: tuples are lists."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}


def _plain(value: object) -> object:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    return value


def _at_least(name: str, value: object, least: int) -> None:
    if type(value) is not int or value < least:
        raise BadRequest(f"{name} (={value!r}) must be a whole number of at least {least}")


def _between(
    name: str, value: object, low: float, high: float, *, first: bool = True, last: bool = True
) -> None:
    fits = isinstance(value, int | float) and math.isfinite(value) and low <= value <= high
    if not fits or (value == low and not first) or (value == high and not last):
        span = f"above {low:g}" if not first else f"at least {low:g}"
        raise BadRequest(
            f"{name} (={value!r}) must be a number {span}"
            f"{f' and below {high:g}' * (high < math.inf)}"
        )
