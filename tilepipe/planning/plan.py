"""Everything that is decided before the first voxel is read: all checks and all costs."""

from __future__ import annotations

import math
import platform
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import zarr

from tilepipe import __version__
from tilepipe.errors import BadRequest
from tilepipe.geometry import Context, Region, Shape, TileGrid, ceil_to
from tilepipe.host import limits
from tilepipe.host.process import borrowed
from tilepipe.models.device import PRECISIONS, find_device
from tilepipe.models.model import load_model
from tilepipe.models.process_memory import VARIES, process_memory
from tilepipe.models.rehearsal import whole_graph
from tilepipe.models.spec import Profile, find_profile
from tilepipe.models.windows import whole
from tilepipe.options import Options
from tilepipe.planning import checks
from tilepipe.planning.activation import Activation, Answer, find_activation, find_answer
from tilepipe.planning.chunking import choose_chunks, choose_shards
from tilepipe.planning.costs import Tiling, Work, floor_work, sweep_work, work
from tilepipe.planning.identity import check_same, ground, identity, plain
from tilepipe.planning.tiling import choose
from tilepipe.storage.location import locate
from tilepipe.storage.objects import Key
from tilepipe.text import describe_bytes
from tilepipe.volumes.normalize import Normalization, parse, resolve
from tilepipe.volumes.source import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A segmentation as it will be done; plain values only."""

    options: Options
    """What was asked for."""
    source: Source
    """The volume that is read."""
    model: Network
    """The model that is run."""
    target: str
    """Where the output is written."""
    profile: Profile
    """What tiling must know of the network: its context, step and sizes."""
    limit: Shape | None
    """With the network's own boundary: the size that the network is run on."""
    activation: Activation
    """What is applied to the network's output, and who decides that."""
    answer: Answer
    """What is written for each voxel."""
    normalize: str
    """The rule by which grey values are normalized."""
    normalization: Normalization | None
    """None until the volume has been read once, where the rule needs that."""
    sizes: Sizes
    """Tile, window, chunks, threads and device."""
    strategy: str
    """``sweep`` or ``regions`` of the whole-image graph, or ``windows`` given to the network."""
    why: str
    """How that compares with the alternative; empty where a run goes on."""
    costs: Costs
    """What the work will take."""
    notices: tuple[str, ...]
    """What the user should know before the run."""

    @property
    def grid(self) -> TileGrid:
        """The tiles, in volume coordinates."""
        return TileGrid(self.source.shape, self.sizes.tile)

    @property
    def box(self) -> Region:
        """The one pass that the tiles equal, in volume coordinates of the network's axes."""
        inner = self.source.shape[len(self.source.shape) - self.profile.axes :]
        return whole(self.profile, inner, self.limit)

    @property
    def context(self) -> Context:
        """The network's context, along the volume's axes."""
        return self.profile.context.with_leading(len(self.source.shape) - self.profile.axes)

    def identity(self) -> dict[str, object]:
        """Return all that the result's bytes depend on: the ground of the ledger's fingerprint."""
        return identity(self)

    def asdict(self) -> dict[str, object]:
        """Return the plan as plain values for JSON."""
        return cast("dict[str, object]", plain({"tilepipe": __version__, **asdict(self)}))

    def provenance(self) -> dict[str, object]:
        """Return with what an output was made, as plain values for its attributes."""
        versions = {
            "tilepipe": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "zarr": zarr.__version__,
            "numpy": np.__version__,
        }
        return {"versions": versions, "plan": self.asdict()}

    def short_of_disk(self) -> str:
        """Return what to say where the output does not fit on the disk, by estimate; else "".

        Labels are expected to take a tenth of their size there, numbers nine tenths.
        """
        if not isinstance(place := locate(self.target, "output"), Path):
            return ""
        folder = next(p for p in place.parents if p.exists())
        free = shutil.disk_usage(folder).free
        need = int(self.costs.write_bytes * (0.1 if self.options.write == "labels" else 0.9))
        if need <= free:
            return ""
        return (
            f"output (={self.target}) needs about {describe_bytes(need)}; {folder} has"
            f" {describe_bytes(free)} free: make room or name another place"
        )


