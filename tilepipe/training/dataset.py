"""The volumes that a training learns from and those that are held out, opened and checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, outside, parse_region
from tilepipe.text import comma
from tilepipe.volumes.cache import CachedVolume, ChunkCache
from tilepipe.volumes.source import series_for, source_notices
from tilepipe.volumes.volume import Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tilepipe.training.recipe import Recipe
    from tilepipe.volumes.normalize import Normalization

HELD_OUT = 2**25
"""Voxels that are held out at most where nobody says which: each validation segments them."""
NOTHING = "none"
"""The validation region that holds nothing out."""


@dataclass(frozen=True, slots=True)
class TrainingVolume:
    """An image and its labels, read through a cache, and which of their voxels are learned."""

    image: CachedVolume
    labels: CachedVolume
    mask: CachedVolume | None
    """A volume that is 0 where the labels say nothing; None where they do everywhere."""
    regions: tuple[Region, ...]
    """What is learned from, each voxel once; nothing of a volume that is held out whole."""
    held_out: tuple[Region, ...]
    """What the network is judged by."""
    objects: CachedVolume | None = None
    """Numbered objects for the weights between them; None where the labels number them."""
    normalization: Normalization | None = None
    """How grey values become the network's; None until they have been read for it."""

    def normalized(self, voxels: NDArray[np.generic]) -> NDArray[np.float32]:
        """Return voxels ``(channels, ...)`` of the image as the network is given them."""
        if self.normalization is None:
            raise ValueError(f"normalization of {self.image.volume.path} must be resolved first")
        return self.normalization.apply(voxels)


@dataclass(frozen=True, slots=True)
class Dataset:
    """All volumes of a training."""

    volumes: tuple[TrainingVolume, ...]
    """Volumes that are learned from; parts of them may be held out."""
    apart: tuple[TrainingVolume, ...]
    """Volumes that are held out whole."""
    cache: ChunkCache
    """The decoded chunks of all of them."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.volumes[0].image.channels

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the volumes lie: images, labels, masks, then those that are held out whole."""
        return tuple(volume.path for volume in self._opened())

    @property
    def notices(self) -> tuple[str, ...]:
        """How the volumes were understood, and what they hold beyond what is read."""
        return tuple(
            f"{volume.path}: {notice}"
            for volume in self._opened()
            for notice in source_notices(volume)
        )

    @property
    def held_out_voxels(self) -> int:
        """Voxels that are held out."""
        volumes = (*self.volumes, *self.apart)
        return sum(region.size for volume in volumes for region in volume.held_out)

    def _opened(self) -> list[Volume]:
        opened = [volume.image for volume in self.volumes]
        opened += [volume.labels for volume in self.volumes]
        opened += [volume.mask for volume in self.volumes if volume.mask is not None]
        opened += [part for volume in self.apart for part in (volume.image, volume.labels)]
        return [cached.volume for cached in opened]


def open_dataset(
    pairs: Sequence[tuple[str, str]],
    apart: Sequence[tuple[str, str]],
    recipe: Recipe,
    *,
    masks: Sequence[str] = (),
) -> Dataset:
    """Open pairs of image and labels, and those that are held out whole (``apart``).

    Raises BadRequest for pairs that do not fit one another, and regions that are not theirs.
    """
    if not pairs:
        raise BadRequest("images: a training needs an image and its labels; name both")
    opened = [_open_pair(image, labels, recipe) for image, labels in pairs]
    opened_apart = [_open_pair(image, labels, recipe) for image, labels in apart]
    first = opened[0][0]
    for image, _ in opened + opened_apart:
        if (image.channels, len(image.axes)) != (first.channels, len(first.axes)):
            raise BadRequest(
                f"image (={image.path}) has {image.channels} channels and axes {image.axes};"
                f" {first.path} has {first.channels} and {first.axes}: train on alike volumes"
            )
    regions = [_regions(image, recipe, bool(apart)) for image, _ in opened]
    opened_masks = _open_masks(masks, [labels for _, labels in opened], recipe)
    cache = ChunkCache(recipe.cache)
    return Dataset(
        tuple(
            TrainingVolume(
                cache.open(image),
                cache.open(labels),
                None if mask is None else cache.open(mask),
                learned,
                held_out,
            )
            for (image, labels), mask, (learned, held_out) in zip(
                opened, opened_masks, regions, strict=True
            )
        ),
        tuple(
            TrainingVolume(
                cache.open(image), cache.open(labels), None, (), (Region.whole(image.shape),)
            )
            for image, labels in opened_apart
        ),
        cache,
    )


