"""Patches turned, mirrored, scaled and deformed, image and labels together; grey values varied.

A patch is a region in coordinates of its own choice, ``y x`` or ``z y x``. Drawing a warp says
which box of the source, in the same coordinates, must be read for it: the box may be larger than
the patch, so nothing is ever padded here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy import ndimage
from scipy.interpolate import CubicSpline

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

ROTATIONS = ("none", "quarter", "any")
GRID = 3
"""Points of the coarse grid of displacements along each axis (arXiv:1505.04597, section 3.1)."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What is varied in patches, and how much. By default nothing is."""

    flip: bool = False
    """Mirror each axis, or not, with equal chance."""
    rotate: str = "none"
    """``quarter``: by a quarter turn or several, about any axis. ``any``: by any angle."""
    scale: float = 0.0
    """0.1 makes things larger or smaller by a factor of up to 1.1, the same along each axis."""
    elastic: float = 0.0
    """Standard deviation, in voxels, of the displacements at the points of a coarse grid; the first
    and the last point along each axis are the patch's own."""
    contrast: float = 0.0
    """0.2 spreads grey values about their mean by a factor of up to 1.2, or narrows them."""
    brightness: float = 0.0
    """0.2 adds up to 0.2, or takes it off, in standard deviations of the patch's grey values."""
    gamma: float = 0.0
    """0.2 raises grey values, as shares of their range, to a power of up to 1.2, or 1 / 1.2."""
    noise: float = 0.0
    """0.2 adds noise of a deviation of up to 0.2, in deviations of the patch's grey values."""
    in_plane: bool = False
    """In 3D, move voxels along y and x only, and all planes alike: for anisotropic voxels."""

    def __post_init__(self) -> None:
        if self.rotate not in ROTATIONS:
            raise BadRequest(f"rotate (={self.rotate!r}) must be one of {', '.join(ROTATIONS)}")
        for name in ("scale", "elastic", "contrast", "brightness", "gamma", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise BadRequest(f"{name} (={value}) must be a number of at least 0; 0 is off")


NONE = Augmentation()
"""Patches as they are."""


@dataclass(frozen=True, slots=True, eq=False)
class Warp:
    """Where each voxel of a patch comes from: drawn once, then applied to image and labels alike.

    Law: of a region within the one drawn it gives the crop of what it gives of the whole.
    """

    region: Region
    """The largest region of the patch that the warp can give."""
    box: Region
    """What must be read of the source for it, in the patch's coordinates."""
    turn: tuple[tuple[int, int], ...] | None
    """Where voxels only change places: for each axis of the source, the axis of the patch that
    runs along it, and 1, or -1 if it runs backwards. Then nothing is interpolated."""
    coordinates: Floats | None
    """Else, for each voxel of ``region``, its place in ``box``: (moved axes, *their sizes); of a
    3D patch that is moved in plane for one plane."""

    def image(self, source: NDArray[np.generic], region: Region) -> Floats:
        """Return grey values (C, *region), interpolated linearly, of a source (C, *box).

        Where voxels only change places they keep their bytes.
        """
        self._check(source.shape[1:], region)
        if self.coordinates is None:
            return np.array(self._turned(source, region), dtype=np.float32, order="C")
        planes, where = self._sampled(source, region, self.coordinates)
        answer = np.empty((len(planes), *where.shape[1:]), np.float32)
        for plane, out in zip(planes.astype(np.float32, copy=False), answer, strict=True):
            ndimage.map_coordinates(plane, where, output=out, order=1, mode="mirror")
        return answer.reshape(len(source), *region.shape)

    def labels(self, source: NDArray[np.generic], region: Region) -> NDArray[np.generic]:
        """Return the labels (*region) of a source (*box): each the nearest voxel's, as it is."""
        self._check(source.shape, region)
        if self.coordinates is None:
            return np.ascontiguousarray(self._turned(source[None], region)[0])
        planes, where = self._sampled(source[None], region, self.coordinates)
        nearest = tuple(np.rint(along).astype(np.intp) for along in where)
        return planes[(slice(None), *nearest)].reshape(region.shape)

    def _check(self, shape: tuple[int, ...], region: Region) -> None:
        if shape != self.box.shape:
            raise ValueError(f"source shape (={shape}) must be the box's (={self.box.shape})")
        if region.intersect(self.region) != region:
            raise ValueError(f"region (={region}) must lie in the one drawn (={self.region})")

    def _turned(self, source: NDArray[np.generic], region: Region) -> NDArray[np.generic]:
        """Return a view of (C, *box): (C, *region)."""
        turn = self.turn or ()
        for axis, (along, sign) in enumerate(turn):
            first = region.start[along] - self.region.start[along]
            if sign < 0:
                first = self.region.stop[along] - region.stop[along]
            part = slice(first, first + region.shape[along])
            source = source[(slice(None),) * (axis + 1) + (part,)]
            if sign < 0:
                source = np.flip(source, axis + 1)
        order = [along for along, _ in turn]
        return source.transpose(0, *(order.index(axis) + 1 for axis in range(len(order))))

    def _sampled(
        self, source: NDArray[np.generic], region: Region, coordinates: Floats
    ) -> tuple[NDArray[np.generic], Floats]:
        """Return the source as (N, *moved axes), and the coordinates of the region."""
        still = len(region.start) - len(coordinates)
        at = region.within(self.region.start)
        planes = source[(slice(None), *at[:still])]
        return planes.reshape(-1, *self.box.shape[still:]), coordinates[(slice(None), *at[still:])]


def draw_warp(augmentation: Augmentation, rng: np.random.Generator, region: Region) -> Warp:
    """Return where the voxels of ``region`` come from, and what must be read for them.

    The region's centre stays where it is, but for the elastic displacements (and for half a voxel
    where a quarter turn exchanges an even size with an odd one). Where nothing but ``flip`` and
    quarter turns is drawn, the box has the region's sizes, exchanged as the axes are.

    >>> shape = (64, 64)
    >>> warp = draw_warp(Augmentation(), np.random.default_rng(0), Region.whole(shape))
    >>> str(warp.box)
    '0:64,0:64'
    """
    ndim = len(region.start)
    moved = 2 if augmentation.in_plane else ndim
    still = ndim - moved
    turn = _draw_turn(augmentation, rng, moved)
    if augmentation.rotate != "any" and not augmentation.scale and not augmentation.elastic:
        full = (*((axis, 1) for axis in range(still)), *((a + still, s) for a, s in turn))
        return Warp(region, _turned_box(region, full), full, None)
    matrix = np.zeros((moved, moved))
    for axis, (along, sign) in enumerate(turn):
        matrix[axis, along] = sign
    if augmentation.rotate == "any":
        matrix = _draw_rotation(rng, moved) @ matrix
    matrix /= (1 + augmentation.scale) ** rng.uniform(-1, 1)
    sizes = region.shape[still:]
    coordinates = _linear(matrix, sizes)
    if augmentation.elastic:
        points = (moved, *(GRID,) * moved)
        coordinates += _spread(rng.normal(0, augmentation.elastic, points), sizes)
    start, stop = list(region.start), list(region.stop)
    for axis, along in enumerate(coordinates, start=still):
        centre = (region.start[axis] + region.stop[axis] - 1) / 2
        start[axis] = math.floor(float(along.min()) + centre)
        stop[axis] = math.ceil(float(along.max()) + centre) + 1
        along += np.float32(centre - start[axis])
    box = Region(tuple(start), tuple(stop))
    return Warp(region, box, None, coordinates)


def grey(augmentation: Augmentation, rng: np.random.Generator, image: Floats) -> Floats:
    """Return the image (C, *S) with its grey values varied, each channel on its own.

    Gamma first, then contrast and brightness, then noise. All is relative to the channel's own
    mean, deviation and range, so that it means the same however grey values were normalized.

    Law: of ``a image + b``, a > 0, it is ``a`` times that of the image, plus ``b``. A channel
    that is constant stays as it is.
    """
    varied = image.astype(np.float32)
    for channel in varied:
        power, spread = (
            (1 + amount) ** rng.uniform(-1, 1)
            for amount in (augmentation.gamma, augmentation.contrast)
        )
        shift = augmentation.brightness * rng.uniform(-1, 1)
        noise = augmentation.noise * rng.uniform(0, 1)
        low, high = float(channel.min()), float(channel.max())
        if not high > low:
            continue
        mean, deviation = float(channel.mean(dtype=float)), float(channel.std(dtype=float))
        if augmentation.gamma:
            channel -= np.float32(low)
            channel /= np.float32(high - low)
            np.clip(channel, 0, 1, out=channel)
            np.power(channel, np.float32(power), out=channel)
            channel *= np.float32(high - low)
            channel += np.float32(low)
        if augmentation.contrast or augmentation.brightness:
            channel *= np.float32(spread)
            channel += np.float32(mean * (1 - spread) + shift * deviation)
        if augmentation.noise:
            drawn = rng.standard_normal(channel.shape, np.float32)
            drawn *= np.float32(noise * deviation)
            channel += drawn
    return varied


def _draw_turn(
    augmentation: Augmentation, rng: np.random.Generator, ndim: int
) -> tuple[tuple[int, int], ...]:
    """Return for each axis of the source the patch's axis along it, and 1 or -1.

    All quarter turns, or with ``flip`` all of the cube's symmetries, have the same chance.
    """
    axes, signs = np.arange(ndim), np.ones(ndim, int)
    if augmentation.rotate == "quarter":
        axes = rng.permutation(ndim)
    if augmentation.flip or augmentation.rotate == "quarter":
        signs = rng.choice([-1, 1], ndim)
    if not augmentation.flip and np.linalg.det(np.eye(ndim)[axes] * signs[:, None]) < 0:
        signs[0] = -signs[0]
    return tuple(zip(axes.tolist(), signs.tolist(), strict=True))


def _turned_box(region: Region, turn: Sequence[tuple[int, int]]) -> Region:
    """Return the box of the region's sizes, exchanged, about the same centre or half a voxel off.

    >>> str(_turned_box(Region((0, 0), (10, 4)), ((1, 1), (0, -1))))
    '3:7,-3:7'
    """
    shape = tuple(region.shape[along] for along, _ in turn)
    start = tuple(
        (a + b - size) // 2 for a, b, size in zip(region.start, region.stop, shape, strict=True)
    )
    return Region(start, tuple(a + size for a, size in zip(start, shape, strict=True)))


def _draw_rotation(rng: np.random.Generator, ndim: int) -> NDArray[np.float64]:
    """Return a rotation, all with the same chance: in 3D from a random unit quaternion."""
    if ndim == 2:
        angle = rng.uniform(0, 2 * math.pi)
        cos, sin = math.cos(angle), math.sin(angle)
        return np.array([[cos, -sin], [sin, cos]])
    quaternion = rng.standard_normal(4)
    w, x, y, z = (quaternion / np.linalg.norm(quaternion)).tolist()
    return np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )


