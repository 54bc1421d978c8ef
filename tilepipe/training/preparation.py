"""What a training makes of its volumes before the first step: counts, grey values, patches."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Blocks, Shape
from tilepipe.instances.components import label_components
from tilepipe.text import comma
from tilepipe.training.augment import NONE, Augmentation
from tilepipe.training.patches import Frame, Learning, Patches
from tilepipe.training.sampler import Census, ClassReader
from tilepipe.training.targets import balance_weights, class_count
from tilepipe.volumes.normalize import Normalization, parse, resolve, restore
from tilepipe.volumes.volume import Volume, open_volume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tilepipe.training.dataset import Dataset, TrainingVolume
    from tilepipe.training.recipe import Recipe

    Scan = Callable[[str, int, int], None]
    """Called with what is being read, how much of it, and of how much."""


def class_reader(recipe: Recipe, axes: int) -> ClassReader:
    """Return how labels become classes for a network of so many axes."""
    return ClassReader(recipe.target, recipe.ignore, recipe.in_plane, axes)


def count_classes(
    dataset: Dataset,
    recipe: Recipe,
    axes: int,
    *,
    table: Path | None = None,
    scanned: Scan | None = None,
) -> Census:
    """Read all labels of the training regions once, through the cache, and count their classes.

    ``table`` holds the counts of an earlier run of the same training; they are not read again.
    """
    classes = class_count(recipe.target)
    most = None if classes is None else max(classes, 2)
    if recipe.target == "classes" and recipe.classes is not None:
        most = max(recipe.classes, 2)
    block = max(_block_bytes(volume) for volume in dataset.volumes)
    census = Census(
        dataset.volumes,
        class_reader(recipe, axes),
        balance=recipe.balance,
        cached=max(1, recipe.cache // (4 * block)),
        seed=recipe.seed,
    )
    if table is not None and table.is_file():
        census.take(np.load(table, allow_pickle=False))
    else:
        most = 1 if recipe.target == "values" else most
        census.count(classes=most, progress=_named(scanned, "labels"))
    return census


def _named(scanned: Scan | None, what: str) -> Callable[[int, int], None] | None:
    return None if scanned is None else partial(scanned, what)


def _block_bytes(volume: TrainingVolume) -> int:
    """Return the bytes of the image and of the labels, with objects, in a block of the census."""
    image, labels = volume.image.volume, volume.labels.volume
    each = image.dtype.itemsize * image.channels + 2 * labels.dtype.itemsize * labels.channels
    voxels = (Blocks.of(image.shape, image.chunks, region)[0].size for region in volume.regions)
    return each * max(voxels)


def make_patches(
    dataset: Dataset,
    census: Census,
    recipe: Recipe,
    frame: Frame,
    *,
    folder: Path,
    scanned: Scan | None = None,
) -> Patches:
    """Return the samples of a training; what they need beside the volumes goes to ``folder``."""
    axes, volumes = len(frame.answer), []
    for number, volume in enumerate(dataset.volumes):
        objects = None
        if recipe.weight_map and recipe.target in ("classes", "mask"):
            path = folder / f"objects-{number}.zarr"
            objects = dataset.cache.open(_objects(volume.labels.volume, recipe, axes, path))
        path = folder / f"grey-{number}.json"
        normalization = _normalization(volume.image.volume, recipe, path, scanned)
        volumes.append(replace(volume, objects=objects, normalization=normalization))
    learning = Learning(
        target=recipe.target,
        ignore=recipe.ignore,
        in_plane=recipe.in_plane,
        class_weights=tuple(balance_weights(census.counts)) if recipe.class_weights else None,
        w0=recipe.w0 if recipe.weight_map else None,
        sigma=recipe.sigma,
        augmentation=augmentation(recipe, frame.answer),
    )
    return Patches(volumes, census, frame=frame, learning=learning, seed=recipe.seed)


def _normalization(
    image: Volume, recipe: Recipe, path: Path, scanned: Scan | None
) -> Normalization:
    """Return the normalization of an image, which is read for it once in a training."""
    if path.is_file():
        return restore(json.loads(path.read_text()))
    normalization = resolve(parse(recipe.normalize), image, _named(scanned, "grey values"))
    path.write_text(json.dumps(asdict(normalization)))
    return normalization


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


def _objects(labels: Volume, recipe: Recipe, axes: int, path: Path) -> Volume:
    """Return the numbered objects of a mask, each plane's for itself where the network is flat."""
    if not path.exists():
        unfinished = path.with_suffix(".partial")
        label_components(
            labels,
            unfinished,
            foreground=lambda voxels: (voxels[0] != 0) & (voxels[0] != recipe.ignore),
            per_plane=axes == 2 and "z" in labels.axes,
        )
        unfinished.rename(path)
    return open_volume(path)


def default_patch(recipe: Recipe, axes: int) -> Shape:
    """Return the voxels that the loss sees at least."""
    if recipe.patch is None:
        return (256,) * 2 if axes == 2 else (48,) * 3
    if len(recipe.patch) != axes or min(recipe.patch) < 1:
        raise BadRequest(
            f"patch (={comma(recipe.patch)}) must have {axes} sizes of at least 1, as the network"
        )
    return recipe.patch