@borrowed()
def plan(
    source: str | Path,
    *,
    model: str | Path,
    output: str | Path | None = None,
    options: Options | None = None,
    workers: int = 1,
    earlier: Mapping[str, object] | None = None,
    elsewhere: bool = False,
) -> Plan:
    """Decide how a volume is segmented, and what that costs; nothing is written.

    A little of the volume is read where the network does not say whether it gives probabilities.

    Args:
        source: The volume, as for `segment`.
        model: The model file; see `load_model`.
        output: Where the output would be written; by default ``SOURCE-segmented.zarr`` beside
            the source.
        options: What is asked for. Sizes are voxels along the volume's axes without channels, and
            memory is bytes for each worker.
        workers: How many processes would share this machine's memory and cores.
        earlier: The `Plan.identity` of a run that may go on. Sizes that its machine chose and that
            ``options`` leave open are kept; another source, model or option is refused.
        elsewhere: Whether the tiles are computed on other machines, whose devices are not looked
            for here.

    Returns:
        The plan: grid of tiles, context, sweep axis, and costs in multiply-adds and bytes.

    Raises:
        BadRequest: What is asked for cannot work.
    """
    options = options or Options()
    volume = open_source(source, options)
    network = load_model(
        model,
        network=options.network,
        network_args=options.network_args,
        head=options.head,
        channels=volume.channels,
    )
    target = str(output) if output is not None else default_target(source)
    normalize = options.normalize or network.normalize or "none"
    asked = ground(options, _source(volume), _network(network), normalize)
    check_same(target, earlier or {}, asked)
    checks.check_rank(volume, options)
    checks.check_match(volume, network)
    profile = find_profile(network)
    checks.check_write(network, profile, options)
    inner = volume.shape[len(volume.shape) - profile.axes :]
    limit = checks.find_limit(network, profile, inner, options)
    box = whole(profile, inner, limit)
    graph = whole_graph(network, profile, box, PRECISIONS[options.precision])
    strategy = "windows" if graph is None else "regions"
    checks.check_exact(network, profile, options, strategy)
    if graph is None:
        checks.check_limit(network, profile, limit, options)
        checks.check_precision(network, profile, PRECISIONS[options.precision], options)
    begun = cast("Mapping[str, object] | None", (earlier or {}).get("activation"))
    activation = find_activation(network, profile, volume, options, earlier=begun)
    answer = find_answer(profile, options, activation)
    tiling = Tiling(
        model=network,
        profile=profile,
        shape=volume.shape,
        limit=limit,
        voxel_bytes=volume.dtype.itemsize * volume.decoded_channels,
        answer_bytes=answer.itemsize * answer.channels,
        box=box,
        graph=graph,
        ratio=PRECISIONS[options.precision].itemsize / network.dtype.itemsize,
        device=_device(options, earlier, elsewhere=elsewhere),
        process=process_memory(options.network, options.network_args),
    )
    checks.check_sweep(options, tiling)
    sizes, why = _sizes(tiling, volume, options, workers, earlier)
    rule = parse(normalize)
    return Plan(
        options=options,
        source=_source(volume),
        model=_network(network),
        target=target,
        profile=profile,
        limit=limit,
        activation=activation,
        answer=answer,
        normalize=normalize,
        normalization=None if rule.needs_pass else resolve(rule, volume),
        sizes=sizes,
        strategy=strategy if sizes.sweep is None else "sweep",
        why=why,
        costs=_costs(tiling, volume, sizes),
        notices=tuple(checks.notices(volume, network, profile, options, strategy)),
    )


def default_target(source: str | Path) -> str:
    """Return ``volume-segmented.zarr`` beside the source, out of any Zarr that it lies in.

    >>> default_target("data/volume.zarr/em/raw")
    'data/volume-segmented.zarr'
    """
    path = Key.parse(str(source)) if "://" in str(source) else Path(source)
    if isinstance(path, Key) and not path.can_write:
        raise BadRequest(f"output must be named for a source (={source}) that is read by HTTP")
    for folder in (path, *path.parents):
        if folder.suffix == ".zarr":
            path = folder
    name = re.sub(r"(\.ome)?\.(zarr|tiff?|svs|btf|n5)$", "", path.name, flags=re.IGNORECASE)
    return str(path.with_name(f"{name}-segmented.zarr"))


