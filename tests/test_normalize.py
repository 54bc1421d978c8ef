"""Grey values are mapped by what the whole volume says, never by a tile."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support import noise, write_volume
from tilepipe.errors import BadRequest
from tilepipe.normalize import Normalization, parse, resolve
from tilepipe.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int16", "int32", "float32"])
@pytest.mark.parametrize("rule", ["zscore", "percentile:2,99.5"])
def test_statistics_are_those_of_the_whole_volume(tmp_path: Path, dtype: str, rule: str) -> None:
    image = noise(2, 9, 31, 27, dtype=dtype)
    image[1] = image[1] // 3 if image.dtype.kind != "f" else image[1] / 3
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "czyx", chunks=(1, 4, 8, 8)))
    found = resolve(parse(rule), volume)
    for channel, values in enumerate(image.reshape(2, -1).astype(float)):
        center, spread = found.center[channel], 1 / found.scale[channel]
        if rule == "zscore":
            assert center == pytest.approx(values.mean(), rel=1e-9, abs=1e-9 * values.std())
            assert spread == pytest.approx(values.std(), rel=1e-9)
            continue
        grain = np.ptp(values) / 65536 if np.dtype(dtype).itemsize > 2 else 0
        for percent, value in ((2, center), (99.5, center + spread)):
            below, above = (np.percentile(values, percent, method=m) for m in ("lower", "higher"))
            assert below - 1.01 * grain <= value <= above + 1.01 * grain


def test_a_map_of_grey_values_is_applied_per_channel() -> None:
    image = np.array([[[10, 20]], [[1, 3]]], dtype="uint8")
    found = Normalization((10.0, 1.0), (0.1, 0.5)).apply(image)
    np.testing.assert_allclose(found, [[[0, 1]], [[0, 1]]])


def test_values_that_are_not_finite_do_not_count(tmp_path: Path) -> None:
    image = noise(20, 20, dtype="float32")
    image[3, 4], image[5, 6] = np.nan, np.inf
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx"))
    found = resolve(parse("zscore"), volume)
    good = image[np.isfinite(image)].astype(float)
    assert found.center[0] == pytest.approx(good.mean())
    assert found.scale[0] == pytest.approx(1 / good.std())


@pytest.mark.parametrize("rule", ["zscore", "percentile:1,99"])
def test_a_constant_volume_is_refused(tmp_path: Path, rule: str) -> None:
    volume = open_volume(write_volume(tmp_path / "v.zarr", np.full((9, 9), 7, "u1"), "yx"))
    with pytest.raises(BadRequest, match="channel 0 is constant"):
        resolve(parse(rule), volume)


def test_wide_types_keep_their_digits(tmp_path: Path) -> None:
    image = (noise(16, 16, dtype="float64") + 1e9).astype(np.float64)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx"))
    found = resolve(parse("zscore"), volume).apply(image[None])
    np.testing.assert_allclose(found[0], (image - image.mean()) / image.std(), atol=1e-4)
