"""Laws of reading: every format gives the same voxels, and mirrored regions equal numpy.pad."""

from __future__ import annotations

import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from packaging.version import Version

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.testing.strategies import regions
from tilepipe.volumes.borders import read_mirrored, read_zero_padded
from tilepipe.volumes.ome import parse_multiscale
from tilepipe.volumes.tiff import plain_axes
from tilepipe.volumes.volume import Volume, open_volume

if TYPE_CHECKING:
    from pathlib import Path

SHAPE = (5, 23, 30)
VOXELS = np.random.default_rng(0).integers(0, 256, SHAPE).astype(np.uint8)
BLOSC = zarr.codecs.BloscCodec()


def whole(volume: Volume) -> Any:
    return volume.read(Region.whole(volume.shape))


def group(path: Path, attributes: dict[str, Any], version: int = 3) -> Any:
    return zarr.create_group(path, zarr_format=version, attributes=attributes)


def ome(axes: str, scale: list[float], paths: tuple[str, ...] = ("0",), **more: Any) -> Any:
    transformation = {"type": "scale", "scale": scale}
    datasets = [{"path": p, "coordinateTransformations": [transformation]} for p in paths]
    kinds = {"t": "time", "c": "channel"}
    named = [{"name": a, "type": kinds.get(a, "space"), "unit": "micrometer"} for a in axes]
    image = {"axes": named, "datasets": datasets, **more}
    return {"ome": {"version": "0.5", "multiscales": [image]}}


@pytest.mark.parametrize("dtype", ["u1", "<u2", ">u2", ">i4", ">f4", "f8", "f2", "i1", "u8"])
@pytest.mark.parametrize(
    "layout",
    [
        {"zarr_format": 2, "chunks": (2, 8, 30)},
        {"zarr_format": 2, "chunks": (5, 7, 9), "compressors": None},
        {
            "zarr_format": 2,
            "chunks": (1, 23, 8),
            "chunk_key_encoding": {"name": "v2", "separator": "/"},
        },
        {"zarr_format": 3, "chunks": (64, 64, 64), "compressors": BLOSC},
        {"zarr_format": 3, "chunks": (2, 4, 5), "shards": (4, 8, 10)},
        {
            "zarr_format": 3,
            "chunks": (2, 4, 5),
            "compressors": None,
            "chunk_key_encoding": {"name": "default", "separator": "."},
        },
    ],
)
def test_every_zarr_reads_the_same(tmp_path: Path, layout: dict[str, Any], dtype: str) -> None:
    voxels = VOXELS.astype(dtype)
    array = zarr.create_array(tmp_path / "v.zarr", shape=SHAPE, dtype=dtype, **layout)
    array[...] = voxels
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.dtype == np.dtype(dtype).newbyteorder("=")
    assert volume.dtype.isnative
    assert volume.axes_assumed
    assert (volume.axes, volume.shape, volume.channels) == ("zyx", SHAPE, 1)
    assert not volume.has_channels
    assert volume.chunks == layout["chunks"]
    assert volume.shards == layout.get("shards")
    assert volume.kind == f"zarr v{layout['zarr_format']}"
    assert volume.nbytes == voxels.nbytes
    read = whole(volume)
    assert read.dtype == volume.dtype
    np.testing.assert_array_equal(read, voxels[None])


@pytest.mark.parametrize("axes", ["cyx", "yxc", "czyx", "zcyx", "zyxc", "tzyxc", "tczyx", "ctyx"])
def test_channels_come_first_wherever_they_are(tmp_path: Path, axes: str) -> None:
    lengths = {"c": 3, "t": 2, "z": 4, "y": 10, "x": 12}
    shape = tuple(lengths[a] for a in axes)
    voxels = np.random.default_rng(1).random(shape, dtype=np.float32)
    zarr.save_array(tmp_path / "v.zarr", voxels)
    volume = open_volume(tmp_path / "v.zarr", axes=axes.upper())
    assert volume.axes == axes.replace("c", "")
    assert volume.channels == 3
    assert volume.has_channels
    assert not volume.axes_assumed
    expected = np.moveaxis(voxels, axes.index("c"), 0)
    np.testing.assert_array_equal(whole(volume), expected)
    part = Region((1,) * len(volume.shape), volume.shape)
    read = volume.read(part)
    assert read.flags.c_contiguous
    np.testing.assert_array_equal(read, expected[(slice(None), *part.slices)])
    empty = Region((0,) * len(volume.shape), (0, *volume.shape[1:]))
    assert volume.read(empty).shape == (3, 0, *volume.shape[1:])


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Volume:
    path = tmp_path_factory.mktemp("small") / "v.zarr"
    zarr.save_array(path, VOXELS[:3, :1, :7])
    return open_volume(path)


