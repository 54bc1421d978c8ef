"""Laws of writing: whole write units in any order give the array; nothing foreign is removed."""

from __future__ import annotations

import json
import os
import random
import shutil
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import zarr

from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, TileGrid
from tilepipe.volumes.output import Output
from tilepipe.volumes.output_array import write_unit
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from pathlib import Path


def create(path: Path, **changes: Any) -> None:
    options: dict[str, Any] = {
        "axes": "zyx",
        "shape": (20, 50, 41),
        "dtype": "uint16",
        "chunks": (8, 16, 16),
        "shards": None,
        "scale": (4.0, 2.0, 2.0),
        "units": ("nanometer", "nanometer", None),
        "attributes": {"model": "m"},
    }
    Output.at(path).create(**{**options, **changes})


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint64", "float32"])
@pytest.mark.parametrize("channels", [None, 1, 3])
@pytest.mark.parametrize(
    ("version", "shards"), [("0.5", None), ("0.5", (8, 32, 32)), ("0.4", None)]
)
def test_write_units_from_threads_give_the_array(
    tmp_path: Path, dtype: str, channels: int | None, version: str, shards: Any
) -> None:
    path = tmp_path / "o.zarr"
    first = "" if channels is None else "c"
    shape = (20, 50, 41) if channels is None else (channels, 20, 50, 41)
    axes = first + "zyx"
    create(path, axes=axes, shape=shape, dtype=dtype, shards=shards, ome_version=version)
    target = Output.at(path).open()
    assert (target.axes, target.shape, target.channels) == ("zyx", (20, 50, 41), channels)
    assert (target.chunks, target.shards) == ((8, 16, 16), shards)
    voxels = (np.random.default_rng(0).random(shape) * 200).astype(dtype)
    unit = write_unit(target.chunks, target.shards)
    tiles = list(TileGrid(target.shape, unit))
    random.Random(0).shuffle(tiles)
    with ThreadPoolExecutor(8) as pool:
        for done in [
            pool.submit(target.write, t.write, part)
            for t in tiles
            for part in [voxels[(..., *t.write.slices)]]
        ]:
            done.result()
    volume = open_volume(path)
    assert volume.kind == f"OME-Zarr {version}"
    assert (volume.axes, volume.has_channels) == ("zyx", channels is not None)
    assert (volume.scale, volume.units) == ((4.0, 2.0, 2.0), ("nanometer", "nanometer", None))
    assert volume.shards == shards
    read = volume.read(Region.whole(volume.shape))
    np.testing.assert_array_equal(read if channels else read[0], voxels)
    array = zarr.open_array(path / "0", mode="r")
    assert array.fill_value == 0
    assert (path / ("zarr.json" if version == "0.5" else ".zgroup")).is_file()
    if version == "0.5":
        assert array.metadata.dimension_names == tuple(axes)


def test_only_whole_write_units_are_written(tmp_path: Path) -> None:
    create(tmp_path / "o", shards=(16, 32, 32))
    target = Output.at(tmp_path / "o").open()
    for start, stop in (
        ((0, 0, 0), (8, 32, 32)),
        ((8, 0, 0), (16, 32, 32)),
        ((0, 0, 0), (16, 32, 40)),
        ((16, 32, 32), (32, 64, 64)),
        ((-16, 0, 0), (0, 32, 32)),
    ):
        region = Region(start, stop)
        with pytest.raises(ValueError, match="whole write units"):
            target.write(region, np.zeros(region.shape, np.uint16))
    region = Region((16, 32, 32), (20, 50, 41))
    with pytest.raises(ValueError, match="array of shape"):
        target.write(region, np.zeros(region.shape, np.uint8))
    with pytest.raises(ValueError, match="array of shape"):
        target.write(region, np.zeros((1, *region.shape), np.uint16))
    target.write(region, np.ones(region.shape, np.uint16))
    target.write(region, np.zeros(region.shape, np.uint16))
    assert not np.asarray(zarr.open_array(tmp_path / "o" / "0", mode="r")[...]).any()