def _regions(
    image: Volume, recipe: Recipe, apart: bool
) -> tuple[tuple[Region, ...], tuple[Region, ...]]:
    """Return the regions of a volume that are learned from, and those that are held out."""
    held_out = _held_out(image, recipe, apart)
    boxes = [parse_region(text, image.shape, name="train_region") for text in recipe.train_region]
    learned: list[Region] = []
    for box in boxes or [Region.whole(image.shape)]:
        parts = [box]
        for hole in (*held_out, *learned):  # each voxel once
            parts = [rest for part in parts for rest in outside(part, hole)]
        learned += parts
    if not learned:
        raise BadRequest(
            f"val_region (={','.join(recipe.val_region)}) leaves nothing of"
            f" {image.path}, {comma(image.shape)}, to learn from; hold out less"
        )
    return tuple(learned), tuple(held_out)


def _open_pair(image_path: str, labels_path: str, recipe: Recipe) -> tuple[Volume, Volume]:
    image = open_volume(
        image_path,
        axes=recipe.axes,
        level=recipe.level,
        series=recipe.series,
        channels=recipe.channels,
    )
    plain = recipe.axes and recipe.axes.replace("c", "")
    values = recipe.target == "values"
    labels = open_volume(
        labels_path,
        axes=None if values else plain,
        level=recipe.level,
        series=series_for(labels_path, recipe.series),
    )
    if labels.shape != image.shape:
        raise BadRequest(
            f"labels (={labels_path}) of {comma(labels.shape)} voxels must have the image's"
            f" {comma(image.shape)} ({image_path})"
        )
    if labels.axes != image.axes and not (labels.axes_assumed or image.axes_assumed):
        raise BadRequest(
            f"labels (={labels_path}) with axes {labels.axes} must have the image's, {image.axes}"
            f" ({image_path}); say with --axes what both have"
        )
    if not values and labels.channels != 1:
        raise BadRequest(f"labels (={labels_path}) have {labels.channels} channels; give one")
    if not values and labels.dtype.kind == "f":
        raise BadRequest(
            f"labels (={labels_path}) of type {labels.dtype} must be integers; convert them,"
            " or learn --target values"
        )
    return image, labels


def _open_masks(
    masks: Sequence[str], labels: Sequence[Volume], recipe: Recipe
) -> list[Volume | None]:
    if not masks:
        return [None] * len(labels)
    if len(masks) != len(labels):
        raise BadRequest(
            f"mask (={', '.join(masks)}) must be given for each of the {len(labels)} pairs of image"
            " and labels, in their order"
        )
    opened: list[Volume | None] = []
    for path, truth in zip(masks, labels, strict=True):
        series = series_for(path, recipe.series)
        mask = open_volume(path, axes=truth.requested_axes, level=recipe.level, series=series)
        if mask.shape != truth.shape or mask.channels != 1:
            raise BadRequest(
                f"mask (={path}) of {comma(mask.shape)} voxels must have the labels'"
                f" {comma(truth.shape)} ({truth.path}), and one channel"
            )
        opened.append(mask)
    return opened


def _held_out(image: Volume, recipe: Recipe, apart: bool) -> list[Region]:
    """Return the regions of a volume that are held out."""
    if recipe.val_region == (NOTHING,) or (apart and not recipe.val_region):
        return []
    if recipe.val_region:
        return [parse_region(text, image.shape, name="val_region") for text in recipe.val_region]
    axis = int(np.argmax(np.asarray(image.shape) >= 8))
    length = image.shape[axis]
    first = length - max(1, length // 8)
    if first == 0:
        raise BadRequest(f"image (={image.path}) is too small to hold a part out; name one apart")
    held = [length - first if a == axis else n for a, n in enumerate(image.shape)]
    while math.prod(held) > HELD_OUT:
        longest = int(np.argmax(held))
        held[longest] = -(-held[longest] // 2)
    return [Region(tuple(n - m for n, m in zip(image.shape, held, strict=True)), image.shape)]
