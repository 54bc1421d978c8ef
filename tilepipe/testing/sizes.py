"""The sizes with which a check tiles an image."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from tilepipe.geometry import Shape


class TilingSizes(NamedTuple):
    """The sizes with which an image is tiled, each in voxels along each axis."""

    shape: Shape
    """The image."""
    tile: Shape
    """A tile; a multiple of the network's step."""
    window: Shape
    """What the network answers for in one call; a multiple of the step, too."""