def _source(volume: Volume) -> Source:
    return Source(
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


def _network(model: Model) -> Network:
    return Network(model.path, model.kind, model.digest, model.parameters, model.labels)


def _sizes(
    tiling: Tiling,
    volume: Volume,
    options: Options,
    workers: int,
    earlier: Mapping[str, object] | None,
) -> tuple[Sizes, str]:
    """Choose tile, window and write unit; a run that goes on keeps those it began with."""
    kept = cast("Mapping[str, object]", (earlier or {}).get("sizes") or {})
    device = tiling.device
    threads = options.threads or cast("int", kept.get("threads") or 0)
    threads = threads or max(1, limits.cores() // workers)
    tile = options.tile and tuple(
        min(edge, ceil_to(n, multiple))
        for edge, n, multiple in zip(options.tile, volume.shape, tiling.multiple, strict=True)
    )
    chosen = tile
    tile = tile or _kept(kept, "tile")
    chunks = options.chunks or _kept(kept, "chunks") or choose_chunks(tiling, chosen)
    shards = options.shards or _kept(kept, "shards")
    if shards is None and options.chunks is None and options.ome_version != "0.4" and not kept:
        shards = choose_shards(tiling, chunks, chosen)
    checks.check_sizes(tiling.multiple, volume, tile=tile, chunks=chunks, shards=shards)
    memory = options.memory or checks.default_memory(workers, device)
    window = _kept(kept, "window") if options.tile is None or tile == _kept(kept, "tile") else None
    swept = kept.get("sweep") is not None
    if (
        window is None
        or tile is None
        or swept == {"sweep": False, "direct": True}.get(options.strategy)
    ):
        found = choose(tiling, shards or chunks, volume.chunks, memory, tile, options.strategy)
        sweep = found.sweep
        return Sizes(found.tile, found.window, chunks, shards, threads, device, sweep), found.why
    sizes = Sizes(
        tile, window, chunks, shards, threads, device, cast("int | None", kept.get("sweep"))
    )
    need = _work(tiling, volume, sizes).memory
    if options.memory is not None and need > options.memory + VARIES:
        raise BadRequest(
            f"memory (={describe_bytes(options.memory)}) must hold a tile of the run that goes"
            f" on (={describe_bytes(need)}); give more, or begin anew with --overwrite"
        )
    return sizes, ""


def _work(tiling: Tiling, volume: Volume, sizes: Sizes) -> Work:
    if sizes.sweep is None:
        return work(tiling, sizes.tile, sizes.window, volume.chunks)
    slab = sizes.window[sizes.sweep]
    return sweep_work(tiling, sizes.tile, sizes.sweep, slab, volume.chunks, sizes.unit)


def _device(options: Options, earlier: Mapping[str, object] | None, *, elsewhere: bool) -> str:
    """Return the kind of device; a run that goes on keeps its own unless it is told another."""
    device = find_device(options.device, elsewhere=elsewhere).split(":")[0]
    kept = cast("Mapping[str, object]", (earlier or {}).get("sizes") or {})
    return str(kept.get("device", device)) if options.device == "auto" else device


def _kept(kept: Mapping[str, object], name: str) -> Shape | None:
    sizes = cast("list[int] | None", kept.get(name))
    return tuple(sizes) if sizes else None


def _costs(tiling: Tiling, volume: Volume, sizes: Sizes) -> Costs:
    found = _work(tiling, volume, sizes)
    return Costs(
        tiles=len(TileGrid(volume.shape, sizes.tile)),
        calls=found.windows,
        multiply_adds=found.multiply_adds,
        floor=floor_work(tiling),
        memory=found.memory,
        read_bytes=found.read_voxels * tiling.voxel_bytes,
        write_bytes=math.prod(volume.shape) * tiling.answer_bytes,
        files=len(TileGrid(volume.shape, sizes.unit)),
    )