def test_rot_is_found(tmp_path: Path) -> None:
    for dtype in ("uint8", "float32"):
        path = tmp_path / dtype
        create(path, axes="yx", shape=(64, 64), chunks=(64, 64), dtype=dtype, **plane())
        region = Region.whole((64, 64))
        noise = (np.random.default_rng(0).random((64, 64)) * 255).astype(dtype)
        Output.at(path).open().write(region, noise)
        chunk = next((path / "0" / "c").rglob("0/0"))
        content = bytearray(chunk.read_bytes())
        content[len(content) // 2] ^= 1
        chunk.write_bytes(content)
        with pytest.raises(OSError, match="cannot read voxels"):
            open_volume(path).read(region)


def plane() -> dict[str, Any]:
    return {"scale": (1, 1), "units": (None, None)}


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_attributes_are_kept_beside_the_image(tmp_path: Path, version: str) -> None:
    path = tmp_path / "o"
    create(path, ome_version=version)
    assert Output.at(path).read_attributes() == {"model": "m"}
    Output.at(path).update_attributes({"done": [1, 2], "plan": {"tile": None}})
    Output.at(path).update_attributes({"done": [3]})
    assert Output.at(path).read_attributes() == {"model": "m", "done": [3], "plan": {"tile": None}}
    assert open_volume(path).scale == (4.0, 2.0, 2.0)
    if version == "0.5":
        image = json.loads((path / "zarr.json").read_text())["attributes"]["ome"]
        assert image["multiscales"][0]["axes"][0] == {
            "name": "z",
            "type": "space",
            "unit": "nanometer",
        }
    zarr.create_group(tmp_path / "other")
    for other in ("other", "missing"):
        with pytest.raises(BadRequest, match="no output of tilepipe"):
            Output.at(tmp_path / other).read_attributes()
        with pytest.raises(BadRequest, match="no output of tilepipe"):
            Output.at(tmp_path / other).open()


def test_only_our_own_output_is_ever_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("all of it")
    (tmp_path / "file").write_text("all of it")
    zarr.create_group(tmp_path / "group")
    zarr.create_array(tmp_path / "array", shape=(4, 4), dtype="u1")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    (tmp_path / "corrupt").mkdir()
    (tmp_path / "corrupt" / "zarr.json").write_text("{")
    kept = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    for name in ("folder", "file", "group", "array", "link", "corrupt"):
        for overwrite in (False, True):
            with pytest.raises(BadRequest, match="name another path"):
                create(tmp_path / name, overwrite=overwrite)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == kept
    (tmp_path / "empty").mkdir()
    create(tmp_path / "empty")
    (tmp_path / "folder" / "out").symlink_to(tmp_path / "empty")
    (tmp_path / "empty" / "note").symlink_to(tmp_path / "folder")
    with pytest.raises(BadRequest, match="exists; overwrite"):
        create(tmp_path / "empty")
    with pytest.raises(BadRequest, match="holds note, a link"):
        create(tmp_path / "empty", overwrite=True)
    (tmp_path / "empty" / "note").unlink()
    create(tmp_path / "folder" / "out", overwrite=True, attributes={"new": True})
    assert Output.at(tmp_path / "empty").read_attributes() == {"new": True}
    assert sorted(os.listdir(tmp_path / "empty")) == ["0", "zarr.json"]
    assert (tmp_path / "folder" / "thesis.txt").exists()


def test_half_removed_output_stays_ours(tmp_path: Path) -> None:
    for version in ("0.4", "0.5"):
        path = tmp_path / version
        create(path, ome_version=version)
        shutil.rmtree(path / "0")
        with pytest.raises(BadRequest, match="lost its array 0"):
            Output.at(path).open()
        (path / f"zarr.{0:032x}.partial").touch()
        create(path, overwrite=True, ome_version="0.5")
        assert Output.at(path).open().shape == (20, 50, 41)
        assert sorted(os.listdir(path)) == ["0", "zarr.json"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "int16"}, "dtype"),
        ({"dtype": "float64"}, "dtype"),
        ({"dtype": "bool"}, "dtype"),
        ({"shards": (8, 24, 32)}, "multiples"),
        ({"shards": (8, 16)}, "shards"),
        ({"chunks": (8, 16)}, "chunks"),
        ({"chunks": (0, 16, 16)}, "positive"),
        ({"chunks": (2048, 2048, 2048)}, "2 GiB"),
        ({"shape": (20, 50)}, "axes"),
        ({"axes": "xyz"}, "axes"),
        ({"scale": (1.0,)}, "scale"),
        ({"units": ()}, "units"),
        ({"ome_version": "0.4", "shards": (8, 16, 16)}, "Zarr v3"),
        ({"ome_version": "0.6"}, "0.4 or 0.5"),
    ],
)
def test_what_cannot_be_created_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadRequest, match=message):
        create(tmp_path / "o", **changes)
    assert not list(tmp_path.iterdir())


def test_target_must_keep_off_the_source(tmp_path: Path) -> None:
    store = tmp_path / "v.zarr"
    root = zarr.create_group(store)
    root.create_array("em/raw", shape=(4, 4), dtype="u1")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(store)
    before = sorted(tmp_path.rglob("*"))
    source = store / "em" / "raw"
    for place, message in (
        (source, "must not be the source"),
        (tmp_path / "link" / "em" / "raw", "must not be the source"),
        (source / "labels", "inside the source"),
        (store, "contain the source"),
        (tmp_path / "link", "contain the source"),
        (tmp_path / "file", "existing file"),
        (tmp_path / "file" / "o", "is a file"),
        (tmp_path / "no" / "o", "create it first"),
        (tmp_path / "bad\0", "no path"),
        (tmp_path / ("x" * 300), "no path"),
        ("ftp://host/o", "must begin with one of"),
        ("s3://name:password@host/o", "without user, password"),
        ("https://host/o", "HTTP is for reading"),
    ):
        with pytest.raises(BadRequest, match=message) as caught:
            Output.at(place).check_apart(source)
        assert "\n" not in str(caught.value)
    with pytest.raises(BadRequest, match="inside the array"):
        Output.at(source / "o").check_apart(tmp_path / "file")
    Output.at(tmp_path / "o").check_apart(source)
    Output.at(store / "em" / "labels").check_apart(source)
    assert sorted(tmp_path.rglob("*")) == before


def test_unwritable_folder_is_refused(tmp_path: Path) -> None:
    zarr.create_array(tmp_path / "v", shape=(4, 4), dtype="u1")
    folders = [folder for folder in ("/proc/self",) if os.path.isdir(folder)]
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        folders.append(str(tmp_path / "locked"))
    for folder in folders:
        with pytest.raises(BadRequest, match="writable"):
            Output.at(f"{folder}/o").check_apart(tmp_path / "v")
