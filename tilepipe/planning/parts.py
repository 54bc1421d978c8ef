"""The parts of a plan: what it keeps of volume and model, the sizes, and the costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilepipe.geometry import Shape
    from tilepipe.models.model import Model
    from tilepipe.volumes.volume import Volume


@dataclass(frozen=True, slots=True)
class Source:
    """The volume that is read."""

    path: str
    """Where it lies; a path or an address."""
    identity: str
    """SHA-256 of the path and how the voxels are stored."""
    kind: str
    """The format, such as ``OME-Zarr 0.5``."""
    axes: str
    """Without channels; the order of all sizes in the plan."""
    dimensions: str
    """Axes as stored, channels among them; - for one of length 1 that is left out."""
    shape: Shape
    """Voxels along each of ``axes``."""
    channels: int
    """Channels that are read."""
    dtype: str
    """Type of the voxels."""
    scale: tuple[float, ...]
    """Size of a voxel along each of ``axes``, in ``units``."""
    units: tuple[str | None, ...]
    """Unit of ``scale`` along each of ``axes``; None where nothing says it."""
    translation: tuple[float, ...]
    """Where the first voxel lies along each of ``axes``, in ``units``."""
    chunks: Shape
    """Voxels of a chunk along each of ``axes``."""
    nbytes: int
    """Bytes of all voxels that are read, uncompressed."""

    @classmethod
    def of(cls, volume: Volume) -> Source:
        """Return what a plan keeps of a volume."""
        return cls(
            path=volume.path,
            identity=volume.identity,
            kind=volume.kind,
            axes=volume.axes,
            dimensions=volume.dimensions,
            shape=volume.shape,
            channels=volume.channels,
            dtype=str(volume.dtype),
            scale=volume.scale,
            units=volume.units,
            translation=volume.translation,
            chunks=volume.chunks,
            nbytes=volume.nbytes,
        )


@dataclass(frozen=True, slots=True)
class Network:
    """The model that is run."""

    path: str
    """Where the model file lies."""
    kind: str
    """The kind of file, such as ``checkpoint``."""
    digest: str
    """SHA-256 of the model file, and of the code that builds the network."""
    parameters: int
    """How many weights the network has."""
    labels: tuple[str, ...]
    """Names of the answer's channels; may be empty."""

    @classmethod
    def of(cls, model: Model) -> Network:
        """Return what a plan keeps of a model."""
        return cls(model.path, model.kind, model.digest, model.parameters, model.labels)


@dataclass(frozen=True, slots=True)
class Sizes:
    """What the machine's memory and cores decide, if the user does not."""

    tile: Shape
    """Voxels of a tile along each axis of the volume."""
    window: Shape
    """Voxels that one call answers for at most, per axis of the network; of a sweep, a slab."""
    chunks: Shape
    """Voxels of a chunk of the output along each axis of the volume."""
    shards: Shape | None
    """Voxels of a shard of the output; None where there are no shards."""
    threads: int
    """Compute threads of each worker."""
    device: str
    """``cpu`` or ``cuda``."""
    sweep: int | None = None
    """The axis of the volume along which tiles are swept; None where they are not."""

    @property
    def unit(self) -> Shape:
        """The write unit: what has exactly one writer."""
        return self.shards or self.chunks


@dataclass(frozen=True, slots=True)
class Costs:
    """What the work will take."""

    tiles: int
    """Tiles of the whole volume."""
    calls: int
    """Windows given to the network."""
    multiply_adds: int
    """Multiply-adds of all tiles, halos included."""
    floor: int
    """Multiply-adds of one pass over the whole mirrored volume."""
    memory: int
    """Expected peak bytes of one worker."""
    read_bytes: int
    """Decoded from the source: halos and whole chunks included, uncompressed."""
    write_bytes: int
    """Uncompressed."""
    files: int
    """Chunk or shard files where none is empty."""

    @property
    def recompute(self) -> float:
        """Halo recompute: multiply-adds above the floor, over the floor."""
        return self.multiply_adds / max(self.floor, 1) - 1
