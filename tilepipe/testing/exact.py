"""The law of the project as a check: tiles equal one pass over the whole image.

A test of a network of one's own draws sizes and compares:

    from hypothesis import given
    from tilepipe.models.model import load_model
    from tilepipe.models.spec import find_profile
    from tilepipe.testing import exact, strategies

    model = load_model("my-network.pt2")
    profile = find_profile(model)
    model.module.double()  # after its profile, which looks at the network as it was saved

    @given(sizes=strategies.tiling_sizes(profile.context.step, largest=90))
    def test_my_network_is_tiled_exactly(sizes):
        exact.check_tiling(model, profile, sizes)

Images are ``(channels, *axes)`` and answers ``(classes, *axes)``, both in float64, so that rounding
cannot hide a wrong voxel.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from tilepipe.geometry import Region, Shape, TileGrid, mirror
from tilepipe.models.windows import Windows, cut, whole

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.testing.sizes import TilingSizes

ROUNDING = 1e-12
"""By how much of the answer's range the float64 values of two ways to compute may differ."""
TIE = 1e-9
"""By how much of the range the best class must lead for a voxel's label to be compared."""


def take(image: NDArray[np.float64], region: Region, limit: Shape | None) -> NDArray[np.float64]:
    """Return a region of the mirrored image, or of the image with zeros after its end.

    Args:
        image: Voxels ``(channels, *axes)``.
        region: The box; it may reach outside the image.
        limit: None to mirror the image. Otherwise the shape to which zeros grow the image, in
            voxels, as ``boundary="network"`` does.

    Returns:
        Voxels ``(channels, *region.shape)``.
    """
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True), start=1):
        if limit is None:
            image = np.take(image, mirror(a, b, image.shape[axis]), axis=axis)
        else:
            pads = [(0, 0)] * image.ndim
            pads[axis] = (0, max(0, b - image.shape[axis]))
            image = np.take(np.pad(image, pads), np.arange(a, b), axis=axis)
    return image


def run_network(model: Model, image: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the network's answer ``(classes, *axes)`` to an image ``(channels, *axes)``."""
    with torch.inference_mode():
        answer = model.module(torch.from_numpy(np.ascontiguousarray(image))[None])[0]
    return np.asarray(answer.numpy(), dtype=np.float64)


def whole_pass(
    model: Model, profile: Profile, image: NDArray[np.float64], limit: Shape | None = None
) -> NDArray[np.float64]:
    """Return the answer of one pass over the whole image, without what the mirror added.

    Args:
        model: The network, in float64.
        profile: What `tilepipe.models.spec.find_profile` knows of it.
        image: Voxels ``(channels, *axes)``.
        limit: See `take`.

    Returns:
        Values ``(classes, *axes)``, one for each voxel of the image.
    """
    shape = image.shape[1:]
    box = whole(profile, shape, limit)
    answer = run_network(model, take(image, box, limit))
    origin = tuple(a + o for a, o in zip(box.start, profile.offset, strict=True))
    return answer[(slice(None), *Region.whole(shape).within(origin))]


def tiled_pass(
    model: Model,
    profile: Profile,
    image: NDArray[np.float64],
    tile: Shape,
    window: Shape,
    limit: Shape | None = None,
) -> NDArray[np.float64]:
    """Return the answer that tiles of windows give, each computed from just the voxels it reads.

    Args:
        model: The network, in float64.
        profile: What `tilepipe.models.spec.find_profile` knows of it.
        image: Voxels ``(channels, *axes)``.
        tile: Voxels of a tile along each axis; a multiple of the network's step.
        window: Voxels along each axis for which the network answers in one call.
        limit: See `take`.

    Returns:
        Values ``(classes, *axes)``, one for each voxel of the image.
    """
    shape = image.shape[1:]
    values = np.full((profile.classes, *shape), np.nan)
    windows = Windows(profile, window, limit)
    for part in TileGrid(shape, tile):
        for box in cut(windows, profile.axes, part.write):
            answer = run_network(model, take(image, box.read, limit))
            origin = tuple(a + o for a, o in zip(box.read.start, profile.offset, strict=True))
            values[(slice(None), *box.keep.slices)] = answer[
                (slice(None), *box.keep.within(origin))
            ]
    assert not np.isnan(values).any(), "the tiles do not cover every voxel"
    return values


def check_equal(values: NDArray[np.float64], truth: NDArray[np.float64]) -> None:
    """Fail where two answers differ by more than rounding, or in a label that is no tie.

    Args:
        values: Values ``(classes, *axes)``.
        truth: The values that they must equal, of the same shape.

    Raises:
        AssertionError: The answers differ.
    """
    spread = np.ptp(truth) or 1.0
    assert np.abs(values - truth).max() / spread < ROUNDING
    if len(truth) > 1:
        ranked = np.sort(truth, axis=0)
        clear = ranked[-1] - ranked[-2] > TIE * spread
        np.testing.assert_array_equal(values.argmax(0)[clear], truth.argmax(0)[clear])


def check_tiling(model: Model, profile: Profile, sizes: TilingSizes, *, seed: int = 0) -> None:
    """Fail unless a network's tiles equal its one pass over a whole mirrored image of noise.

    Args:
        model: The network, in float64.
        profile: What `tilepipe.models.spec.find_profile` knows of it.
        sizes: The sizes, such as `tilepipe.testing.strategies.tiling_sizes` draws.
        seed: The seed of the image's grey values, which lie in 0 to 1.

    Raises:
        AssertionError: A voxel differs.
    """
    image = np.random.default_rng(seed).random((profile.channels, *sizes.shape))
    truth = whole_pass(model, profile, image)
    check_equal(tiled_pass(model, profile, image, sizes.tile, sizes.window), truth)
