"""What a network takes: the axes and channels of its input, found by trying it on shapes alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilepipe.geometry import Shape
    from tilepipe.models.model import Model

USUAL = range(256, 256 + 64)
"""Sides of inputs that are tried first."""
SINGLE = (*range(16, 512, 4), *range(512, 1025, 16))
"""Sides that are tried where none of those is accepted: what networks of one size are built for."""


def find_input(model: Model, shape: Shape | None, channels: int | None) -> None:
    """Find the axes and channels that the network reads, and how many outputs it has."""
    _find_axes(model, shape, channels)
    if 0 < model.outputs <= model.head:
        raise BadRequest(
            f"head (={model.head}) must be below the {model.outputs} outputs of {model.path},"
            " which are counted from 0"
        )


def _find_axes(model: Model, shape: Shape | None, channels: int | None) -> None:
    """Find the number of axes and channels that the network reads, by trying its own weights.

    The volume's own ``channels`` come first: weights need not tell, and some take any number.
    """
    if shape is not None:
        if len(shape) not in (4, 5) or shape[0] > 1 or not shape[1]:
            raise BadRequest(
                f"model (={model.path}) was exported for inputs of shape {shape};"
                " export it for batch 1, fixed channels and 2 or 3 axes"
            )
        model.axes, model.channels = len(shape) - 2, shape[1]
        model.fixed = shape[2:] if all(shape[2:]) else None
        _accepts(model, USUAL)
        return
    weights = [p for p in model.module.parameters() if p.ndim in (4, 5)]
    if not weights:
        raise BadRequest(f"model (={model.path}) has no convolution in 2 or 3 dimensions")
    counts = [] if channels is None else [channels]
    tried = dict.fromkeys((p.ndim - 2, n) for n in counts for p in weights)
    tried |= dict.fromkeys((p.ndim - 2, int(n)) for p in weights for n in p.shape[1::-1])
    first = next(iter(dict.fromkeys((p.ndim - 2, int(p.shape[1])) for p in weights)))
    for sizes in (USUAL, SINGLE):
        for axes, count in tried:
            model.axes, model.channels = axes, count
            if _accepts(model, sizes):
                return
    model.axes, model.channels = first


def _accepts(model: Model, sizes: Sequence[int] = ()) -> bool:
    """Whether the network runs on any of the sizes that are tried."""
    if model.fixed:
        return model.output_shape(model.fixed) is not None
    for size in sizes:
        if model.output_shape((size,) * model.axes) is not None:
            model.accepted_side = size
            return True
    return False
