"""The law of the project: tiles equal one pass over the whole mirrored image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import zoo
from tilepipe.geometry import Region, TileGrid, mirror
from tilepipe.models.spec import Profile, find_profile
from tilepipe.models.windows import Windows, cut, whole
from tilepipe.options import Options
from tilepipe.planning.checks import find_limit

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.geometry import Shape
    from tilepipe.models.model import Model

Floats = "NDArray[np.float64]"
KNOWN: dict[str, tuple[Model, Profile]] = {}


def known(name: str) -> tuple[Model, Profile]:
    if name not in KNOWN:
        model = zoo.build(name)
        KNOWN[name] = model, find_profile(model)
    return KNOWN[name]


def take(image: NDArray[np.float64], region: Region, limit: Shape | None) -> NDArray[np.float64]:
    """Return a region of the mirrored image, or of the image with zeros after its end."""
    for axis, (a, b) in enumerate(zip(region.start, region.stop, strict=True), start=1):
        if limit is None:
            image = np.take(image, mirror(a, b, image.shape[axis]), axis=axis)
        else:
            grown = max(0, b - image.shape[axis])
            pads = [(0, 0)] * image.ndim
            pads[axis] = (0, grown)
            image = np.take(np.pad(image, pads), np.arange(a, b), axis=axis)
    return image


def run(model: Model, image: NDArray[np.float64]) -> NDArray[np.float64]:
    with torch.inference_mode():
        answer = model.module(torch.from_numpy(np.ascontiguousarray(image))[None])[0]
    return np.asarray(answer.numpy(), dtype=np.float64)


def reference(
    model: Model, profile: Profile, image: NDArray[np.float64], limit: Shape | None
) -> NDArray[np.float64]:
    shape = image.shape[1:]
    box = whole(profile, shape, limit)
    answer = run(model, take(image, box, limit))
    origin = tuple(a + o for a, o in zip(box.start, profile.offset, strict=True))
    return answer[(slice(None), *Region.whole(shape).within(origin))]


def tiled(
    model: Model,
    profile: Profile,
    image: NDArray[np.float64],
    limit: Shape | None,
    tile: Shape,
    window: Shape,
) -> NDArray[np.float64]:
    shape = image.shape[1:]
    out = np.full((profile.classes, *shape), np.nan)
    windows = Windows(profile, window, limit)
    for part in TileGrid(shape, tile):
        for one in cut(windows, profile.axes, part.write):
            answer = run(model, take(image, one.read, limit))
            origin = tuple(a + o for a, o in zip(one.read.start, profile.offset, strict=True))
            kept = answer[(slice(None), *one.keep.within(origin))]
            out[(slice(None), *one.keep.slices)] = kept
    assert not np.isnan(out).any()
    return out


def assert_equal(tiles: NDArray[np.float64], truth: NDArray[np.float64]) -> None:
    spread = np.ptp(truth) or 1.0
    assert np.abs(tiles - truth).max() / spread < 1e-12
    if len(truth) > 1:  # ties aside, which rounding decides
        ranked = np.sort(truth, axis=0)
        clear = ranked[-1] - ranked[-2] > 1e-9 * spread
        np.testing.assert_array_equal(tiles.argmax(0)[clear], truth.argmax(0)[clear])


def sizes(profile: Profile, *, most: int, tiles: int) -> st.SearchStrategy[tuple[Shape, ...]]:
    """Draw a volume's shape, a tile and a window, all on the lattice."""
    step = profile.context.step
    volume = st.tuples(*(st.integers(1, most) for _ in step))
    edges = st.tuples(*(st.integers(1, tiles).map(lambda k, s=s: k * s) for s in step))
    return st.tuples(volume, edges, edges)


@pytest.mark.parametrize("name", zoo.FLAT)
@settings(max_examples=4, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_whole_mirrored_image(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    shape, tile, window = data.draw(sizes(profile, most=90, tiles=4))
    image = np.random.default_rng(0).random((profile.channels, *shape))
    truth = reference(model, profile, image, None)
    assert_equal(tiled(model, profile, image, None, tile, window), truth)


@pytest.mark.parametrize("name", zoo.SOLID)
@settings(max_examples=2, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_whole_mirrored_volume(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    shape, tile, window = data.draw(sizes(profile, most=23, tiles=3))
    image = np.random.default_rng(0).random((profile.channels, *shape))
    truth = reference(model, profile, image, None)
    assert_equal(tiled(model, profile, image, None, tile, window), truth)


@pytest.mark.parametrize("name", zoo.PADDED)
@settings(max_examples=3, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_network_on_the_whole_image(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    most = 90 if profile.axes == 2 else 23
    shape, tile, window = data.draw(sizes(profile, most=most, tiles=4))
    limit = find_limit(model, profile, shape, Options(boundary="network"))
    assert limit is not None
    image = np.random.default_rng(0).random((profile.channels, *shape))
    truth = run(model, take(image, Region.whole(limit), limit))
    truth = truth[(slice(None), *Region.whole(shape).slices)]
    assert_equal(tiled(model, profile, image, limit, tile, window), truth)


def test_tiling_off_the_lattice_changes_the_answer() -> None:
    """The tests above can fail: by the network's raw output size, depth 4 is wrong."""
    model, profile = known("valid unet")
    image = np.random.default_rng(0).random((1, 64, 64))
    truth = reference(model, profile, image, None)
    wrong = run(model, take(image, Region((-44, -40), (-44 + 92, -40 + 92)), None))
    assert np.abs(wrong[:, :4, :4] - truth[:, :4, 4:8]).max() > 1e-3 * np.ptp(truth)
