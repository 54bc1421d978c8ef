"""Grey values are mapped by what the whole volume says, never by a tile."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.support import noise, write_volume
from tilepipe.errors import BadRequest
from tilepipe.volumes import quantiles
from tilepipe.volumes.normalize import Normalization, parse, resolve
from tilepipe.volumes.overlay import stretch
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray


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
        low, high = np.percentile(values, (2, 99.5))
        assert center == pytest.approx(low, rel=1e-12)
        assert spread == pytest.approx(high - low, rel=1e-12)


def hostile(dtype: str) -> dict[str, NDArray[np.generic]]:
    """Return volumes ``(8, 12, 12)`` whose statistics are easily got wrong."""
    random, kind, shape = np.random.default_rng(1), np.dtype(dtype), (8, 12, 12)
    some = noise(*shape, dtype=dtype)
    if kind.kind != "f":
        low, high = np.iinfo(kind).min, np.iinfo(kind).max
        close = random.integers(high - 99, high, shape, dtype=dtype, endpoint=True)
        extremes = random.choice(np.array([low, low + 1, high - 1, high], dtype), shape)
        outlier = random.integers(0, 9, shape, dtype=dtype)
        outlier[3, 4, 5] = high
        return {"all": some, "close": close, "extremes": extremes, "outlier": outlier}
    info = np.finfo(kind)
    outlier = random.normal(size=shape).astype(kind)
    outlier[3, 4, 5] = 1e12 if kind.itemsize > 2 else info.max
    holes = random.normal(size=shape).astype(kind)
    holes[random.random(shape) < 0.3] = np.nan
    holes[random.random(shape) < 0.1] = np.inf
    holes[random.random(shape) < 0.1] = -np.inf
    zeros = np.where(random.random(shape) < 0.4, -0.0, random.normal(size=shape)).astype(kind)
    tiny = (random.integers(-999, 999, shape) * float(info.smallest_subnormal)).astype(kind)
    repeats = random.choice(np.array([-1.5, 0.25, 7], kind), shape)
    return {"all": some, "outlier": outlier, "holes": holes, "zeros": zeros, "tiny": tiny,
            "repeats": repeats}  # fmt: skip


HOSTILE = [
    (dtype, name)
    for dtype in ("uint8", "int16", "float16", "uint32", "int32", "float32", "float64", "int64",
                  "uint64")
    for name in hostile(dtype)
]  # fmt: skip


def exact_quantile(values: NDArray[np.generic], percent: float) -> Fraction:
    """Return what `numpy.percentile` means, without any rounding but that of the rank."""
    rank = percent / 100 * (values.size - 1)
    ends = np.sort(values)[[math.floor(rank), math.ceil(rank)]]
    ordered = [Fraction(value) for value in ends.tolist()]
    return ordered[0] + (ordered[1] - ordered[0]) * Fraction(rank - int(rank))


@pytest.mark.parametrize(("dtype", "name"), HOSTILE)
def test_percentiles_are_exact_on_hostile_values(tmp_path: Path, dtype: str, name: str) -> None:
    image = np.stack([hostile(dtype)["all"], hostile(dtype)[name]])
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "czyx", chunks=(1, 3, 12, 7)))
    if (dtype, name) == ("float64", "tiny"):  # of whose width there is no reciprocal
        with pytest.raises(BadRequest, match=r"channel 1 .* too close"):
            resolve(parse("percentile:1,97.3"), volume)
        return
    found = resolve(parse("percentile:1,97.3"), volume)
    for channel, voxels in enumerate(image):
        values = voxels[np.isfinite(voxels)] if image.dtype.kind == "f" else voxels.ravel()
        low, high = (exact_quantile(values, percent) for percent in (1, 97.3))
        base = found.base[channel] if found.base else 0
        assert float(base + Fraction(found.center[channel])) == pytest.approx(float(low), rel=1e-12)
        assert 1 / found.scale[channel] == pytest.approx(float(high - low), rel=1e-12)
        if np.dtype(dtype).itemsize < 8:
            wide = values.astype(float)
            assert float(low) == pytest.approx(np.percentile(wide, 1), rel=1e-12)
        grey = found.apply(image)[channel].astype(float)
        for place in [(0, 0, 0), (3, 4, 5), (7, 11, 11)]:
            if np.isfinite(voxels[place]):
                wanted = float((Fraction(voxels[place].item()) - low) / (high - low))
                assert grey[place] == pytest.approx(wanted, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize(("dtype", "name"), HOSTILE)
def test_moments_are_those_of_numpy_on_hostile_values(
    tmp_path: Path, dtype: str, name: str
) -> None:
    image = np.stack([hostile(dtype)["all"], hostile(dtype)[name]])
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "czyx", chunks=(1, 3, 12, 7)))
    if (dtype, name) == ("float64", "tiny"):  # the squares are nothing
        with pytest.raises(BadRequest, match=r"channel 1 .* too close"):
            resolve(parse("zscore"), volume)
        return
    found = resolve(parse("zscore"), volume)
    for channel, voxels in enumerate(image):
        values = voxels[np.isfinite(voxels)] if image.dtype.kind == "f" else voxels.ravel()
        exact = [Fraction(value) for value in values.tolist()]
        mean = sum(exact, Fraction(0)) / len(exact)
        deviation = math.sqrt(sum((value - mean) ** 2 for value in exact) / len(exact))
        base = found.base[channel] if found.base else 0
        center = float(base + Fraction(found.center[channel]) - mean)
        assert center == pytest.approx(0, abs=1e-9 * deviation + 1e-15 * abs(float(mean)))
        assert 1 / found.scale[channel] == pytest.approx(deviation, rel=1e-9)


@pytest.mark.parametrize("rule", ["zscore", "percentile:1,99"])
@pytest.mark.parametrize(
    ("image", "said"),
    [
        (np.full((20, 30), 0.1), "is constant, 0.1: use none or scale"),
        (np.full((20, 30), np.nan), "holds no finite value"),
        (np.where(np.arange(600) % 2, 0.0, -0.0).reshape(20, 30), "is constant"),
        (np.where(np.arange(600) % 2, 1.7e308, -1.7e308).reshape(20, 30), "too far apart"),
        (np.where(np.arange(600) % 2, 5e-324, 0).reshape(20, 30), "too close"),
        (np.full((20, 30), 2**63 - 1), "is constant, 9223372036854775807: use none"),
    ],
)
def test_the_true_cause_is_said_of_values_that_cannot_be_normalized(
    tmp_path: Path, rule: str, image: NDArray[np.generic], said: str
) -> None:
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx", chunks=(7, 7)))
    with pytest.raises(BadRequest, match=f"channel 0 .*{said}|channel 0 {said}"):
        resolve(parse(rule), volume)


def test_a_sparse_volume_is_not_called_constant(tmp_path: Path) -> None:
    image = np.zeros((40, 50), "uint8")
    image[:2, :9] = 200
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx"))
    with pytest.raises(BadRequest, match=r"percentile:1,99\) .* channel 0 are both 0, .* 0 to 200"):
        resolve(parse("percentile:1,99"), volume)
    assert resolve(parse("percentile:1,99.9"), volume).scale == (1 / 200,)


def crowd(name: str) -> NDArray[np.generic]:
    """Return 40,000 values of a name's kind, of which some percentiles lie in a crowd."""
    random, size = np.random.default_rng(3), 40_000
    kind, _, about = name.partition(" ")
    if about == "everything":
        bits = random.integers(0, 2**64 - 1, size, "uint64", endpoint=True)
        return bits.view(kind) if kind[-2:] == "64" else bits.astype("uint32").view(kind)
    values = {
        "": lambda: random.normal(size=size),
        "to 1": lambda: random.random(size),
        "masked": lambda: np.maximum(0, random.normal(size=size)),
        "grey": lambda: random.integers(0, 65536, size),
        "small": lambda: random.integers(-1000, 1000, size),
        "half": lambda: random.integers(0, 2**31, size),
    }
    return values[about]().astype(kind)


