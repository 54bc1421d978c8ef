"""All that a training decides before its first step: network, patches, what is held out."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch

from tilepipe import __version__
from tilepipe.errors import BadRequest
from tilepipe.host import limits
from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.factory import build_network
from tilepipe.models.model import wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import UNet
from tilepipe.options import Options
from tilepipe.training.patches import frame as frame_of
from tilepipe.training.preparation import class_reader, count_classes, default_patch, make_patches
from tilepipe.training.targets import class_count, class_names
from tilepipe.training.validate import hold_out, validate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from tilepipe.models.spec import Profile
    from tilepipe.training.dataset import Dataset
    from tilepipe.training.patches import Frame, Patches
    from tilepipe.training.preparation import Scan
    from tilepipe.training.recipe import Recipe
    from tilepipe.training.sampler import ClassReader
    from tilepipe.training.validate import HeldOut, Score
    from tilepipe.volumes.cache import ChunkCache


@dataclass(frozen=True, slots=True)
class Experiment:
    """All that was decided before the first step: what is learned, from what, how it is judged."""

    recipe: Recipe
    folder: Path
    network: nn.Module
    """The network with the weights that it begins with, on the CPU."""
    architecture: Mapping[str, object]
    """What a checkpoint says to build the network again."""
    profile: Profile
    frame: Frame
    labels: tuple[str, ...]
    """The name of each channel of the answer."""
    counts: tuple[int, ...]
    """Voxels of each class in the training regions."""
    patches: Patches
    cache: ChunkCache
    reader: ClassReader
    held_out: tuple[HeldOut, ...]
    held_out_voxels: int
    sources: tuple[str, ...]
    notices: tuple[str, ...]
    """How the volumes were understood, and what they hold beyond what is read."""

    def save(self, path: Path, network: nn.Module, measured: Mapping[str, object]) -> None:
        """Write a checkpoint with what it was made from; whole or not at all."""
        context = self.profile.context
        save_checkpoint(
            path,
            network,
            architecture=self.architecture,
            normalize=self.recipe.normalize,
            labels=self.labels,
            provenance={
                "made_by": f"tilepipe {__version__} train",
                "versions": {name: version(name) for name in ("torch", "numpy", "scipy", "zarr")},
                "sources": [Path(source).name for source in self.sources],
                "recipe": self.recipe.asdict(),
                **measured,
            },
            context={
                "before": list(context.before),
                "after": list(context.after),
                "step": list(context.step),
            },
            answer="values" if self.recipe.target == "values" else "classes",
        )

    def validate(self, checkpoint: Path) -> Score:
        """Segment what is held out with a checkpoint, as `tilepipe segment` does, and score it."""
        recipe = self.recipe
        options = Options(
            device=recipe.device,
            threads=recipe.threads,
            write="values" if recipe.target == "values" else "labels",
            inexact=not self.profile.exact,
            network=recipe.network,
            network_args=recipe.network_args,
        )
        return validate(
            checkpoint,
            self.held_out,
            self.reader,
            folder=self.folder,
            classes=max(len(self.labels), 2),
            options=options,
        )


def prepare(
    dataset: Dataset,
    recipe: Recipe,
    folder: Path,
    *,
    resume: bool,
    first: bool,
    scanned: Scan | None,
) -> Experiment:
    """Count the labels, build the network, and decide the patches.

    What is made for the training goes to ``folder``; of several processes only the first makes it
    (``first``), and a run that resumes takes what is there (``resume``). Raises BadRequest where
    labels, network and recipe do not fit one another.
    """
    image = dataset.volumes[0].image.volume
    axes = recipe.ndim or len(image.axes.removeprefix("t"))
    if not 2 <= axes <= len(image.axes):
        raise BadRequest(f"ndim (={axes}) must be 2, or 3 for a volume; axes are {image.axes}")
    patch = default_patch(recipe, axes)
    if recipe.patience and not dataset.held_out_voxels:
        raise BadRequest(
            f"patience (={recipe.patience}) needs validations; hold something out with --val-region"
        )
    table = folder / "counts.npy"
    earlier = table if resume or not first else None
    census = count_classes(dataset, recipe, axes, table=earlier, scanned=scanned)
    if recipe.target != "values" and sum(n > 0 for n in census.counts) == 1:
        raise BadRequest(
            f"labels hold the class {int(np.argmax(census.counts))} alone, in all voxels to learn"
            " from; name other labels, another --target or --train-region"
        )
    classes = _classes(recipe, dataset, census.counts)
    labels = _names(recipe, classes)
    torch.manual_seed(recipe.seed)
    network, architecture = _build(recipe, axes, dataset.channels, classes)
    wrapped = wrap(network)
    if wrapped.outputs != 1:
        raise BadRequest(
            f"network (={recipe.network}) has {wrapped.outputs} outputs; one can be"
            " trained: wrap it"
        )
    profile = find_profile(wrapped)
    if (profile.axes, profile.channels, profile.classes) != (axes, dataset.channels, classes):
        raise BadRequest(
            f"network (={recipe.network}) reads {profile.channels} channels in {profile.axes}D and"
            f" gives {profile.classes}; {dataset.channels} channels in {axes}D and {classes}"
            f" for target {recipe.target} are needed"
        )
    if profile.meaning.activation and recipe.target != "values":
        raise BadRequest(
            f"network (={recipe.network}) ends in {profile.meaning.activation}, which the loss does"
            " itself; let it give what goes in"
        )
    frame = frame_of(profile, patch)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
        np.save(table, census.table)
    patches = make_patches(dataset, census, recipe, frame, folder=folder, scanned=scanned)
    held_out: list[HeldOut] = []
    if first:
        held_out = hold_out(patches.volumes, dataset.apart, folder, resumed=resume)
    return Experiment(
        recipe=recipe,
        folder=folder,
        network=network,
        architecture=architecture,
        profile=profile,
        frame=frame,
        labels=labels,
        counts=tuple(census.counts),
        patches=patches,
        cache=dataset.cache,
        reader=class_reader(recipe, axes),
        held_out=tuple(held_out),
        held_out_voxels=dataset.held_out_voxels,
        sources=dataset.sources,
        notices=dataset.notices,
    )


def _names(recipe: Recipe, classes: int) -> tuple[str, ...]:
    """Return what the channels of the answer are called."""
    if recipe.names is None:
        return tuple(class_names(recipe.target, classes))
    if len(recipe.names) != classes:
        raise BadRequest(
            f"names (={','.join(recipe.names)}) must be {classes}, one for each channel of the"
            " answer"
        )
    return tuple(recipe.names)


def _classes(recipe: Recipe, dataset: Dataset, counts: list[int]) -> int:
    """Return the channels of the answer."""
    if recipe.target == "values":
        return dataset.volumes[0].labels.channels
    needed = class_count(recipe.target) or len(counts)
    if recipe.classes is None:
        return needed
    if recipe.classes != needed and not (
        recipe.target == "classes" or recipe.classes == needed - 1 == 1
    ):
        raise BadRequest(
            f"classes (={recipe.classes}) must be {needed} for target {recipe.target}"
            + " or 1, for one sigmoid channel" * (needed == 2)
        )
    if recipe.classes == 1 and len(counts) > 2:
        raise BadRequest(f"classes (=1) must be {len(counts)}: so many do the labels hold")
    return recipe.classes


def _build(
    recipe: Recipe, axes: int, channels: int, classes: int
) -> tuple[nn.Module, dict[str, object]]:
    """Return the network with its first weights, and what a checkpoint says to build it again."""
    if recipe.network is not None:
        arguments = dict(recipe.network_args or {})
        named = {"name": "network", "network": recipe.network, "arguments": arguments}
        return build_network(recipe.network, arguments), cast("dict[str, object]", named)
    architecture: dict[str, object] = {
        "ndim": axes,
        "in_channels": channels,
        "classes": classes,
        "base": recipe.base,
        "depth": recipe.depth,
        "padding": recipe.padding,
        "batch_norm": recipe.batch_norm,
        "attention": recipe.attention,
        "residual": recipe.residual,
        "dropout": recipe.dropout,
        "kernels": _listed(recipe.kernels),
        "pools": _listed(recipe.pools),
    }
    return UNet(**architecture), {"name": "unet", **architecture}  # type: ignore[arg-type]


def _listed(sizes: object) -> object:
    if isinstance(sizes, tuple | list):
        return [_listed(size) for size in sizes]
    return sizes


def cores(recipe: Recipe) -> int:
    """Return the threads that compute on a CPU."""
    return recipe.threads or limits.cores()
