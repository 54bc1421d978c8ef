"""The law of the project: tiles equal one pass over the whole mirrored image."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilepipe.geometry import Region
from tilepipe.models.spec import Profile, find_profile
from tilepipe.options import Options
from tilepipe.planning.checks import find_limit
from tilepipe.testing import zoo
from tilepipe.testing.exact import (
    check_equal,
    check_tiling,
    run_network,
    take,
    tiled_pass,
    whole_pass,
)
from tilepipe.testing.sizes import TilingSizes
from tilepipe.testing.strategies import tiling_sizes

if TYPE_CHECKING:
    from tilepipe.models.model import Model

KNOWN: dict[str, tuple[Model, Profile]] = {}


def known(name: str) -> tuple[Model, Profile]:
    if name not in KNOWN:
        model = zoo.build(name)
        KNOWN[name] = model, find_profile(model)
    return KNOWN[name]


@pytest.mark.parametrize("name", zoo.FLAT)
@settings(max_examples=4, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_whole_mirrored_image(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    check_tiling(model, profile, data.draw(tiling_sizes(profile.context.step, largest=90)))


@pytest.mark.parametrize("name", zoo.SOLID)
@settings(max_examples=2, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_whole_mirrored_volume(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    check_tiling(model, profile, data.draw(tiling_sizes(profile.context.step, largest=23, steps=3)))


@pytest.mark.parametrize("name", zoo.PADDED)
@settings(max_examples=3, derandomize=True)
@given(data=st.data())
def test_tiles_equal_the_network_on_the_whole_image(name: str, data: st.DataObject) -> None:
    model, profile = known(name)
    largest = 90 if profile.axes == 2 else 23
    sizes = data.draw(tiling_sizes(profile.context.step, largest=largest))
    limit = find_limit(model, profile, sizes.shape, Options(boundary="network"))
    assert limit is not None
    image = np.random.default_rng(0).random((profile.channels, *sizes.shape))
    truth = run_network(model, take(image, Region.whole(limit), limit))
    truth = truth[(slice(None), *Region.whole(sizes.shape).slices)]
    check_equal(tiled_pass(model, profile, image, sizes.tile, sizes.window, limit), truth)


def test_tiling_off_the_lattice_changes_the_answer() -> None:
    """The tests above can fail: by the network's raw output size, depth 4 is wrong."""
    model, profile = known("valid unet")
    image = np.random.default_rng(0).random((1, 64, 64))
    truth = whole_pass(model, profile, image)
    wrong = run_network(model, take(image, Region((-44, -40), (-44 + 92, -40 + 92)), None))
    assert np.abs(wrong[:, :4, :4] - truth[:, :4, 4:8]).max() > 1e-3 * np.ptp(truth)
    with pytest.raises(AssertionError):
        check_equal(wrong[:, :4, :4], truth[:, :4, 4:8])
    with pytest.raises(AssertionError):
        check_tiling(model, profile, TilingSizes((64, 64), (4, 4), (4, 4)))
