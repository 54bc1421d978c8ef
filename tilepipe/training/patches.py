"""Training samples: patches of images with their labels, straight from storage.

Sample ``i`` is a function of the seed and of ``i`` alone: any number of threads, and a training
that goes on, see the same samples. Arrays are ``(channels, *patch)`` in the axes of the network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, Shape, ceil_to, mirror
from tilepipe.training.augment import Augmentation, draw_warp, grey
from tilepipe.training.targets import IGNORE, MARGIN, border_weights, class_map, weights_margin
from tilepipe.volumes.borders import read_mirrored

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from tilepipe.models.spec import Profile
    from tilepipe.training.dataset import TrainingVolume
    from tilepipe.training.sampler import Census
    from tilepipe.volumes.borders import Readable


@dataclass(frozen=True, slots=True)
class Frame:
    """What the network reads and gives for one patch, per axis of the network."""

    answer: Shape
    """Voxels that the loss sees."""
    before: Shape
    """Voxels that the network reads before them."""
    after: Shape
    """Voxels that it reads after them."""
    skip: Shape
    """Voxels that it gives before them, which saw its own padding."""

    @property
    def read(self) -> Region:
        """The input, in coordinates of the answer."""
        return Region.whole(self.answer).grow(self.before, self.after)


def frame(profile: Profile, patch: Shape) -> Frame:
    """Return the frame of a patch of at least ``patch`` voxels, as large as the network's answer.

    A network that pads with zeros reads its context round the patch, and what saw the zeros does
    not count: it learns what `segment` will ask of it.
    """
    answer, before, after, skip = [], [], [], []
    for axis, least in enumerate(patch):
        lead, offset, shrink = profile.lead[axis], profile.offset[axis], profile.shrink[axis]
        padded = lead > offset and not profile.troubles
        beyond = profile.context.after[axis] if padded else shrink - offset
        first = lead if padded else offset
        if padded:  # what `segment` asks of the network ends on its lattice
            least = ceil_to(least, profile.context.step[axis])
        size = profile.accepted(axis, first + least + beyond)
        length = least if padded and not profile.fixed else size - first - beyond
        if length <= 0:
            raise BadRequest(
                f"network reads {size} voxels and nothing else, which must be more than its"
                f" context, {first + beyond}; build it for a larger size, or for any"
            )
        answer.append(length)
        before.append(first)
        after.append(size - first - length)
        skip.append(first - offset)
    return Frame(tuple(answer), tuple(before), tuple(after), tuple(skip))


@dataclass(frozen=True, slots=True)
class Learning:
    """What a patch is made into."""

    target: str
    ignore: int | None
    in_plane: bool
    class_weights: tuple[float, ...] | None
    w0: float | None
    """Weight where objects touch; None: no weights between them."""
    sigma: float
    augmentation: Augmentation


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One patch to learn from."""

    image: NDArray[np.float32]
    """``(channels, *read)``, normalised."""
    truth: NDArray[np.generic]
    """Classes ``(*answer)`` as int64 with `IGNORE`; or values ``(channels, *answer)``."""
    weights: NDArray[np.float32]
    """``(*answer)``; 0 where the truth says nothing."""