def _linear(matrix: NDArray[np.float64], sizes: tuple[int, ...]) -> Floats:
    """Return the matrix applied to each voxel's place from the centre: (axes, *sizes)."""
    centred = [np.arange(n) - (n - 1) / 2 for n in sizes]
    answer = np.empty((len(sizes), *sizes), np.float32)
    for row, out in zip(matrix, answer, strict=True):
        out[...] = 0
        for axis, (factor, place) in enumerate(zip(row, centred, strict=True)):
            shape = [1] * len(sizes)
            shape[axis] = -1
            out += (factor * place).astype(np.float32).reshape(shape)
    return answer


def _spread(points: NDArray[np.float64], sizes: tuple[int, ...]) -> Floats:
    """Return vectors at coarse grid points (axes, *points) at each voxel: (axes, *sizes).

    Bicubic: along each axis a natural cubic spline through the points, the first and the last of
    which lie on the first and the last voxel.
    """
    field = points.astype(np.float32)
    for size in sizes:
        count = field.shape[1]
        place = np.linspace(0, count - 1, size) if size > 1 else np.array([(count - 1) / 2])
        basis = CubicSpline(np.arange(count), np.eye(count), bc_type="natural")(place)
        field = np.tensordot(field, basis.astype(np.float32), axes=([1], [1]))
    return field