@pytest.mark.parametrize(
    ("name", "room", "passes"),
    [("uint16 grey", 0, 1), ("float16", 0, 1), ("int32 small", 0, 1), ("int64 grey", 0, 1),
     ("int64 small", 0, 1), ("float32", 0, 2), ("float32 masked", 0, 2), ("uint32 half", 0, 2),
     ("float64", 1000, 2), ("float64 to 1", 1000, 2), ("float64 masked", 1000, 2),
     ("int64 half", 1000, 2), ("int64 everything", 1000, 2), ("uint64 everything", 1000, 2),
     ("uint64 everything", 0, 3)],
)  # fmt: skip
def test_percentiles_take_few_passes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int, passes: int
) -> None:
    """One for 16 bits, two else: no more than a histogram between the extremes takes."""
    monkeypatch.setattr(quantiles, "ROOM", room)
    image = crowd(name).reshape(200, 200)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx", chunks=(16, 200)))
    blocks: list[tuple[int, int]] = []
    resolve(parse("percentile:1,99.8"), volume, lambda done, number: blocks.append((done, number)))
    assert sum(done == number for done, number in blocks) == passes


@pytest.mark.parametrize("room", [0, 300], ids=["counted", "gathered"])
@pytest.mark.parametrize("order", ["as they come", "rising", "falling", "outward"])
@pytest.mark.parametrize("name", ["uint16 grey", "int64 everything", "float32 masked", "float64"])
def test_bins_grow_in_whatever_order_values_come(
    monkeypatch: pytest.MonkeyPatch, name: str, order: str, room: int
) -> None:
    """With bins so few and pieces so small that they grow all the time."""
    monkeypatch.setattr(quantiles, "DIGIT", 3)
    monkeypatch.setattr(quantiles, "PIECE", 7)
    monkeypatch.setattr(quantiles, "ROOM", room)
    values = crowd(name)[:1500]
    ranked = np.sort(values)
    orders = {
        "as they come": values,
        "rising": ranked,
        "falling": ranked[::-1].copy(),
        "outward": np.stack([ranked[:750][::-1], ranked[750:]], axis=1).ravel(),
    }
    blocks = [[part] for part in np.array_split(orders[order], 9)]
    fractions = (0, 0.01, 0.3, 0.5, 0.998, 1)
    (found,) = quantiles.order_statistics(lambda: blocks, values.dtype, 1, fractions)
    assert (found.count, found.least, found.greatest) == (1500, ranked[0], ranked[-1])
    for fraction, (low, high, within) in zip(fractions, found.neighbours, strict=True):
        rank = fraction * 1499
        assert (low, high) == (ranked[math.floor(rank)], ranked[math.ceil(rank)]) or within == 0
        assert low == ranked[math.floor(rank)]
        assert within == rank - math.floor(rank)


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


