"""What tiling needs to know of a network: context, step, sizes, and what stands against it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import nn

from tilepipe.errors import BadRequest
from tilepipe.geometry import Context, Shape, ceil_to
from tilepipe.graph.calls import graph_calls, script_calls
from tilepipe.graph.graph import NotExported, covering, export, lattice, own_context, unbound
from tilepipe.graph.meaning import Meaning, read_meaning
from tilepipe.graph.readings import NoRule
from tilepipe.host.process import borrowed
from tilepipe.models.model import Model, load_model, wrap
from tilepipe.models.probe import probe
from tilepipe.models.trial import try_windows
from tilepipe.text import comma

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

SIZES = (256, 512, 1024, 2048)
"""Where sizes that a network accepts are looked for; on ``meta`` tensors they cost nothing."""
SCAN = 64
"""Consecutive sizes tried from each of them."""
MULTIPLES = 64
"""Multiples of a network's step by which a size that it accepts is let grow."""
OVERLAP = 32
"""Voxels by which windows of a network overlap that reads the whole image and nothing else."""


@dataclass(frozen=True, slots=True)
class Profile:
    """What tiling needs to know of a network, per spatial axis of its input.

    An input of ``smallest + k * step`` voxels gives ``shrink`` voxels fewer; output voxel 0 lies
    over input voxel ``offset``.
    """

    channels: int
    """Channels that the network reads."""
    classes: int
    """Channels that it gives."""
    context: Context
    offset: Shape
    shrink: Shape
    smallest: Shape
    """The smallest size on the lattice that the network accepts."""
    fixed: bool
    """Whether ``smallest`` is the only size that it accepts."""
    troubles: tuple[str, ...]
    """Why the network has no finite context, naming the layers; else empty."""
    off_lattice: tuple[str, ...]
    """Why no windows on a lattice are exact, but regions of the whole graph are; else empty."""
    method: str
    """"graph" (index arithmetic) or "probe" (NaN propagation)."""
    meaning: Meaning = field(default_factory=Meaning)
    """What the network's values are, as far as its graph says it."""
    autocast: str = ""
    """What `torch.autocast` is told inside the network, which regions do not know; else empty."""

    @property
    def lead(self) -> Shape:
        """Voxels that a window begins before what it answers for: no padding is seen there."""
        return tuple(
            offset + ceil_to(max(0, before - offset), step)
            for offset, before, step in zip(
                self.offset, self.context.before, self.context.step, strict=True
            )
        )

    @property
    def by_regions(self) -> bool:
        """Whether regions of the whole image's graph may be computed; else windows are left."""
        return not (self.method != "graph" or self.fixed or self.troubles or self.autocast)

    @property
    def exact(self) -> bool:
        """Whether the network can be tiled exactly: in regions, or in windows on a lattice."""
        return not self.troubles and (self.by_regions or not self.off_lattice)

    @property
    def axes(self) -> int:
        """Spatial axes of the network: 2 or 3."""
        return len(self.shrink)

    def accepted(self, axis: int, size: int) -> int:
        """Return the next size along ``axis``, at least ``size``, on the network's lattice."""
        smallest, step = self.smallest[axis], self.context.step[axis]
        if self.fixed:
            return smallest
        return smallest + max(0, -(-(size - smallest) // step)) * step


def find_profile(model: Model) -> Profile:
    """Return the profile of a model: from its graph, else by probing it.

    Raises `BadRequest` where the network runs at no size.
    """
    if not model.exportable:
        return _probed(model, "")
    best: Profile | None = None
    for shape in [model.fixed] if model.fixed else _shapes(model):
        try:
            profile = _graph_profile(model, shape)
        except (NotExported, NoRule) as reason:
            log.warning("the network's graph cannot be read (%s): it is probed instead", reason)
            return _probed(model, str(reason))
        if best is None or not profile.off_lattice:
            best = profile
        if not profile.off_lattice or any("align_corners" in why for why in profile.off_lattice):
            break
    if best is None:
        raise BadRequest(
            f"model (={model.path}) runs on no input of {model.channels} channels and"
            f" {SIZES[0]} to {SIZES[-1]} voxels per side: {model.refusal((SIZES[0],) * model.axes)}"
        )
    _check_resolution(model, best)
    return _smallest(model, _overlapping(best))


@borrowed()
def context(
    model: str | Path | Model | nn.Module, *, network: str | None = None, head: int | None = None
) -> Context:
    """Return the context of a network: what it reads round a region that it answers for.

    Args:
        model: A model file, what `load_model` returned, or a network in memory.
        network: ``package.module:factory`` or ``file.py:factory`` that builds a state dict's
            network.
        head: Which of several outputs, counted from 0; by default the one that `load_model` was
            asked for, else the first.

    Returns:
        The voxels before and after, and the step, each along the network's axes ``(z) y x``.

    Raises:
        BadRequest: The network has no finite context, or the file is no model.
    """
    if isinstance(model, Model) and head not in (None, model.head):
        raise BadRequest(
            f"head (={head}) must be that of the loaded model (={model.head}): give load_model"
            f" head={head}"
        )
    if isinstance(model, nn.Module):
        modes = [(part, part.training) for part in model.modules()]
        try:
            loaded = wrap(model, head=head or 0)
            profile = find_profile(loaded)
        finally:
            for part, training in modes:
                part.training = training
    else:
        loaded = (
            model
            if isinstance(model, Model)
            else load_model(model, network=network, head=head or 0)
        )
        profile = find_profile(loaded)
    if why := profile.troubles or profile.off_lattice:
        raise BadRequest(f"model (={loaded.path}) has no fixed context: {why[0]}")
    return profile.context


def _shapes(model: Model) -> Iterator[Shape]:
    """Yield the sizes most likely to lie on the network's lattice, best first."""
    for base in SIZES:
        out = model.output_shape((base,) * model.axes)
        if out == (base,) * model.axes:
            yield out
            return
        accepted = []
        for size in range(base, base + SCAN):
            out = model.output_shape((size,) * model.axes)
            if out is not None:
                shrink = size * model.axes - sum(out)
                accepted.append((shrink < 0, shrink, size))
        if accepted:
            yield from ((size,) * model.axes for _, _, size in sorted(accepted)[:4])
            return
    for size in model.sizes:
        if model.output_shape((size,) * model.axes) is not None:
            yield (size,) * model.axes
            return


def _probed(model: Model, reason: str) -> Profile:
    """Return what probing finds, in the same form as what the graph says, and try it.

    ``reason`` says why there is no graph to read, where one was looked for.
    """
    probing = probe(model)
    step = _step(model, probing.shape, probing.shrink, probing.step)
    why = f"; its graph cannot be read: {reason}" if reason else ""
    profile = Profile(
        channels=model.channels,
        classes=model.classes(probing.shape),
        context=probing.context(step or probing.step),
        offset=tuple(n // 2 for n in probing.shrink),
        shrink=probing.shrink,
        smallest=probing.shape,
        fixed=step is None,
        troubles=(probing.trouble + why,) if probing.trouble else (),
        off_lattice=(),
        method="probe",
        meaning=_script_meaning(model),
    )
    _check_resolution(model, profile)
    profile = _smallest(model, _overlapping(profile))
    if not profile.troubles and (trouble := try_windows(model, profile).trouble):
        profile = replace(profile, troubles=(trouble + why,))
    return profile


def _script_meaning(model: Model) -> Meaning:
    """Return what a script's graph says of its output, which is read though not run."""
    call = None if model.script is None else script_calls(model.script, model.head)
    return Meaning() if call is None else read_meaning(call, model.axes)


def _graph_profile(model: Model, shape: Shape) -> Profile:
    """Read context and step from the graph at a size on the network's lattice."""
    graph = export(model.on_meta(), (1, model.channels, *shape))
    if len(graph.out_shape) != len(graph.shape):
        raise BadRequest(f"the network's output (={graph.out_shape}) must have the input's axes")
    own, misfits = lattice(graph)
    shrink = tuple(a - b for a, b in zip(graph.shape[2:], graph.out_shape[2:], strict=True))
    step = None if model.fixed else _step(model, shape, shrink, own)
    if whole := covering(graph):
        if step is not None:
            larger = tuple(n + s for n, s in zip(shape, step, strict=True))
            whole &= covering(export(model.on_meta(), (1, model.channels, *larger)))
        graph = unbound(graph, whole)
        own, misfits = lattice(graph)
        step = None if step is None else _step(model, shape, shrink, own)
    offset = tuple(n // 2 for n in shrink)
    return Profile(
        channels=graph.shape[1],
        classes=graph.out_shape[1],
        context=own_context(graph, step or own),
        offset=offset,
        shrink=shrink,
        smallest=shape,
        fixed=step is None,
        troubles=graph.troubles,
        off_lattice=graph.off_lattice or misfits,
        method="graph",
        meaning=read_meaning(graph_calls(graph), len(shape)),
        autocast=graph.autocast,
    )


def _step(model: Model, shape: Shape, shrink: Shape, own: Shape) -> Shape | None:
    """Return the step by which sizes grow that the network accepts, a multiple of its ``own``.

    None where ``shape`` is the only one that it accepts, as far as is tried.
    """
    for grown, step in _grown(shape, own):
        out = model.output_shape(grown)
        if out == tuple(n - s for n, s in zip(grown, shrink, strict=True)):
            return step
    return None


def _grown(shape: Shape, own: Shape) -> Iterator[tuple[Shape, Shape]]:
    """Yield a size grown by multiples of a step, with each multiple."""
    for times in range(1, MULTIPLES + 1):
        step = tuple(n * times for n in own)
        yield tuple(n + s for n, s in zip(shape, step, strict=True)), step


def _check_resolution(model: Model, profile: Profile) -> None:
    """Refuse a network that takes other sizes, but does not answer for as many voxels more."""
    if not profile.fixed or model.fixed:
        return
    for grown, _ in _grown(profile.smallest, profile.context.step):
        if (out := model.output_shape(grown)) is not None:
            small = model.output_shape(profile.smallest) or ()
            raise BadRequest(
                f"model (={model.path}) gives an output of another resolution than its input"
                f" ({comma(profile.smallest)} to {comma(small)}, {comma(grown)} to {comma(out)});"
                " add upsampling to it"
            )


def _overlapping(profile: Profile) -> Profile:
    """Let windows overlap of a network that reads the whole image, but nothing by the way.

    A context of 0 would be untrue of it, and windows without any overlap show the worst seams.
    """
    if not profile.troubles:
        return profile
    before, after = list(profile.context.before), list(profile.context.after)
    for axis, (size, step) in enumerate(zip(profile.smallest, profile.context.step, strict=True)):
        if not before[axis] and not after[axis]:
            most = (size - step) // 2 if profile.fixed else OVERLAP
            before[axis] = after[axis] = min(ceil_to(OVERLAP, step), most // step * step)
    return replace(profile, context=Context(tuple(before), tuple(after), profile.context.step))


def _smallest(model: Model, profile: Profile) -> Profile:
    """Find the smallest size on the lattice along each axis, by bisection."""
    if profile.fixed:
        return profile
    shape, smallest = profile.smallest, []
    for axis, (size, step) in enumerate(zip(shape, profile.context.step, strict=True)):
        low, high = -1, size // step  # in steps: refused, accepted
        while high - low > 1:
            middle = (low + high) // 2
            tried = list(shape)
            tried[axis] = size % step + middle * step
            out = model.output_shape(tuple(tried))
            fits = out is not None and out[axis] == tried[axis] - profile.shrink[axis] > 0
            low, high = (low, middle) if fits else (middle, high)
        smallest.append(size % step + high * step)
    return replace(profile, smallest=tuple(smallest))
