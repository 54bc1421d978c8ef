"""Images like stained nuclei under a fluorescence microscope, of any size, with their truth.

Everything is a function of absolute voxel coordinates and the seed: objects live on jittered
lattices whose cells are hashed (splitmix64), and so is the noise of each voxel. Law: a region
made on its own equals the crop of the whole. So that it holds to the last bit, voxels are made
with ``+ - * /``, ``sqrt`` and comparisons only, whose rounding IEEE 754 fixes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, TileGrid
from tilepipe.volumes.coordinate_noise import field, field_at, random_bits, uniform

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

NUCLEUS_CELL = 32
"""Voxels between the lattice points of nuclei; no nucleus reaches further from its cell."""
BLOB_CELL, BLOB_RADIUS = 128, 52.0
DEBRIS_CELL, DEBRIS_RADIUS = 56, 3.6
LIGHT_CELL, DENSITY_CELL, HAZE_CELL = 640, 224, 150
DARK, READ_NOISE, GAIN = 9.0, 1.4, 0.22
"""Camera offset, deviation of its noise, and grey values of one photon."""
BLOCK = {2: 768, 3: 96}
"""Edge of the pieces in which a region is made, so that memory stays small."""


@dataclass(frozen=True, slots=True)
class _Ellipse:
    """A bent ellipsoid, turned in the last two axes; all lengths in voxels."""

    centre: tuple[float, ...]
    radii: tuple[float, float, float]
    """Half axes: along z, along the long axis in the plane, across it."""
    cos: float
    sin: float
    bend: float
    """How far the long axis bows, in half axes; 0 is an ellipse."""
    reach: float
    """Squared distance, in half axes, past which nothing is drawn."""

    def box(self) -> Region:
        """Return a box that holds the ellipse out to its reach."""
        far = math.sqrt(self.reach)
        along = self.radii[1] * far
        across = self.radii[2] * (far + abs(self.bend) * max(self.reach - 0.3, 0.3))
        extent = (
            self.radii[0] * far,
            abs(self.cos) * along + abs(self.sin) * across,
            abs(self.sin) * along + abs(self.cos) * across,
        )[-len(self.centre) :]
        return Region(
            tuple(math.floor(c - e) for c, e in zip(self.centre, extent, strict=True)),
            tuple(math.floor(c + e) + 2 for c, e in zip(self.centre, extent, strict=True)),
        )

    def distance(self, box: Region) -> Floats:
        """Return the squared distance from the centre, in half axes, of each voxel of ``box``."""
        axes = zip(box.start, box.stop, self.centre, strict=True)
        *leading, y, x = ((np.arange(a, b) - c).astype(np.float32) for a, b, c in axes)
        cos, sin = np.float32(self.cos), np.float32(self.sin)
        along, across = np.float32(1 / self.radii[1]), np.float32(1 / self.radii[2])
        u = (y * cos * along)[:, None] + x * sin * along
        v = (y * -sin * across)[:, None] + x * cos * across
        u *= u
        if self.bend:
            v += np.float32(self.bend) * (u - np.float32(0.3))
        v *= v
        u += v
        if not leading:
            return u
        z = leading[0] / np.float32(self.radii[0])
        return (z * z)[:, None, None] + u


@dataclass(frozen=True, slots=True)
class _Nucleus:
    shape: _Ellipse
    label: int
    brightness: float
    edge: float
    """Half the width of the soft edge, in squared half axes."""
    texture: float
    grain: tuple[int, ...]
    """Where in the table of chromatin the nucleus begins, per axis."""


def nuclei(
    region: Region, *, shape: Sequence[int], seed: int = 0
) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Make a region of a synthetic image and its truth.

    Bright specks of debris and dim blobs out of focus are in the image but not in the truth, the
    light is uneven, and nuclei touch: a threshold alone does not find them.

    ``region`` lies inside the image of ``shape``, ``y x`` or ``z y x`` (BadRequest otherwise);
    the shape only numbers the nuclei. Another ``seed`` is another image. Returns the image and
    the truth, both of the region's shape: 0 for the background, else the number of the nucleus,
    the same in every region; numbers have gaps.

    >>> image, truth = nuclei(Region((500, 500), (600, 700)), shape=(100_000, 100_000))
    >>> image.shape, image.dtype, truth.dtype
    ((100, 200), dtype('uint8'), dtype('uint32'))
    """
    shape = tuple(shape)
    if len(shape) not in BLOCK or min(shape) < 1:
        raise BadRequest(f"shape (={shape}) must be two or three sizes of at least 1; y,x or z,y,x")
    if len(region.start) != len(shape) or region.intersect(Region.whole(shape)) != region:
        raise BadRequest(f"region (={region}) must lie inside shape (={shape}); clip it")
    lattice = tuple(-(-n // NUCLEUS_CELL) + 2 for n in shape)
    if math.prod(lattice) >= 2**32:
        raise BadRequest(f"shape (={shape}) must hold fewer than 2**32 nuclei; make it smaller")
    image = np.empty(region.shape, np.uint8)
    truth = np.empty(region.shape, np.uint32)
    for tile in TileGrid(region.shape, (BLOCK[len(shape)],) * len(shape)):
        piece = tile.write
        block = Region(
            tuple(a + o for a, o in zip(piece.start, region.start, strict=True)),
            tuple(b + o for b, o in zip(piece.stop, region.start, strict=True)),
        )
        image[piece.slices], truth[piece.slices] = _block(block, lattice, seed)
    return image, truth


def write_synthetic(
    path: str | Path,
    shape: Sequence[int],
    *,
    seed: int = 0,
    chunks: Sequence[int] | None = None,
    labels_path: str | Path | None = None,
) -> None:
    """Write a synthetic image of nuclei as a Zarr v3 array, chunk by chunk.

    Memory is that of one chunk, whatever the image's size.

    Args:
        path: Where the image is written, as bytes of grey values.
        shape: The voxels along each axis, ``y x`` or ``z y x``.
        seed: The seed of the random numbers; the same seed gives the same image.
        chunks: The voxels of a chunk along each axis; by default 1024 in 2D and 128 in 3D.
        labels_path: Where the truth is written as a second array of the same shape: the number of
            the nucleus of each voxel, 0 for none. None writes no truth.

    Raises:
        BadRequest: Something is at a path already, or the shape has not two or three axes.
    """
    import zarr

    shape = tuple(shape)
    nuclei(Region((0,) * len(shape), (0,) * len(shape)), shape=shape, seed=seed)
    edge = 1024 if len(shape) == 2 else 128
    chunks = tuple(chunks) if chunks else tuple(min(edge, n) for n in shape)
    if len(chunks) != len(shape) or min(chunks) < 1:
        raise BadRequest(f"chunks (={chunks}) must be {len(shape)} sizes of at least 1")
    places = [str(place) for place in (path, labels_path) if place is not None]
    for place in places:
        if Path(place).exists():
            raise BadRequest(f"path (={place}) must not be there yet; remove it or name another")
    targets = [
        zarr.create_array(
            store=place,
            shape=shape,
            chunks=chunks,
            dtype=dtype,
            dimension_names=("z", "y", "x")[-len(shape) :],
        )
        for place, dtype in zip(places, ("uint8", "uint32"), strict=False)
    ]
    for tile in TileGrid(shape, chunks):
        image, truth = nuclei(tile.write, shape=shape, seed=seed)
        targets[0].set_basic_selection(tile.write.slices, image)
        for target in targets[1:]:
            target.set_basic_selection(tile.write.slices, truth)


def _block(
    region: Region, lattice: tuple[int, ...], seed: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """Return image and truth of a region small enough to be made at once."""
    signal = np.zeros(region.shape, np.float32)
    truth = np.zeros(region.shape, np.uint32)
    if region.size == 0:
        return signal.astype(np.uint8), truth
    nearest, grain = np.ones(region.shape, np.float32), _grain(len(region.shape))
    for nucleus in _nuclei(region, lattice, seed):
        box = nucleus.shape.box()
        seen = box.intersect(region)
        if seen.size == 0:
            continue
        at = seen.within(region.start)
        distance = nucleus.shape.distance(seen)
        np.copyto(truth[at], np.uint32(nucleus.label), where=distance < nearest[at])
        np.minimum(nearest[at], distance, out=nearest[at])
        origin = [a - o for a, o in zip(box.start, nucleus.grain, strict=True)]
        glow = _fall(distance, nucleus.edge)
        glow *= grain[seen.within(origin)] * np.float32(nucleus.texture) + np.float32(1)
        glow *= np.float32(nucleus.brightness)
        np.maximum(signal[at], glow, out=signal[at])
    for ellipse, brightness in (*_blobs(region, seed), *_debris(region, seed)):
        seen = ellipse.box().intersect(region)
        if seen.size == 0:
            continue
        glow = np.maximum(np.float32(1) - ellipse.distance(seen), np.float32(0))
        glow *= glow
        glow *= np.float32(brightness)
        signal[seen.within(region.start)] += glow
    signal += field(region, HAZE_CELL, seed, layer=11) * np.float32(9)
    signal *= field(region, LIGHT_CELL, seed, layer=12) * np.float32(0.6) + np.float32(0.6)
    return _camera(signal, region, seed), truth


def _fall(distance: Floats, edge: float) -> Floats:
    """Return 1 inside, 0 outside, and a smooth step through one half at distance 1."""
    t = (np.float32(1 + edge) - distance) * np.float32(0.5 / edge)
    np.clip(t, np.float32(0), np.float32(1), out=t)
    return t * t * (np.float32(3) - (t + t))


def _camera(signal: Floats, region: Region, seed: int) -> NDArray[np.uint8]:
    """Return the signal with photon and read noise and the camera's offset, as grey values.

    The 64 bits of a voxel's hash, counted, are binomial with deviation 4: close to a Gaussian.
    """
    *leading, x = (np.arange(a, b) for a, b in zip(region.start, region.stop, strict=True))
    rows = random_bits(seed, 13, *np.meshgrid(*leading, indexing="ij"))
    columns = random_bits(seed, 14, x)
    noise = np.empty(region.shape, np.uint8)
    for row in np.ndindex(noise.shape[:-2]):
        bits = rows[row][:, None] ^ columns
        bits *= np.uint64(0xBF58476D1CE4E5B9)
        bits ^= bits >> np.uint64(31)
        bits *= np.uint64(0x94D049BB133111EB)
        np.bitwise_count(bits, out=noise[row])
    deviation = signal * np.float32(GAIN / 16)
    deviation += np.float32(READ_NOISE * READ_NOISE / 16)
    np.sqrt(deviation, out=deviation)
    deviation *= noise.astype(np.float32) - np.float32(32)
    signal = signal + deviation + np.float32(DARK + 0.5)
    np.clip(signal, np.float32(0), np.float32(255), out=signal)
    return signal.astype(np.uint8)


def _nuclei(region: Region, lattice: tuple[int, ...], seed: int) -> Iterator[_Nucleus]:
    """Yield the nuclei that may be seen in ``region``, in the order of their cells."""
    cells = _cells(region, NUCLEUS_CELL, NUCLEUS_CELL, lattice)
    random = uniform(seed, 1, cells, draws=16)
    crowd = field_at(cells * NUCLEUS_CELL, DENSITY_CELL, seed, layer=10)
    table = _grain(cells.shape[1]).shape[0] - 2 * NUCLEUS_CELL
    for cell, u, crowded in zip(cells.tolist(), random.tolist(), crowd.tolist(), strict=True):
        if u[0] > 0.1 + crowded:
            continue
        radius = 8 + 7 * u[1]
        radii = (radius * (0.7 + 0.3 * u[2]), radius, radius * (0.62 + 0.38 * u[3]))
        edge = min(3.0 / radii[2], 0.6) * (0.6 + 0.4 * u[4])
        slope = 2 * u[5] - 1
        ellipse = _Ellipse(
            centre=_centre(cell, [0.1 + 0.8 * j for j in u[13:16]], NUCLEUS_CELL),
            radii=radii,
            cos=(1 - slope * slope) / (1 + slope * slope),
            sin=2 * slope / (1 + slope * slope),
            bend=0.44 * (u[6] - 0.5),
            reach=1 + edge,
        )
        label = 0
        for c, n in zip(cell, lattice, strict=True):
            label = label * n + c + 1
        yield _Nucleus(
            ellipse,
            label + 1,
            brightness=42 + 140 * u[7] * u[8],
            edge=edge,
            texture=0.25 + 0.4 * u[9],
            grain=tuple(int(g * table) for g in u[10 : 10 + len(cell)]),
        )


def _blobs(region: Region, seed: int) -> Iterator[tuple[_Ellipse, float]]:
    """Yield the nuclei far out of focus, with their brightness: light without an edge."""
    cells = _cells(region, BLOB_CELL, BLOB_RADIUS)
    for cell, u in zip(cells.tolist(), uniform(seed, 2, cells, draws=8).tolist(), strict=True):
        if u[0] < 0.7:
            radius = 22 + (BLOB_RADIUS - 22) * u[1]
            yield _round(cell, u[5:], BLOB_CELL, radius, 0.7 + 0.3 * u[2]), 14 + 70 * u[3] * u[4]


def _debris(region: Region, seed: int) -> Iterator[tuple[_Ellipse, float]]:
    """Yield the bright specks, with their brightness."""
    cells = _cells(region, DEBRIS_CELL, 2 * DEBRIS_RADIUS)
    for cell, u in zip(cells.tolist(), uniform(seed, 3, cells, draws=8).tolist(), strict=True):
        if u[0] < 0.45:
            radius = 1.4 + (DEBRIS_RADIUS - 1.4) * u[1]
            yield _round(cell, u[5:], DEBRIS_CELL, radius, 0.6 + 0.4 * u[2]), 50 + 190 * u[3]


def _round(
    cell: Sequence[int], jitter: Sequence[float], size: int, radius: float, flat: float
) -> _Ellipse:
    centre, radii = _centre(cell, jitter, size), (radius, radius, radius * flat)
    return _Ellipse(centre, radii, cos=0.8, sin=0.6, bend=0.0, reach=1)


def _centre(cell: Sequence[int], jitter: Sequence[float], size: int) -> tuple[float, ...]:
    return tuple((c + jitter[axis]) * size for axis, c in enumerate(cell))


def _cells(
    region: Region, size: int, reach: float, lattice: tuple[int, ...] | None = None
) -> NDArray[np.int64]:
    """Return the lattice cells, as rows, from which an object may reach into ``region``.

    With ``lattice``, only cells that carry a number: from -1, that many along each axis.
    """
    axes = []
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True)):
        first = math.floor((a - reach) / size)
        last = math.floor((b + reach) / size)
        if lattice is not None:
            first, last = max(first, -1), min(last, lattice[axis] - 2)
        axes.append(np.arange(first, last + 1))
    return np.stack([g.ravel() for g in np.meshgrid(*axes, indexing="ij")], axis=1)


@lru_cache(maxsize=2)
def _grain(ndim: int) -> Floats:
    """Return a table of chromatin texture, about -1 to 1; each nucleus takes a piece of it."""
    edge = {2: 256, 3: 112}[ndim]
    axes = np.meshgrid(*[np.arange(edge)] * ndim, indexing="ij")
    table = (random_bits(0, 20, *axes) >> np.uint64(40)).astype(np.float32) * np.float32(2.0**-24)
    for axis in range(ndim):
        for width in (3, 5):
            table = np.stack([np.roll(table, shift, axis) for shift in range(width)]).mean(axis=0)
    grain: Floats = np.clip((table - table.mean()) / (2.5 * table.std()), -1, 1).astype(np.float32)
    return grain