class Patches:
    """All samples of a training, by number."""

    def __init__(
        self,
        volumes: Sequence[TrainingVolume],
        census: Census,
        *,
        frame: Frame,
        learning: Learning,
        seed: int,
    ) -> None:
        self.volumes, self.census, self.frame = volumes, census, frame
        self.learning, self.seed = learning, seed

    def __getitem__(self, number: int) -> Sample:
        """Return a sample: where it lies, how it is deformed and its grey values are drawn."""
        rng = np.random.default_rng((self.seed, number))
        index, region, voxel = self.census.draw(number, rng)
        volume, frame, learning = self.volumes[index], self.frame, self.learning
        axes = len(frame.answer)
        start = self._start(voxel[-axes:], region, axes)
        answer = Region.whole(frame.answer)
        margin = MARGIN if learning.w0 is None else weights_margin(learning.sigma)
        seen = answer.grow((margin,) * axes, (margin,) * axes)
        warp = draw_warp(learning.augmentation, rng, _hull(frame.read, seen))
        box = _place(warp.box, start, voxel[:-axes])

        def read(source: Readable) -> NDArray[np.generic]:
            voxels = read_mirrored(source, box)
            return voxels.reshape(voxels.shape[0], *warp.box.shape)

        image = warp.image(_finite(volume.normalized(read(volume.image))), frame.read)
        image = grey(learning.augmentation, rng, image)
        inside = _inside(box, volume.labels.shape, volume.regions).reshape(warp.box.shape)
        if volume.mask is not None:
            inside &= read(volume.mask)[0] != 0
        known = warp.labels(inside, answer).astype(bool)
        if learning.target == "values":
            values = warp.image(read(volume.labels).astype(np.float32), answer)
            values[:, ~known] = np.nan
            return Sample(image, values, known.astype(np.float32))
        labels = _integers(warp.labels(read(volume.labels)[0], seen))
        classes = class_map(
            labels, learning.target, ignore=learning.ignore, in_plane=learning.in_plane
        )
        inner = answer.within(seen.start)
        truth = np.where(known, classes[inner], IGNORE).astype(np.int64)
        weights = self._class_weights(truth)
        if learning.w0 is not None:
            numbered = _integers(warp.labels(read(volume.objects or volume.labels)[0], seen))
            between = border_weights(
                numbered,
                w0=learning.w0,
                sigma=learning.sigma,
                in_plane=learning.in_plane,
                at=_between(classes, learning.target),
                ignore=learning.ignore if volume.objects is None else None,
            )
            weights += between[inner] * (truth != IGNORE)
        return Sample(image, truth, weights)

    def _start(self, voxel: Shape, region: Region, axes: int) -> Shape:
        """Return where the answer begins: round the voxel, inside the region where it fits."""
        return tuple(
            min(max(v - n // 2, a), max(a, b - n))
            for v, n, a, b in zip(
                voxel, self.frame.answer, region.start[-axes:], region.stop[-axes:], strict=True
            )
        )

    def _class_weights(self, truth: NDArray[np.int64]) -> NDArray[np.float32]:
        """Return the weight of each voxel's class; 0 where the truth says nothing."""
        known = truth != IGNORE
        weights: NDArray[np.float32] = known.astype(np.float32)
        if self.learning.class_weights is not None:
            each = np.asarray(self.learning.class_weights, np.float32)
            weights *= each[np.where(known, truth, 0)]
        return weights


def _hull(a: Region, b: Region) -> Region:
    """Return the smallest region that holds both."""
    return Region(tuple(map(min, a.start, b.start)), tuple(map(max, a.stop, b.stop)))


def _place(box: Region, start: Shape, leading: Shape) -> Region:
    """Return the box of a patch that begins at ``start`` in coordinates of the volume."""
    moved = box.shift(start)
    return Region((*leading, *moved.start), (*(n + 1 for n in leading), *moved.stop))


def _inside(box: Region, shape: Shape, regions: Sequence[Region]) -> NDArray[np.bool_]:
    """Return which voxels of a box are learned from: mirrored, they lie in a training region."""
    inside: NDArray[np.bool_] = np.zeros(box.shape, bool)
    places = [mirror(*ends) for ends in zip(box.start, box.stop, shape, strict=True)]
    for region in regions:
        along = [
            (place >= a) & (place < b)
            for place, a, b in zip(places, region.start, region.stop, strict=True)
        ]
        inside[np.ix_(*along)] = True
    return inside


def _finite(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the image with 0 for what is not finite, as `segment` does."""
    finite: NDArray[np.float32] = np.nan_to_num(image, nan=0.0, posinf=0.0, neginf=0.0)
    return finite


def _integers(labels: NDArray[np.generic]) -> NDArray[np.integer]:
    return cast("NDArray[np.integer]", labels)


def _between(classes: NDArray[np.uint8], target: str) -> NDArray[np.bool_]:
    """Return the voxels between objects."""
    between: NDArray[np.bool_] = classes == (1 if target == "membrane" else 0)
    return between