def test_a_value_too_large_for_float32_is_not_taken_for_infinite() -> None:
    image = np.array([[1e300, -1e300, np.inf, np.nan, 2.0]])
    found = Normalization((0.0,), (1.0,)).apply(image)[0]
    limit = np.finfo(np.float32).max
    np.testing.assert_array_equal(found, np.float32([limit, -limit, np.inf, np.nan, 2]))


def test_float32_far_from_zero_keeps_its_digits(tmp_path: Path) -> None:
    image = (1e4 + noise(16, 16, dtype="float32") / 10).astype(np.float32)
    volume = open_volume(write_volume(tmp_path / "v.zarr", image, "yx"))
    found = resolve(parse("zscore"), volume).apply(image[None])[0]
    wide = image.astype(float)
    np.testing.assert_allclose(found, (wide - wide.mean()) / wide.std(), atol=1e-5)


@pytest.mark.parametrize(
    "image",
    [
        np.where(np.arange(400) == 7, np.nan, np.arange(400.0)),
        np.where(np.arange(400) == 7, np.inf, np.arange(400.0)),
        np.full(400, np.nan),
        np.full(400, 3, "uint8"),
        np.where(np.arange(400) == 7, 200, 0).astype("uint8"),
        np.array([-1.7e308, 1.7e308] * 200),
    ],
)
def test_a_picture_is_drawn_of_any_values(image: NDArray[np.generic]) -> None:
    grey = stretch(image.reshape(20, 20)).ravel()
    order = np.argsort(np.where(np.isfinite(image), image, 0).astype(float), kind="stable")
    known = order[np.isfinite(image[order])]
    assert (np.diff(grey[known].astype(int)) >= 0).all()
    if len(known) and image[known].min() < image[known].max():
        assert (grey[known[0]], grey[known[-1]]) == (0, 255)