@settings(max_examples=150)
@given(region=regions((3, 1, 7), longest=40, beyond=40))
def test_mirrored_is_numpy_reflect_and_padded_is_zeros(small: Volume, region: Region) -> None:
    pad = 90
    place = (slice(None), *region.grow((0,) * 3, (0,) * 3).within((-pad,) * 3))
    voxels = VOXELS[None, :3, :1, :7]
    widths = ((0, 0), (pad, pad), (pad, pad), (pad, pad))
    reflected = np.pad(voxels, widths, mode="reflect")
    np.testing.assert_array_equal(read_mirrored(small, region), reflected[place])
    np.testing.assert_array_equal(read_zero_padded(small, region), np.pad(voxels, widths)[place])


def test_only_what_is_needed_is_read(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v", shape=(40, 40), chunks=(10, 10), dtype="u1")[...] = 7
    for chunk in (tmp_path / "v" / "c").glob("*/*"):
        if chunk.name in "23" or chunk.parent.name in "23":
            chunk.write_bytes(b"rubbish")
    volume = open_volume(tmp_path / "v")
    assert (read_mirrored(volume, Region((-15, -19), (5, 20))) == 7).all()
    with pytest.raises(
        OSError, match=r"cannot read voxels 0:40,0:40 of .*v \(chunk c/0/2\): "
    ) as caught:
        whole(volume)
    assert not isinstance(caught.value, BadRequest)
    assert caught.value.__cause__ is not None


def test_region_outside_is_refused_and_missing_chunk_is_fill_value(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v", shape=(8, 8), chunks=(4, 4), dtype="u1", fill_value=3)
    volume = open_volume(tmp_path / "v")
    assert (whole(volume) == 3).all()
    for region in (Region((-1, 0), (4, 4)), Region((0, 0), (9, 4))):
        with pytest.raises(ValueError, match="inside"):
            volume.read(region)


def test_threads_and_pickle_read_the_same(tmp_path: Path) -> None:
    zarr.save_array(tmp_path / "v", VOXELS)
    tifffile.imwrite(tmp_path / "v.tif", VOXELS, compression="zlib", rowsperstrip=4)
    boxes = [Region((z, y, 0), (z + 1, y + 3, 30)) for z in range(5) for y in range(20)]
    for name in ("v", "v.tif"):
        volume = open_volume(tmp_path / name, axes="zyx")
        with ThreadPoolExecutor(6) as pool:
            for box, read in zip(boxes, pool.map(volume.read, boxes), strict=True):
                np.testing.assert_array_equal(read[0], VOXELS[box.slices])
        again = pickle.loads(pickle.dumps(volume))
        assert (again.identity, again.axes) == (volume.identity, volume.axes)
        np.testing.assert_array_equal(whole(again), whole(volume))


def test_identity_tells_storage_and_place_apart(tmp_path: Path) -> None:
    for name, chunks in (("a", (5, 5)), ("b", (5, 5)), ("c", (4, 4))):
        zarr.create_array(tmp_path / name, shape=(9, 9), chunks=chunks, dtype="u1")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    first = {name: open_volume(tmp_path / name).identity for name in ("a", "b", "c", "link")}
    assert len(set(first.values())) == 3
    assert first["a"] == first["link"]
    zarr.open_array(tmp_path / "a", mode="r+").attrs["note"] = "of no matter"
    assert open_volume(tmp_path / "a").identity == first["a"]
    zarr.open_array(tmp_path / "a", mode="r+").resize((10, 9))
    assert open_volume(tmp_path / "a").identity != first["a"]


@pytest.mark.parametrize("version", [2, 3])
def test_ome_image_gives_axes_scale_and_levels(tmp_path: Path, version: int) -> None:
    common = [{"type": "scale", "scale": [1, 1, 2.0, 3.0, 0.5]}]
    attributes = ome("tczyx", [9, 1, 2, 4, 4], ("0", "s/1"), coordinateTransformations=common)
    if version == 2:
        image = attributes["ome"]["multiscales"][0]
        attributes = {"multiscales": [{"version": "0.4", **image}]}
    root = group(tmp_path / "v.zarr", attributes, version)
    voxels = VOXELS[None, None]
    root.create_array("0", data=voxels, chunks=(1, 1, 2, 9, 9))
    root.create_array("s/1", data=voxels[..., ::2, ::2])
    volume = open_volume(tmp_path / "v.zarr")
    assert volume.kind == ("OME-Zarr 0.4" if version == 2 else "OME-Zarr 0.5")
    assert (volume.axes, volume.shape) == ("zyx", SHAPE)
    assert (volume.scale, volume.units) == ((4.0, 12.0, 2.0), ("micrometer",) * 3)
    assert (volume.channels, volume.has_channels, volume.channel_chunk) == (1, True, 1)
    assert volume.chunks == (2, 9, 9)
    np.testing.assert_array_equal(whole(volume)[0], VOXELS)
    half = open_volume(tmp_path / "v.zarr", level=1)
    assert half.identity != volume.identity
    np.testing.assert_array_equal(whole(half)[0], VOXELS[:, ::2, ::2])
    named = open_volume(tmp_path / "v.zarr" / "0")
    assert (named.axes, named.scale) == (volume.axes, volume.scale)
    for level in (2, -1):
        with pytest.raises(BadRequest, match=r"level \(=-?\d\) must be one of 0, 1"):
            open_volume(tmp_path / "v.zarr", level=level)
    with pytest.raises(BadRequest, match="must be 0"):
        open_volume(tmp_path / "v.zarr" / "0", level=1)
    assert open_volume(tmp_path / "v.zarr", axes="tczyx").axes == "tzyx"


def test_old_and_odd_ome_axes() -> None:
    for axes, expected in (
        (["t", "c", "z", "y", "x"], ("t", "c", "z", "y", "x")),
        ([{"name": "Band", "type": "channel"}, {"name": "Y"}, {"name": "X"}], ("c", "y", "x")),
        (None, None),
    ):
        image = {"datasets": [{"path": "0"}], **({} if axes is None else {"axes": axes})}
        parsed = parse_multiscale({"multiscales": [{"version": "0.3", **image}]})
        assert parsed is not None
        assert (parsed.axes, parsed.version, parsed.scales) == (expected, "0.3", (None,))


def test_dimension_names_say_the_axes(tmp_path: Path) -> None:
    named = {"dimension_names": ["y", "x", "channel"]}
    zarr.create_array(tmp_path / "3", shape=(8, 9, 3), dtype="u1", **named)
    xarray = {"_ARRAY_DIMENSIONS": ["Time", "y", "x"]}
    zarr.create_array(tmp_path / "2", shape=(4, 8, 9), dtype="u1", zarr_format=2, attributes=xarray)
    unknown = ["lat", "lon"]
    zarr.create_array(tmp_path / "u", shape=(8, 9), dtype="u1", dimension_names=unknown)
    zarr.create_array(tmp_path / "b", shape=(3, 8, 9), dtype="u1", dimension_names=["b", "y", "x"])
    assert open_volume(tmp_path / "3").shape == (8, 9)
    assert open_volume(tmp_path / "2").axes == "tyx"
    assert open_volume(tmp_path / "u").axes_assumed
    with pytest.raises(BadRequest, match="name them with axes"):
        open_volume(tmp_path / "b")
    assert open_volume(tmp_path / "b", axes="cyx").channels == 3


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib", "rowsperstrip": 5},
        {"tile": (16, 16), "compression": "zlib", "predictor": True},
        {"bigtiff": True, "byteorder": ">"},
        {"ome": True, "metadata": {"axes": "ZYX"}},
        {"imagej": True, "metadata": {"axes": "ZYX"}},
        {"photometric": "minisblack", "metadata": None},
    ],
)
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_every_tiff_reads_the_same(tmp_path: Path, options: dict[str, Any], dtype: str) -> None:
    voxels = VOXELS.astype(dtype)
    tifffile.imwrite(tmp_path / "v.tif", voxels, **options)
    volume = open_volume(tmp_path / "v.tif")
    assert (volume.axes, volume.kind, volume.dtype) == ("zyx", "TIFF", np.dtype(dtype))
    assert not volume.axes_assumed
    np.testing.assert_array_equal(whole(volume)[0], voxels)


