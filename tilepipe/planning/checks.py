"""What a volume, a network and the options must agree on; each refusal is one line."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest
from tilepipe.geometry import Shape, ceil_to
from tilepipe.graph.graph import NotExported, export, lattice
from tilepipe.graph.readings import NoRule
from tilepipe.host import limits
from tilepipe.models.trial import try_windows
from tilepipe.text import comma, counted
from tilepipe.volumes.source import source_notices

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.options import Options
    from tilepipe.planning.costs import Tiling
    from tilepipe.volumes.volume import Volume


def check_match(volume: Volume, model: Model) -> None:
    """Refuse a network of more axes, or of other channels, than the volume has."""
    shape = comma(volume.shape)
    if model.axes > len(volume.shape):
        raise BadRequest(
            f"model (={model.path}) reads {model.axes} axes; the volume {volume.axes} (={shape})"
            f" has {len(volume.shape)}: give its axes with --axes or use a 2D network"
        )
    if model.axes == 3 and volume.axes[-3] != "z":
        raise BadRequest(
            f"model (={model.path}) reads zyx; the volume's axes are {volume.axes} (={shape})"
        )
    if model.channels != volume.channels:
        has_known_axes = volume.has_channels and not volume.axes_assumed
        channels = counted(volume.channels, "channel") if volume.has_channels else "no channel axis"
        assumed = ", assumed" if volume.axes_assumed else ""
        raise BadRequest(
            f"model (={model.path}) reads {counted(model.channels, 'channel')}; the volume (axes"
            f" {volume.axes}{assumed}, shape {shape}) has {channels}: "
            + ("" if has_known_axes else "say which axis is c with --axes, or ")
            + ("choose some with --channels, or " if volume.channels > model.channels else "")
            + "use a network for it"
        )


def check_exact(model: Model, profile: Profile, options: Options, strategy: str) -> None:
    """Refuse a network that no tiling makes exact, unless ``inexact`` is asked for."""
    troubles = profile.troubles or (profile.off_lattice if strategy == "windows" else ())
    if troubles and not options.inexact:
        remedy = "replace that layer"
        if profile.autocast and not profile.troubles:
            remedy = "take torch.autocast out of it, with which it is not computed by regions"
        if profile.method == "probe":
            remedy = "give its state dict with --network"
            if model.exportable:
                remedy = "write it without that operation"
        raise BadRequest(
            f"model (={model.path}) cannot be tiled exactly: {troubles[0]};"
            f" {remedy}, or accept seams with --inexact"
        )


def check_write(model: Model, profile: Profile, options: Options) -> None:
    """Refuse an answer that the network does not give."""
    if model.answer == "values" and options.write != "values":
        raise BadRequest(
            f"write (={options.write}) needs classes; model (={model.path}) was trained for"
            " values: use --write values"
        )
    if model.labels and len(model.labels) != profile.classes:
        raise BadRequest(
            f"labels (={', '.join(model.labels):.200}) of model (={model.path}) must name each of"
            f" its {counted(profile.classes, 'output channel')}"
        )


def find_limit(model: Model, profile: Profile, shape: Shape, options: Options) -> Shape | None:
    """Return the size that the network is run on with its own boundary, else None.

    It is the volume's, padded with zeros after its end if the network does not accept that.
    """
    if options.boundary == "mirror":
        return None
    if any(profile.shrink):
        raise BadRequest(
            f"boundary (=network) needs a network that pads its input; {model.path} consumes"
            f" {comma(profile.shrink)} voxels: use mirror"
        )
    return tuple(_next_accepted(model, profile, axis, n) for axis, n in enumerate(shape))


def check_limit(model: Model, profile: Profile, limit: Shape | None, options: Options) -> None:
    """Refuse windows on a size of the whole at which the network leaves its lattice.

    Of a network whose graph cannot be read a size that is as far off its lattice is tried.
    """
    if limit is None or profile.fixed or options.inexact:
        return
    why = ""
    if profile.method == "probe":
        why = try_windows(model, profile, limit).trouble
    else:
        try:
            step, misfits = lattice(export(model.on_meta(), (1, model.channels, *limit)))
        except (NotExported, NoRule) as reason:
            why = str(reason)
        else:
            if misfits or step != profile.context.step:
                why = misfits[0] if misfits else f"its step is {comma(step)} there"
    if why:
        sizes = zip(profile.smallest, profile.context.step, strict=True)
        raise BadRequest(
            f"boundary (=network) cannot be tiled exactly on {comma(limit)} voxels: {why}; use"
            f" mirror, or crop the volume to {comma(s % n for s, n in sizes)} voxels more than a"
            f" multiple of {comma(profile.context.step)}"
        )


def check_precision(model: Model, profile: Profile, dtype: torch.dtype, options: Options) -> None:
    """Refuse a precision in which the network itself does not run."""
    if (
        dtype != model.dtype
        and model.exportable
        and (why := model.refusal(profile.smallest, dtype))
    ):
        raise BadRequest(
            f"precision (={options.precision}) is not what model (={model.path}) runs in: {why};"
            " use float32"
        )


def _next_accepted(model: Model, profile: Profile, axis: int, length: int) -> int:
    """Return the smallest size from ``length`` on that the network takes along one axis."""
    if profile.fixed:
        step, smallest = profile.context.step[axis], profile.smallest[axis]
        return max(smallest, smallest + ceil_to(length - smallest, step))
    last = profile.accepted(axis, length)
    shape = [profile.accepted(a, 256) for a in range(profile.axes)]
    for size in range(length, last):
        shape[axis] = size
        if model.output_shape(tuple(shape)) == tuple(shape):
            return size
    return last


def check_sizes(
    step: Shape, volume: Volume, *, tile: Shape | None, chunks: Shape, shards: Shape | None
) -> None:
    """Refuse sizes off the lattice, and tiles that share a write unit with their neighbours."""
    unit = shards or chunks
    for axis, (length, multiple) in enumerate(zip(volume.shape, step, strict=True)):
        letter = volume.axes[axis]
        for name, sizes in (("tile", tile), ("shards", shards), ("chunks", chunks)):
            if sizes is None or sizes[axis] >= length:
                continue  # one tile, chunk or shard covers the axis
            if sizes[axis] % multiple:
                below, above = sizes[axis] // multiple * multiple, ceil_to(sizes[axis], multiple)
                near = f"{below} or {above}" if below else f"{above}"
                raise BadRequest(
                    f"{name} (={comma(sizes)}) along {letter} must be a multiple of the"
                    f" network's step (={multiple}); nearest: {near}"
                )
        if shards and shards[axis] % chunks[axis]:
            raise BadRequest(
                f"shards (={comma(shards)}) along {letter} must be a multiple of the chunks"
                f" (={comma(chunks)})"
            )
        if tile and tile[axis] < length and tile[axis] % unit[axis]:
            name = "shards" if shards else "chunks"
            raise BadRequest(
                f"tile (={comma(tile)}) along {letter} must be a multiple of the {name}"
                f" (={comma(unit)}), or two tiles write into one; nearest:"
                f" {max(unit[axis], tile[axis] // unit[axis] * unit[axis])}"
            )


def check_sweep(options: Options, tiling: Tiling) -> None:
    """Refuse a sweep where there is no graph to sweep, or a network of fewer axes."""
    if options.strategy == "sweep" and (tiling.graph is None or tiling.leading):
        why = (
            "a network that can be exported and is exact"
            if tiling.graph is None
            else ("a network of as many axes as the volume")
        )
        raise BadRequest(f"strategy (=sweep) needs {why}: use auto")


def check_rank(volume: Volume, options: Options) -> None:
    """Refuse sizes for another number of axes than the volume has."""
    for name, sizes in (
        ("tile", options.tile), ("chunks", options.chunks), ("shards", options.shards)
    ):  # fmt: skip
        if sizes is not None and len(sizes) != len(volume.shape):
            raise BadRequest(
                f"{name} (={comma(sizes)}) must have one size for each of the axes {volume.axes}"
                f" (={comma(volume.shape)})"
            )


def notices(
    volume: Volume, model: Model, profile: Profile, options: Options, strategy: str
) -> Iterator[str]:
    """Yield what the user should know although nothing is refused."""
    yield from source_notices(volume)
    if volume.axes_assumed:
        yield f"the source does not say its axes: {volume.axes} is assumed (--axes overrides)"
    if options.normalize is None and model.normalize is None:
        yield "neither the model nor --normalize says how to scale grey values: used as they are"
    if model.axes < len(volume.shape):
        yield f"a {model.axes}D network on {volume.axes}: applied slice by slice"
    if model.outputs > 1:
        yield f"the model has {model.outputs} outputs: number {model.head} is used (--head)"
    if profile.method == "probe":
        yield "the context was measured by probing: the model's graph cannot be read"
    if profile.autocast:
        yield (
            f"the network turns on torch.autocast ({profile.autocast}): it is run in windows, as"
            " it says, which agree with one pass within the rounding of that type"
        )
    if strategy == "windows" and (why := profile.troubles or profile.off_lattice):
        yield f"INEXACT: windows show seams where there are several, since {why[0]}"


def default_memory(workers: int, device: str = "cpu") -> int:
    """Return how many bytes a worker may use by default: 4 GB, or its share of half the memory.

    The memory is what this process may use of the machine, of its container or of its job. On a
    CUDA device of this machine, the default is nine tenths of what is free there.
    """
    if device == "cuda" and torch.cuda.is_available():
        return int(0.9 * torch.cuda.mem_get_info()[0])
    return min(4 << 30, limits.memory() // (2 * workers))
