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
from tilepipe.planning.costs import Tiling, Work, floor_work, sweep_work, tile_work
from tilepipe.planning.identity import check_same, ground, identity, plain
from tilepipe.planning.parts import Costs, Network, Sizes, Source
from tilepipe.planning.tiling import choose
from tilepipe.storage.objects import ObjectKey
from tilepipe.text import describe_bytes
from tilepipe.volumes.normalize import Normalization, parse, resolve
from tilepipe.volumes.output import Output
from tilepipe.volumes.source import open_source

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tilepipe.volumes.volume import Volume


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
        """Return all that the result's bytes depend on, as the ledger keeps it."""
        return identity(self)

    def asdict(self) -> dict[str, object]:
        """Return the plan as plain values for JSON."""
        return cast("dict[str, object]", plain({"tilepipe": __version__, **asdict(self)}))

    def provenance(self) -> dict[str, object]:
        """Return the versions and the plan by which an output is written, as plain values."""
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
        if not isinstance(place := Output.at(self.target).place, Path):
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
    check_same(
        target, earlier or {}, ground(options, Source.of(volume), Network.of(network), normalize)
    )
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
    earlier_activation = cast("Mapping[str, object] | None", (earlier or {}).get("activation"))
    activation = find_activation(network, profile, volume, options, earlier=earlier_activation)
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
        source=Source.of(volume),
        model=Network.of(network),
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
    path = ObjectKey.parse(str(source)) if "://" in str(source) else Path(source)
    if isinstance(path, ObjectKey) and not path.can_write:
        raise BadRequest(f"output must be named for a source (={source}) that is read by HTTP")
    for folder in (path, *path.parents):
        if folder.suffix == ".zarr":
            path = folder
    name = re.sub(r"(\.ome)?\.(zarr|tiff?|svs|btf|n5)$", "", path.name, flags=re.IGNORECASE)
    return str(path.with_name(f"{name}-segmented.zarr"))


def _sizes(
    tiling: Tiling,
    volume: Volume,
    options: Options,
    workers: int,
    earlier: Mapping[str, object] | None,
) -> tuple[Sizes, str]:
    """Choose tile, window and write unit; a run that goes on keeps those it began with."""
    before = cast("Mapping[str, object]", (earlier or {}).get("sizes") or {})
    device = tiling.device
    threads = options.threads or cast("int", before.get("threads") or 0)
    threads = threads or max(1, limits.cores() // workers)
    option_tile = options.tile and tuple(
        min(edge, ceil_to(n, multiple))
        for edge, n, multiple in zip(options.tile, volume.shape, tiling.multiple, strict=True)
    )
    tile = option_tile or _size(before, "tile")
    chunks = options.chunks or _size(before, "chunks") or choose_chunks(tiling, option_tile)
    shards = options.shards or _size(before, "shards")
    if shards is None and options.chunks is None and options.ome_version != "0.4" and not before:
        shards = choose_shards(tiling, chunks, option_tile)
    checks.check_sizes(tiling.multiple, volume, tile=tile, chunks=chunks, shards=shards)
    memory = options.memory or checks.default_memory(workers, device)
    is_same_tile = options.tile is None or tile == _size(before, "tile")
    window = _size(before, "window") if is_same_tile else None
    was_swept = before.get("sweep") is not None
    if (
        window is None
        or tile is None
        or was_swept == {"sweep": False, "direct": True}.get(options.strategy)
    ):
        choice = choose(tiling, shards or chunks, volume.chunks, memory, tile, options.strategy)
        sizes = Sizes(choice.tile, choice.window, chunks, shards, threads, device, choice.sweep)
        return sizes, choice.why
    sweep = cast("int | None", before.get("sweep"))
    sizes = Sizes(tile, window, chunks, shards, threads, device, sweep)
    need = _work(tiling, volume, sizes).memory
    if options.memory is not None and need > options.memory + VARIES:
        raise BadRequest(
            f"memory (={describe_bytes(options.memory)}) must hold a tile of the run that goes"
            f" on (={describe_bytes(need)}); give more, or begin anew with --overwrite"
        )
    return sizes, ""


def _work(tiling: Tiling, volume: Volume, sizes: Sizes) -> Work:
    if sizes.sweep is None:
        return tile_work(tiling, sizes.tile, sizes.window, volume.chunks)
    slab = sizes.window[sizes.sweep]
    return sweep_work(tiling, sizes.tile, sizes.sweep, slab, volume.chunks, sizes.unit)


def _device(options: Options, earlier: Mapping[str, object] | None, *, elsewhere: bool) -> str:
    """Return the kind of device; a run that goes on keeps its own unless an option names one."""
    device = find_device(options.device, elsewhere=elsewhere).split(":")[0]
    before = cast("Mapping[str, object]", (earlier or {}).get("sizes") or {})
    return str(before.get("device", device)) if options.device == "auto" else device


def _size(sizes: Mapping[str, object], name: str) -> Shape | None:
    """Return a size of an earlier run's identity, which JSON gives back as a list."""
    size = cast("list[int] | None", sizes.get(name))
    return tuple(size) if size else None


def _costs(tiling: Tiling, volume: Volume, sizes: Sizes) -> Costs:
    """Return what a plan says of the work."""
    work = _work(tiling, volume, sizes)
    return Costs(
        tiles=len(TileGrid(volume.shape, sizes.tile)),
        calls=work.windows,
        multiply_adds=work.multiply_adds,
        floor=floor_work(tiling),
        memory=work.memory,
        read_bytes=work.read_voxels * tiling.voxel_bytes,
        write_bytes=math.prod(volume.shape) * tiling.answer_bytes,
        files=len(TileGrid(volume.shape, sizes.unit)),
    )