def test_tiff_colours_and_levels(tmp_path: Path) -> None:
    colours = np.random.default_rng(2).integers(0, 256, (70, 90, 3)).astype(np.uint8)
    with tifffile.TiffWriter(tmp_path / "v.svs") as file:
        options: dict[str, Any] = {"tile": (32, 32), "photometric": "rgb", "compression": "zlib"}
        file.write(colours, subifds=1, **options)
        file.write(colours[::2, ::2], subfiletype=1, **options)
    volume = open_volume(tmp_path / "v.svs")
    assert (volume.axes, volume.channels, volume.chunks) == ("yx", 3, (32, 32))
    np.testing.assert_array_equal(whole(volume), np.moveaxis(colours, -1, 0))
    half = open_volume(tmp_path / "v.svs", level=1)
    np.testing.assert_array_equal(whole(half), np.moveaxis(colours[::2, ::2], -1, 0))
    with pytest.raises(BadRequest, match=r"level \(=2\) must be one of 0, 1"):
        open_volume(tmp_path / "v.svs", level=2)


def test_tiff_axes() -> None:
    assert plain_axes("QZYX", (4, 5, 8, 8)) == ("t", "z", "y", "x")
    assert plain_axes("IQYX", (4, 5, 8, 8)) == ("z", "t", "y", "x")
    assert plain_axes("TCYXS", (4, 1, 8, 8, 3)) == ("t", None, "y", "x", "c")
    for axes in ("IZTYX", "CYXS", "IQRYX"):
        with pytest.raises(ValueError, match="told apart"):
            plain_axes(axes, (2,) * len(axes))


