"""What tiling needs to know of a network: context, step, sizes, and what stands against it."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from tilepipe.errors import BadRequest, comma
from tilepipe.geometry import Context, Shape, ceil_to
from tilepipe.model import Model, load_model, wrap
from tilepipe.network import Graph, NotExported, activation, export, lattice, own_context
from tilepipe.operations import NoRule
from tilepipe.probe import probe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

log = logging.getLogger(__name__)

SIZES = (256, 512, 1024, 2048)
"""Where sizes that a network accepts are looked for; on ``meta`` tensors they cost nothing."""
SCAN = 64
"""Consecutive sizes tried from each of them."""


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
    activation: str = ""
    """"sigmoid" or "softmax" where the network ends in it; else it gives logits."""

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

    Raises `BadRequest` where the network runs at no size, or has an operation without a rule.
    """
    if model.fixed:
        return _graph_profile(model, model.fixed)
    if not model.exportable:
        return _probed(model)
    best: Profile | None = None
    place: Shape = ()
    for size in _sizes(model):
        shape = (size,) * model.axes
        try:
            found = _graph_profile(model, shape)
        except NotExported as reason:
            log.warning("the network cannot be exported (%s): it is probed instead", reason)
            return _probed(model)
        if best is None or not found.off_lattice:
            best, place = found, shape
        if not found.off_lattice or any("align_corners" in why for why in found.off_lattice):
            break
    if best is None:
        raise BadRequest(
            f"model (={model.path}) runs on no input of {model.channels} channels and"
            f" {SIZES[0]} to {SIZES[-1]} voxels per side: {model.refusal((SIZES[0],) * model.axes)}"
        )
    return _smallest(model, best, place)


def context(model: str | Path | Model | nn.Module, *, network: str | None = None) -> Context:
    """Return the context of a network: voxels before and after, and step, for each axis.

    ``model`` is a file, what `load_model` gave, or a network in memory; ``network`` builds a state
    dict's. Raises `BadRequest` where the network has no finite context.
    """
    if isinstance(model, nn.Module):
        model = wrap(model)
    loaded = model if isinstance(model, Model) else load_model(model, network=network)
    profile = find_profile(loaded)
    if why := profile.troubles or profile.off_lattice:
        raise BadRequest(f"model (={loaded.path}) has no fixed context: {why[0]}")
    return profile.context


def _sizes(model: Model) -> Iterator[int]:
    """Yield the sizes most likely to lie on the network's lattice, best first."""
    for base in SIZES:
        out = model.output_shape((base,) * model.axes)
        if out == (base,) * model.axes:
            yield base
            return
        found = []
        for size in range(base, base + SCAN):
            out = model.output_shape((size,) * model.axes)
            if out is not None:
                shrink = size * model.axes - sum(out)
                found.append((shrink < 0, shrink, size))
        if found:
            yield from (size for _, _, size in sorted(found)[:4])
            return


def _probed(model: Model) -> Profile:
    """Return what probing finds, in the same form as what the graph says."""
    size, shrink, context, troubles = probe(model)
    found = Profile(
        channels=model.channels,
        classes=model.classes(size),
        context=context,
        offset=tuple(n // 2 for n in shrink),
        shrink=shrink,
        smallest=size,
        fixed=False,
        troubles=troubles,
        off_lattice=(),
        method="probe",
        activation=model.script_activation(),
    )
    return _smallest(model, found, size)


def _graph_profile(model: Model, shape: Shape) -> Profile:
    try:
        graph = export(model.on_meta(), (1, model.channels, *shape))
    except NoRule as reason:
        raise BadRequest(f"model (={model.path}) cannot be tiled exactly: {reason}") from None
    return _profile(graph, shape, fixed=model.fixed is not None)


def _profile(graph: Graph, shape: Shape, *, fixed: bool) -> Profile:
    """Read context and step from the graph at a size on the network's lattice."""
    if len(graph.out_shape) != len(graph.shape):
        raise BadRequest(f"the network's output (={graph.out_shape}) must have the input's axes")
    shrink = tuple(a - b for a, b in zip(graph.shape[2:], graph.out_shape[2:], strict=True))
    offset = tuple(n // 2 for n in shrink)
    return Profile(
        channels=graph.shape[1],
        classes=graph.out_shape[1],
        context=own_context(graph),
        offset=offset,
        shrink=shrink,
        smallest=shape,
        fixed=fixed,
        troubles=graph.troubles,
        off_lattice=graph.off_lattice or lattice(graph)[1],
        method="graph",
        activation=activation(graph),
    )


def _smallest(model: Model, found: Profile, shape: Shape) -> Profile:
    """Find the smallest size on the lattice of ``shape`` along each axis, by bisection."""
    grown = tuple(n + s for n, s in zip(shape, found.context.step, strict=True))
    out = model.output_shape(grown)
    if out is None:
        raise BadRequest(
            f"model (={model.path}) reads {comma(shape)} voxels, and refuses a step more, "
            f"{comma(grown)}: {model.refusal(grown)}"
        )
    if out != tuple(n - s for n, s in zip(grown, found.shrink, strict=True)):
        raise BadRequest(
            f"model (={model.path}) gives an output of another resolution than its input"
            f" ({comma(shape)} to {comma(model.output_shape(shape) or ())}, {comma(grown)} to"
            f" {comma(out)}); add upsampling to it"
        )
    smallest = []
    for axis, (size, step) in enumerate(zip(shape, found.context.step, strict=True)):
        low, high = -1, size // step  # in steps: refused, accepted
        while high - low > 1:
            middle = (low + high) // 2
            tried = list(shape)
            tried[axis] = size % step + middle * step
            out = model.output_shape(tuple(tried))
            fits = out is not None and out[axis] == tried[axis] - found.shrink[axis] > 0
            low, high = (low, middle) if fits else (middle, high)
        smallest.append(size % step + high * step)
    return replace(found, smallest=tuple(smallest))
