"""What is applied to a network's output for labels and probabilities, and by whom.

The network's graph says what its values mean, else the user, else the values themselves are looked
at before any tile: logits that all lie in 0 to 1 are refused, for they are hardly logits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.models.predictor import label_type
from tilepipe.text import counted
from tilepipe.volumes.borders import read_mirrored
from tilepipe.volumes.normalize import Normalization, parse, resolve

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.options import Options
    from tilepipe.volumes.normalize import NormalizationRule
    from tilepipe.volumes.volume import Volume

log = logging.getLogger(__name__)

PLACES = (0.5, 0.25, 0.75)
"""Where in the volume it is looked at, as shares of each axis."""
ANSWERED = 24
"""Voxels per axis that a trial answers for at least, where the network's sizes allow it."""
STRENGTHS = (1.0, 30.0, 1000.0)
"""Standard deviations of noise: what has no bounds of its own leaves 0 to 1 with one of them."""
WIDE = 0.8
"""Share of 0 to 1 that values of the volume span which are taken for probabilities."""
ROUNDING = 1e-5
"""By how much a probability may lie outside 0 to 1."""


@dataclass(frozen=True, slots=True)
class Activation:
    """What makes probabilities of the network's values."""

    name: str = ""
    """``sigmoid`` or ``softmax``; empty where there is none."""
    by: str = ""
    """``network`` or ``tilepipe``; empty where there is none."""
    apart: bool = False
    """Whether each of several channels is a probability of its own: labels are a mask for each."""

    def __str__(self) -> str:
        if not self.name:
            return "none"
        return f"{self.name}: by {'the network' if self.by == 'network' else 'tilepipe'}"


@dataclass(frozen=True, slots=True)
class Answer:
    """What is written for each voxel."""

    channels: int
    """Values per voxel."""
    dtype: str
    stacked: bool
    """Whether there is a channel axis; labels have none, but for classes that overlap."""

    @property
    def itemsize(self) -> int:
        """Bytes of one value."""
        return {"uint8": 1, "uint16": 2}.get(self.dtype, 4)


def find_activation(
    model: Model,
    profile: Profile,
    volume: Volume,
    options: Options,
    *,
    earlier: Mapping[str, object] | None,
) -> Activation:
    """Return which activation is applied, and whether the network or tilepipe applies it.

    A run that goes on is not tried again: ``earlier`` is what its `Plan.identity` says of the
    activation. Raises `BadRequest` where the network does not give what ``options`` ask for.
    """
    meaning, choice, several = profile.meaning, options.activation, profile.classes > 1
    if options.write == "logits" and meaning.activation:
        raise BadRequest(
            f"write (=logits) needs a network that ends before its {meaning.activation};"
            f" {model.path} gives probabilities: ask for those"
        )
    if options.write in ("logits", "values"):
        return Activation()
    if choice == "softmax" and not several:
        raise BadRequest(
            f"activation (=softmax) needs several channels; {model.path} gives 1, which would be"
            " 1 everywhere: use sigmoid"
        )
    if choice in ("sigmoid", "softmax"):
        activation = Activation(choice, "tilepipe", several and choice == "sigmoid")
    elif meaning.activation:
        activation = Activation(meaning.activation, "network", several and meaning.apart)
    elif choice == "none":
        apart = several and (
            bool(earlier["apart"])
            if earlier is not None
            else _overlap(model, profile, volume, options)
        )
        activation = Activation(apart=apart)
    else:
        if earlier is None and model.kind != "checkpoint":  # which says what it was trained for
            _check_values(model, profile, volume, options)
        activation = Activation("softmax" if several else "sigmoid", "tilepipe")
    if options.threshold is not None and several and not activation.apart:
        raise BadRequest(
            f"threshold (={options.threshold}) is for networks of one output channel, or of"
            f" classes that overlap; {model.path} has {profile.classes}, whose largest decides:"
            " leave it out, or use --activation sigmoid"
        )
    return activation


def find_answer(profile: Profile, options: Options, activation: Activation) -> Answer:
    """Return what is written: labels, a mask for each channel, or numbers."""
    if options.write != "labels":
        return Answer(profile.classes, "float32", stacked=True)
    if activation.apart:
        return Answer(profile.classes, "uint8", stacked=True)
    return Answer(1, str(label_type(profile.classes)).removeprefix("torch."), stacked=False)


def _overlap(model: Model, profile: Profile, volume: Volume, options: Options) -> bool:
    """Whether probabilities of several channels do not add up to 1, on the volume and on noise."""
    values = [*_of_volume(model, profile, volume, options), *_of_noise(model, profile)]
    return bool(values) and not all(map(_adds_up, values))