ENDS = "is truncated: it ends"
if Version(tifffile.__version__) < Version("2026.2.24"):
    ENDS += "|is truncated or damaged"  # it did not yet say where tables that are cut off point


@pytest.mark.parametrize(
    "options",
    [
        {"metadata": None},
        {"compression": "zlib"},
        {"imagej": True},
        {"tile": (16, 16)},
        {"bigtiff": True, "compression": "zlib"},
        {"ome": True},
    ],
)
def test_truncated_tiff_is_refused(
    tmp_path: Path, options: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, VOXELS, **options)
    content = path.read_bytes()
    for kept in (3, 8, 100, *(int(len(content) * part) for part in (0.3, 0.5, 0.7, 0.9, 0.98))):
        path.write_bytes(content[:kept])
        if kept > 0.8 * len(content) and "imagej" in options:
            volume = open_volume(path)  # only what comes after the voxels was lost
            np.testing.assert_array_equal(whole(volume).reshape(SHAPE), VOXELS)
            continue
        cut = "is truncated or damaged: its tables are not whole" if kept == 100 else ENDS
        with pytest.raises(BadRequest, match=cut) as caught:
            open_volume(path)
        assert "\n" not in str(caught.value)
    assert not caplog.records


@pytest.mark.parametrize(
    ("shape", "axes", "message"),
    [
        ((4, 4), "zyx", "2 dimensions"),
        ((4, 4, 4), "yx", "3 dimensions"),
        ((4, 4, 4), "yyx", "each once"),
        ((4, 4, 4), "qyx", "letters"),
        ((4, 4, 4), "zcx", "y and x"),
        ((4, 4, 4), "xyz", r"axes \(=xyz\) must end in \(z\)yx; transpose"),
        ((4, 4, 4, 4), "ztyx", "transpose"),
        ((4, 4), "", "2 dimensions"),
        ((4,), None, "2 to 5"),
        ((), None, "2 to 5"),
        ((2,) * 6, None, "2 to 5"),
        ((4, 0, 4), None, "length 0"),
    ],
)
def test_axes_that_do_not_fit_are_refused(
    tmp_path: Path, shape: tuple[int, ...], axes: str | None, message: str
) -> None:
    zarr.create_array(tmp_path / "v", shape=shape, dtype="u1")
    with pytest.raises(BadRequest, match=message):
        open_volume(tmp_path / "v", axes=axes)


