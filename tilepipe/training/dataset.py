"""What a training learns from and what is held out, opened and checked."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import zarr

from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks, Region, Shape, outside, parse_region
from tilepipe.instances.components import label_components
from tilepipe.text import comma
from tilepipe.training.augment import NONE, Augmentation
from tilepipe.training.patches import Frame, Learning, Pair, Patches
from tilepipe.training.sampler import Census, Kind, Labels
from tilepipe.training.targets import balance_weights, class_count
from tilepipe.volumes.normalize import Normalization, parse, resolve, restore
from tilepipe.volumes.source import series_for, source_notices
from tilepipe.volumes.volume import Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from tilepipe.training.recipe import Recipe
    from tilepipe.volumes.cache import ChunkCache

    Scan = Callable[[str, int, int], None]
    """Told what is being read, how much of it, and of how much."""

log = logging.getLogger(__name__)

HELD_OUT = 2**25
"""Voxels that are held out at most where nobody says which: each validation segments them."""
NOTHING = "none"
"""The validation region that holds nothing out."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """An image that is segmented to see how far the training is, and its labels."""

    source: str
    axes: str | None
    level: int
    labels: Volume
    mask: Volume | None
    region: Region
    """Of the labels; the image has just this size."""
    series: int | None
    channels: tuple[int | str, ...] | None
    normalize: str | None
    """None where grey values are yet to be normalized, as the model does it."""


@dataclass(frozen=True, slots=True)
class Material:
    """Volumes with what is learned from each and what is held out."""

    images: tuple[Volume, ...]
    labels: tuple[Volume, ...]
    masks: tuple[Volume | None, ...]
    """Where one is 0, its labels say nothing."""
    regions: tuple[tuple[Region, ...], ...]
    held_out: tuple[tuple[int, Region], ...]
    """Number of the pair, and the region."""
    apart: tuple[tuple[Volume, Volume], ...]
    """Pairs that are held out whole."""

    @property
    def channels(self) -> int:
        """Channels of the images."""
        return self.images[0].channels

    @property
    def sources(self) -> tuple[str, ...]:
        """Where the volumes lie: images, labels, masks, then those that are held out whole."""
        masks = [mask for mask in self.masks if mask is not None]
        apart = [volume for pair in self.apart for volume in pair]
        return tuple(v.path for v in (*self.images, *self.labels, *masks, *apart))

    @property
    def notices(self) -> tuple[str, ...]:
        """How the volumes were understood, and what they hold beyond what is read."""
        masks = [mask for mask in self.masks if mask is not None]
        apart = [volume for pair in self.apart for volume in pair]
        volumes = (*self.images, *self.labels, *masks, *apart)
        return tuple(f"{v.path}: {said}" for v in volumes for said in source_notices(v))

    @property
    def held_out_voxels(self) -> int:
        """Voxels that are held out."""
        apart = sum(math.prod(image.shape) for image, _ in self.apart)
        return apart + sum(region.size for _, region in self.held_out)


def open_material(
    pairs: Sequence[tuple[str, str]],
    apart: Sequence[tuple[str, str]],
    recipe: Recipe,
    *,
    masks: Sequence[str] = (),
) -> Material:
    """Open pairs of image and labels, and those that are held out whole (``apart``).

    Raises BadRequest for pairs that do not fit one another, and regions that are not theirs.
    """
    if not pairs:
        raise BadRequest("images: a training needs an image and its labels; name both")
    opened = [_open_pair(image, labels, recipe) for image, labels in pairs]
    beside = [_open_pair(image, labels, recipe) for image, labels in apart]
    first = opened[0][0]
    for image, _ in opened + beside:
        if (image.channels, len(image.axes)) != (first.channels, len(first.axes)):
            raise BadRequest(
                f"image (={image.path}) has {image.channels} channels and axes {image.axes};"
                f" {first.path} has {first.channels} and {first.axes}: train on alike volumes"
            )
    regions, held_out = [], []
    for number, (image, _) in enumerate(opened):
        held = _held_out(image, recipe, bool(apart))
        asked = [
            parse_region(text, image.shape, name="train_region") for text in recipe.train_region
        ]
        learned: list[Region] = []
        for box in asked or [Region.whole(image.shape)]:
            fresh = [box]
            for hole in (*held, *learned):  # each voxel once
                fresh = [part for piece in fresh for part in outside(piece, hole)]
            learned += fresh
        if not learned:
            raise BadRequest(
                f"val_region (={','.join(recipe.val_region)}) leaves nothing of"
                f" {image.path}, {comma(image.shape)}, to learn from; hold out less"
            )
        regions.append(tuple(learned))
        held_out += [(number, region) for region in held]
    return Material(
        tuple(image for image, _ in opened),
        tuple(labels for _, labels in opened),
        tuple(_open_masks(masks, [labels for _, labels in opened], recipe)),
        tuple(regions),
        tuple(held_out),
        tuple(beside),
    )


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
    for path, said in zip(masks, labels, strict=True):
        series = series_for(path, recipe.series)
        mask = open_volume(path, axes=said.requested_axes, level=recipe.level, series=series)
        if mask.shape != said.shape or mask.channels != 1:
            raise BadRequest(
                f"mask (={path}) of {comma(mask.shape)} voxels must have the labels'"
                f" {comma(said.shape)} ({said.path}), and one channel"
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


def hold_out(material: Material, patches: Patches, folder: Path, *, resumed: bool) -> list[HeldOut]:
    """Copy the held-out regions of the images into ``folder``, to be segmented as any volume.

    Their grey values are normalized as those of the whole image they are cut from.
    """
    found = []
    for number, (index, region) in enumerate(material.held_out):
        image, place = material.images[index], folder / f"held-out-{number}.zarr"
        if not (resumed and place.exists()):
            _copy(image, region, patches.pairs[index].normalization, place)
        labels, mask = material.labels[index], material.masks[index]
        found.append(HeldOut(str(place), None, 0, labels, mask, region, None, None, "none"))
    for image, labels in material.apart:
        found.append(
            HeldOut(
                image.path,
                image.requested_axes,
                image.level,
                labels,
                None,
                Region.whole(image.shape),
                image.series,
                image.requested_channels,
                None,
            )
        )
    return found


def _copy(image: Volume, region: Region, normalization: Normalization, place: Path) -> None:
    """Write a region of an image as a Zarr array of normalized grey values, block by block."""
    array = zarr.create_array(
        store=str(place),
        shape=(image.channels, *region.shape),
        chunks=(1, *(min(a, b) for a, b in zip(image.chunks, region.shape, strict=True))),
        dtype=np.float32,
        dimension_names=("c", *image.axes),
        overwrite=True,
    )
    for block in Blocks.of(image.shape, image.chunks, region):
        inside = (slice(None), *block.within(region.start))
        array[inside] = normalization.apply(image.read(block))


def kind_of(recipe: Recipe, axes: int) -> Kind:
    """Return how labels become classes for a network of so many axes."""
    return Kind(recipe.target, recipe.ignore, recipe.in_plane, axes)


def count(
    material: Material,
    recipe: Recipe,
    axes: int,
    cache: ChunkCache,
    *,
    table: Path | None = None,
    scanned: Scan | None = None,
) -> Census:
    """Read all labels of the training regions once, through the cache, and count their classes.

    ``table`` holds the counts of an earlier run of the same training; they are not read again.
    """
    wanted = class_count(recipe.target)
    most = None if wanted is None else max(wanted, 2)
    if recipe.target == "classes" and recipe.classes is not None:
        most = max(recipe.classes, 2)
    block = max(
        Blocks.of(image.shape, image.chunks, region)[0].size * _bytes_per_voxel(image, labels)
        for image, labels, regions in zip(
            material.images, material.labels, material.regions, strict=True
        )
        for region in regions
    )
    census = Census(
        [
            Labels(
                cache.open(labels),
                None if mask is None else cache.open(mask),
                image.chunks,
                regions,
            )
            for image, labels, mask, regions in zip(
                material.images, material.labels, material.masks, material.regions, strict=True
            )
        ],
        kind_of(recipe, axes),
        balance=recipe.balance,
        kept=max(1, recipe.cache // (4 * block)),
        seed=recipe.seed,
    )
    if table is not None and table.is_file():
        census.take(np.load(table, allow_pickle=False))
    else:
        classes = 1 if recipe.target == "values" else most
        census.count(classes=classes, progress=_named(scanned, "labels"))
    return census


def _named(scanned: Scan | None, what: str) -> Callable[[int, int], None] | None:
    return None if scanned is None else partial(scanned, what)


def _bytes_per_voxel(image: Volume, labels: Volume) -> int:
    return image.dtype.itemsize * image.channels + 2 * labels.dtype.itemsize * labels.channels


def make_patches(
    material: Material,
    census: Census,
    recipe: Recipe,
    frame: Frame,
    *,
    folder: Path,
    cache: ChunkCache,
    scanned: Scan | None = None,
) -> Patches:
    """Return the samples of a training; what they need beside the volumes goes to ``folder``."""
    axes, pairs = len(frame.answer), []
    for number, (image, labels, said) in enumerate(
        zip(material.images, material.labels, census.labels, strict=True)
    ):
        objects = None
        if recipe.weight_map and recipe.target in ("classes", "mask"):
            objects = cache.open(_objects(labels, recipe, axes, folder / f"objects-{number}.zarr"))
        pairs.append(
            Pair(
                cache.open(image),
                said.volume,
                said.mask,
                objects,
                _normalization(image, recipe, folder / f"grey-{number}.json", scanned),
                material.regions[number],
            )
        )
    learning = Learning(
        target=recipe.target,
        ignore=recipe.ignore,
        in_plane=recipe.in_plane,
        class_weights=tuple(balance_weights(census.counts)) if recipe.class_weights else None,
        w0=recipe.w0 if recipe.weight_map else None,
        sigma=recipe.sigma,
        augmentation=augmentation(recipe, frame.answer),
    )
    return Patches(pairs, census, frame=frame, learning=learning, seed=recipe.seed)


def _normalization(
    image: Volume, recipe: Recipe, place: Path, scanned: Scan | None
) -> Normalization:
    """Return the normalization of an image, which is read for it once in a training."""
    if place.is_file():
        return restore(json.loads(place.read_text()))
    found = resolve(parse(recipe.normalize), image, _named(scanned, "grey values"))
    place.write_text(json.dumps(asdict(found)))
    return found


def augmentation(recipe: Recipe, patch: Shape) -> Augmentation:
    """Return the changes that patches undergo."""
    if not recipe.augment:
        return NONE
    return Augmentation(
        flip=recipe.flip,
        rotate=recipe.rotate,
        scale=recipe.scale,
        elastic=recipe.displacement(patch),
        contrast=recipe.grey,
        brightness=recipe.grey,
        gamma=recipe.grey,
        noise=recipe.noise,
        in_plane=recipe.in_plane,
    )


def _objects(labels: Volume, recipe: Recipe, axes: int, place: Path) -> Volume:
    """Return the numbered objects of a mask, each plane's for itself where the network is flat."""
    if not place.exists():
        unfinished = place.with_suffix(".partial")
        label_components(
            labels,
            unfinished,
            foreground=lambda voxels: (voxels[0] != 0) & (voxels[0] != recipe.ignore),
            per_plane=axes == 2 and "z" in labels.axes,
        )
        unfinished.rename(place)
    return open_volume(place)


def default_patch(recipe: Recipe, axes: int) -> Shape:
    """Return the voxels that the loss sees at least."""
    if recipe.patch is None:
        return (256,) * 2 if axes == 2 else (48,) * 3
    if len(recipe.patch) != axes or min(recipe.patch) < 1:
        raise BadRequest(
            f"patch (={comma(recipe.patch)}) must have {axes} sizes of at least 1, as the network"
        )
    return recipe.patch