def _check_values(model: Model, profile: Profile, volume: Volume, options: Options) -> None:
    """Refuse a network whose logits are none: on the volume they all lie in 0 to 1.

    Logits may do so by chance, of weights that are small. So they must fill much of 0 to 1, or not
    leave it for noise that is a thousand times stronger than what networks are used to, and yet
    vary with it. A volume that is empty where it is looked at says nothing. Of labels
    of several channels the largest decides, with a softmax and without one: they are refused only
    where the channels do not add up to 1, so that classes may overlap.
    """
    meaning, several = profile.meaning, profile.classes > 1
    if meaning.strange:
        raise BadRequest(
            f"model (={model.path}) gives {meaning.strange}, which are neither logits nor"
            " probabilities as far as its graph says; use --write values, or say which they are"
            " with --activation"
        )
    largest = several and options.write == "labels"
    if largest and meaning.weighted:
        return  # a convolution, say, that has no bounds
    on_volume = list(_of_volume(model, profile, volume, options))
    if not all(map(_within, on_volume)):
        return
    spread = float(max(map(np.max, on_volume)) - min(map(np.min, on_volume))) if on_volume else 0.0
    if largest or spread < WIDE:
        noise = list(_of_noise(model, profile))
        if not noise or not all(map(_within, noise)) or np.ptp(noise[-1]) < ROUNDING:
            return  # or it is constant, as what lies behind layers that let nothing through
        if largest and all(map(_adds_up, (*on_volume, *noise))):
            return
    choice = "sigmoid or softmax" if several else "sigmoid"
    raise BadRequest(
        f"model (={model.path}) gives values that all lie in 0 to 1, as probabilities do and"
        " logits do not, and its graph does not say which they are: say it with --activation none"
        f" (probabilities) or --activation {choice} (logits)"
    )


def _within(values: NDArray[np.float32]) -> bool:
    return bool(values.min() >= -ROUNDING and values.max() <= 1 + ROUNDING)


def _adds_up(values: NDArray[np.float32]) -> bool:
    return bool(np.abs(values.sum(axis=0) - 1).max() < 0.01)


def _size(profile: Profile) -> tuple[int, ...]:
    """Return the spatial shape that the network is tried with."""
    return tuple(
        profile.accepted(axis, max(profile.smallest[axis], shrink + ANSWERED))
        for axis, shrink in enumerate(profile.shrink)
    )


def _of_volume(
    model: Model, profile: Profile, volume: Volume, options: Options
) -> Iterator[NDArray[np.float32]]:
    """Yield what the network gives at some places of the volume that are not all alike.

    Grey values are normalised as the whole volume's are where that is known without reading it,
    else by what is read here.
    """
    leading = len(volume.shape) - profile.axes
    size = (1,) * leading + _size(profile)
    images = []
    for place in PLACES:
        start = tuple(
            max(0, int(n * place) - edge // 2) for n, edge in zip(volume.shape, size, strict=True)
        )
        try:
            image = read_mirrored(volume, Region.whole(size).shift(start))
        except OSError as error:
            log.info("the network is not tried there: %s", error)
            continue
        grey = np.nan_to_num(image.astype(np.float64), posinf=0.0, neginf=0.0)
        if grey.max() > grey.min():
            images.append(grey)
    if not images:
        return
    rule = parse(options.normalize or model.normalize or "none")
    normalization = (
        _normalization(rule, np.stack(images)) if rule.needs_pass else resolve(rule, volume)
    )
    for grey in images:
        image = normalization.apply(grey)
        yield from _run(model, image.reshape(image.shape[0], *image.shape[1 + leading :]))


def _normalization(rule: NormalizationRule, images: NDArray[np.float64]) -> Normalization:
    """Return a normalization by some images, shape (images, channels, ...)."""
    values = np.moveaxis(images, 1, 0).reshape(images.shape[1], -1)
    if rule.kind == "zscore":
        center, spread = values.mean(axis=1), values.std(axis=1)
    else:
        low, high = np.percentile(values, (rule.first, rule.second), axis=1)
        center, spread = low, high - low
    spread = np.where(spread > 0, spread, 1)
    return Normalization(tuple(center.tolist()), tuple((1 / spread).tolist()))


def _of_noise(model: Model, profile: Profile) -> Iterator[NDArray[np.float32]]:
    """Yield what the network gives for noise of all strengths, always the same."""
    random = np.random.default_rng(0)
    for strength in STRENGTHS:
        noise = random.normal(scale=strength, size=(model.channels, *_size(profile)))
        yield from _run(model, noise.astype(np.float32))


def _run(model: Model, image: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Yield what the network gives for an image, shape (channels, voxels); none where it is NaN."""
    try:
        with torch.inference_mode():
            values = model.module(torch.from_numpy(image)[None].to(model.dtype))[0].float().numpy()
    except RuntimeError as error:  # also of operations that the CPU does not have
        what = f"{counted(image[0].size, 'voxel')} on the CPU"
        log.warning("what the network gives could not be looked at (%s): %s", what, error)
        return
    values = values.reshape(values.shape[0], -1)
    values = values[:, np.isfinite(values).all(axis=0)]
    if values.size:
        yield values