@pytest.mark.parametrize("dtype", ["bool", "complex64", "<M8[s]", "<U4", [("a", "u1")]])
@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.filterwarnings("ignore::zarr.errors.UnstableSpecificationWarning")
def test_dtypes_that_are_no_voxels_are_refused(tmp_path: Path, dtype: Any, version: int) -> None:
    zarr.create_array(tmp_path / "v", shape=(4, 4), dtype=dtype, zarr_format=version)
    with pytest.raises(BadRequest, match="must be integers or floats"):
        open_volume(tmp_path / "v")


def test_what_is_no_volume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty.tif").touch()
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50))
    (tmp_path / "a.txt").write_text("no voxels\n")
    tifffile.imwrite(tmp_path / "bool.tif", np.zeros((8, 8), bool))
    tifffile.imwrite(tmp_path / "complex.tif", np.zeros((8, 8), np.complex64))
    root = group(tmp_path / "many", {})
    for n in range(7):
        root.create_array(f"em/{n}", shape=(4, 4), dtype="u1")
    (tmp_path / "plain").mkdir()
    zarr.create_array(tmp_path / "plain" / "raw", shape=(4, 4), dtype="u1")
    group(tmp_path / "none", {})
    for name, message in {
        "missing": "does not exist",
        "missing\0": "is no path",
        "x" * 300: "is no path",
        "s3://bucket/a.tif": "copy or convert it",
        "s3://bucket//a.zarr": "must be s3://BUCKET/PATH",
        "s3://bucket/../a.zarr": "must be s3://BUCKET/PATH",
        "empty": "holds nothing",
        "empty.tif": "empty file",
        "a.png": "must be a Zarr store, a TIFF",
        "a.txt": "must be a Zarr store, a TIFF",
        "bool.tif": "uint8",
        "complex.tif": "integers or floats",
        "many": r"inside it: em/0, em/1, em/2, em/3, em/4, \.\.\.$",
        "plain": r"inside it: raw$",
        "none": "holds none",
    }.items():
        path = name if "://" in name else tmp_path / name
        with pytest.raises(BadRequest, match=message) as caught:
            open_volume(path)
        assert "\n" not in str(caught.value)
    assert open_volume(tmp_path / "many/em/3").shape == (4, 4)


@pytest.mark.parametrize("path", ["../other", "/etc", "a/../../other", "..\\other", "C:/x"])
def test_dataset_that_leaves_the_store_is_refused(tmp_path: Path, path: str) -> None:
    zarr.create_array(tmp_path / "other", shape=(4, 4), dtype="u1")
    group(tmp_path / "v", ome("yx", [1, 1], (path,)))
    with pytest.raises(BadRequest, match="leaves the image's folder"):
        open_volume(tmp_path / "v")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"node_type": "array"}', '{"node_type": 3}', "\xff" * 9]
)
def test_corrupt_metadata_is_refused(tmp_path: Path, content: str) -> None:
    for name in ("zarr.json", ".zarray"):
        folder = tmp_path / name
        zarr.create_array(folder, shape=(4, 4), dtype="u1", zarr_format=3 if name[0] == "z" else 2)
        (folder / name).write_text(content)
        with pytest.raises(BadRequest) as caught:
            open_volume(folder)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"datasets": []},
        {"datasets": "0"},
        {"datasets": [{"path": 0}]},
        {"datasets": [{"path": "missing"}]},
        {"axes": 3},
        {"axes": [{"name": 1}] * 2},
        {"axes": [{"name": "y"}]},
        {"axes": [{"name": "i"}, {"name": "x"}]},
        {"axes": [{"name": ""}, {"name": "x"}]},
        {"coordinateTransformations": [{"type": "scale", "scale": [1, 2, 3]}]},
        {"coordinateTransformations": [{"type": "scale", "scale": [0, 1]}]},
        {"coordinateTransformations": "scale"},
    ],
)
def test_wrong_ome_metadata_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    root = group(tmp_path / "v", ome("yx", [1, 1], **{}))
    root.create_array("0", shape=(4, 4), dtype="u1")
    assert open_volume(tmp_path / "v").axes == "yx"
    metadata = json.loads((tmp_path / "v" / "zarr.json").read_text())
    metadata["attributes"]["ome"]["multiscales"][0].update(change)
    (tmp_path / "v" / "zarr.json").write_text(json.dumps(metadata))
    with pytest.raises(BadRequest) as caught:
        open_volume(tmp_path / "v")
    assert "\n" not in str(caught.value)
