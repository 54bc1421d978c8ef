"""What a source holds is read or said: images, planes, resolutions, labels, channels, places."""

from __future__ import annotations

import itertools
import json
import pickle
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import zarr
from click.testing import CliRunner

from tests.support import noise, write_unet, write_volume
from tilepipe.cli import main
from tilepipe.commands.inspect import describe_file
from tilepipe.commands.segment import describe_plan
from tilepipe.errors import BadRequest
from tilepipe.evaluation.evaluate import evaluate
from tilepipe.geometry import Region
from tilepipe.instances.components import label_components
from tilepipe.options import Options
from tilepipe.planning.plan import plan
from tilepipe.segmentation.segment import segment
from tilepipe.training.dataset import open_material
from tilepipe.training.experiment import prepare
from tilepipe.training.recipe import Recipe
from tilepipe.volumes.ome import parse_multiscale
from tilepipe.volumes.source import source_notices
from tilepipe.volumes.volume import Volume, open_volume

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

PAGES = noise(6, 40, 50)


def whole(volume: Volume) -> NDArray[np.generic]:
    return volume.read(Region.whole(volume.shape))


def write_pages(path: Path, pages: NDArray[np.generic], **options: Any) -> Path:
    """Write each page as an image of its own."""
    order = options.pop("byteorder", None)
    with tifffile.TiffWriter(path, byteorder=order, bigtiff=order is not None) as file:
        for page in pages:
            file.write(page, **options)
    return path


def write_multiscale(
    path: Path,
    image: NDArray[np.generic],
    axes: str,
    *,
    transformations: list[Any],
    common: list[Any] | None = None,
    version: str = "0.5",
    attributes: dict[str, Any] | None = None,
    unit: str = "micrometer",
) -> Path:
    """Write an OME-Zarr of one resolution for each list of transformations."""
    group = zarr.create_group(path, zarr_format=3 if version == "0.5" else 2)
    kinds = {"t": "time", "c": "channel"}
    datasets = []
    for level, listed in enumerate(transformations):
        part = image[tuple(slice(None, None, 1 if a == "c" else 2**level) for a in axes)]
        group.create_array(str(level), data=part)
        datasets.append({"path": str(level), "coordinateTransformations": listed})
    described: dict[str, Any] = {
        "axes": [
            {"name": a, "type": kinds.get(a, "space")} | ({} if a in "ct" else {"unit": unit})
            for a in axes
        ],
        "datasets": datasets,
    }
    if common is not None:
        described["coordinateTransformations"] = common
    more = attributes or {}
    if version == "0.5":
        group.attrs["ome"] = {"version": "0.5", "multiscales": [described], **more}
    else:
        group.attrs.update({"multiscales": [{"version": "0.4", **described}], **more})
    return path


def scale(*numbers: float) -> dict[str, Any]:
    return {"type": "scale", "scale": list(numbers)}


def translation(*numbers: float) -> dict[str, Any]:
    return {"type": "translation", "translation": list(numbers)}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"compression": "zlib"},
        {"tile": (16, 16), "compression": "zlib", "predictor": True},
        {"byteorder": ">"},
        {"rowsperstrip": 7},
    ],
)
def test_equal_pages_written_one_by_one_are_a_stack(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path = write_pages(tmp_path / "v.tif", PAGES, **options)
    volume = open_volume(path)
    assert (volume.axes, volume.shape) == ("zyx", PAGES.shape)
    np.testing.assert_array_equal(whole(volume)[0], PAGES)
    np.testing.assert_array_equal(
        volume.read(Region((2, 5, 9), (5, 31, 50)))[0], PAGES[2:5, 5:31, 9:50]
    )
    again = pickle.loads(pickle.dumps(volume))
    np.testing.assert_array_equal(whole(again)[0], PAGES)
    assert any("6 equal images of one page: read as a stack" in n for n in source_notices(volume))
    one = open_volume(path, series=4)
    np.testing.assert_array_equal(whole(one)[0], PAGES[4])
    assert len({volume.identity, one.identity, open_volume(path, series=3).identity}) == 3
    assert pickle.loads(pickle.dumps(one)).identity == one.identity


@pytest.mark.parametrize("planar", ["contig", "separate"])
def test_equal_pages_of_colours_are_a_stack(tmp_path: Path, planar: str) -> None:
    colours = noise(4, 20, 30, 3)
    stored = colours if planar == "contig" else np.moveaxis(colours, -1, 1)
    path = write_pages(tmp_path / "v.tif", stored, photometric="rgb", planarconfig=planar)
    volume = open_volume(path)
    assert (volume.axes, volume.shape, volume.channels) == ("zyx", (4, 20, 30), 3)
    np.testing.assert_array_equal(whole(volume), np.moveaxis(colours, -1, 0))


def test_of_unequal_images_one_must_be_chosen(tmp_path: Path) -> None:
    path = tmp_path / "v.tif"
    with tifffile.TiffWriter(path) as file:
        file.write(PAGES[0])
        file.write(PAGES[1, :20])
    with pytest.raises(BadRequest, match=r"holds 2 images; choose one with series: 0 \(YX 40x50\)"):
        open_volume(path)
    np.testing.assert_array_equal(whole(open_volume(path, series=1))[0], PAGES[1, :20])
    for wrong in (2, -1):
        with pytest.raises(BadRequest, match=rf"series \(={wrong}\) must be one of 0 \(YX"):
            open_volume(path, series=wrong)
    result = CliRunner().invoke(main, ["inspect", str(path), "--series", "1", "--json"])
    assert json.loads(result.output)["shape"] == [20, 50]
    assert "2 images" in json.loads(result.output)["notices"][0]
    # Images of an OME-TIFF are said to be several: equal ones are no stack.
    with tifffile.TiffWriter(tmp_path / "v.ome.tif") as file:
        file.write(PAGES[0], metadata={"axes": "YX"})
        file.write(PAGES[1], metadata={"axes": "YX"})
    with pytest.raises(BadRequest, match="holds 2 images; choose one with series: 0"):
        open_volume(tmp_path / "v.ome.tif")


def test_planes_that_metadata_name_and_nobody_has_are_refused(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "v.ome.tif", PAGES, metadata={"axes": "ZYX"}, compression="zlib")
    with tifffile.TiffFile(tmp_path / "v.ome.tif") as file:
        said = str(file.ome_metadata).replace('SizeZ="6"', 'SizeZ="9"')
    said = said.replace('PlaneCount="6"', 'PlaneCount="9"')
    lacking = tmp_path / "w.ome.tif"
    tifffile.imwrite(lacking, PAGES, description=said.encode(), metadata=None, compression="zlib")
    with pytest.raises(BadRequest, match="lacks 3 of the 9 planes"):
        open_volume(lacking)


def test_voxels_that_cannot_be_decoded_are_refused_before_the_run(tmp_path: Path) -> None:
    path = tmp_path / "v.tif"
    tifffile.imwrite(path, PAGES[0], compression="zlib")
    with tifffile.TiffFile(path, mode="r+") as file:
        file.pages[0].tags["Compression"].overwrite(34999)
    with pytest.raises(BadRequest, match="cannot be decoded: 34999 is not a known"):
        open_volume(path)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"II*\0\0\0\0\0", "cannot be read as a TIFF: it holds no image"),
        (b"II*\0" + bytes(range(200)), "is truncated: it ends at byte 204, and its tables point"),
        (b"II*\0\x08\0", "is truncated: it ends at byte 6"),
        (b"PK\x03\x04" + bytes(60), "damaged at its start"),
    ],
)
def test_the_cause_is_said_of_a_tiff_that_does_not_open(
    tmp_path: Path, content: bytes, cause: str
) -> None:
    (tmp_path / "v.tif").write_bytes(content)
    with pytest.raises(BadRequest, match=cause):
        open_volume(tmp_path / "v.tif")


def test_a_description_of_another_shape_is_not_called_truncated(tmp_path: Path) -> None:
    path = tmp_path / "v.tif"
    said = '{"shape": [7, 40, 50]}'
    tifffile.imwrite(path, PAGES[0], description=said, metadata=None, compression="zlib")
    with pytest.raises(BadRequest, match="its description does not fit its pages") as caught:
        open_volume(path)
    assert "truncated" not in str(caught.value).replace(str(path), "")


MICRO = "micrometer"


@pytest.mark.parametrize(
    ("name", "options", "sizes", "units"),
    [
        ("ome.tif", {"ome": True, "metadata": {
            "axes": "ZYX", "PhysicalSizeX": 0.25, "PhysicalSizeXUnit": "µm",
            "PhysicalSizeY": 260, "PhysicalSizeYUnit": "nm", "PhysicalSizeZ": 1.5,
            "PhysicalSizeZUnit": "mm"}}, (1.5, 260, 0.25), ("millimeter", "nanometer", MICRO)),
        ("tif", {"imagej": True, "resolution": (4.0, 5.0), "metadata": {
            "axes": "ZYX", "spacing": 1.5, "unit": "um"}}, (1.5, 0.2, 0.25), (MICRO,) * 3),
        ("tif", {"imagej": True, "resolution": (4.0, 5.0), "metadata": {
            "axes": "ZYX", "spacing": 1.5, "unit": "\\u00B5m"}}, (1.5, 0.2, 0.25), (MICRO,) * 3),
        ("tif", {"imagej": True, "metadata": {"axes": "ZYX"}}, (1, 1, 1), (None,) * 3),
        ("tif", {"resolution": (300, 300), "resolutionunit": "INCH"},
         (1, 25400 / 300, 25400 / 300), (None, MICRO, MICRO)),
        ("tif", {"bigtiff": True, "resolution": (40000, 20000), "resolutionunit": "CENTIMETER"},
         (1, 0.5, 0.25), (None, MICRO, MICRO)),
        ("tif", {"resolution": (2, 1), "resolutionunit": "NONE"}, (1, 1, 0.5), (None,) * 3),
        ("tif", {"resolution": (72, 72), "resolutionunit": "NONE"}, (1, 1, 1), (None,) * 3),
    ],
)  # fmt: skip
def test_voxel_sizes_of_tiffs_come_to_the_output(
    tmp_path: Path,
    name: str,
    options: dict[str, Any],
    sizes: tuple[float, ...],
    units: tuple[str | None, ...],
) -> None:
    path = tmp_path / f"v.{name}"
    tifffile.imwrite(path, PAGES, photometric="minisblack", **options)
    volume = open_volume(path)
    assert volume.scale == pytest.approx(sizes)
    assert volume.units == units
    model = write_unet(tmp_path / "u.pt", depth=1)
    source = plan(path, model=model, output=tmp_path / "o.zarr").source
    assert (source.scale, source.units) == (volume.scale, volume.units)
    if name == "ome.tif":
        segment(path, model=model, output=tmp_path / "o.zarr", engine="serial")
        answer = open_volume(tmp_path / "o.zarr")
        assert (answer.scale, answer.units) == (volume.scale, volume.units)


def test_the_levels_of_a_tiff_have_larger_voxels(tmp_path: Path) -> None:
    options: dict[str, Any] = {"tile": (16, 16), "resolution": (1e4, 5e3), "resolutionunit": 3}
    with tifffile.TiffWriter(tmp_path / "v.tif") as file:
        file.write(PAGES[0], subifds=1, **options)
        file.write(PAGES[0, ::2, ::2], subfiletype=1, **options)
    full, half = (open_volume(tmp_path / "v.tif", level=level) for level in (0, 1))
    assert (full.scale, half.scale) == ((2.0, 1.0), (4.0, 2.0))
    assert "the source has 2 resolutions: level 1 is read" in half.notices


def test_aperio_says_the_size_of_a_pixel(tmp_path: Path) -> None:
    said = "Aperio Image Library v11.2.1\r\n50x40 (16x16) JPEG/RGB Q=30|AppMag = 20|MPP = 0.4990"
    with tifffile.TiffWriter(tmp_path / "v.svs") as file:
        colours = np.repeat(PAGES[0][..., None], 3, axis=-1)
        options: dict[str, Any] = {"photometric": "rgb", "metadata": None}
        file.write(colours, tile=(16, 16), description=said, **options)
        file.write(colours[::4, ::4], description=said, **options)
    volume = open_volume(tmp_path / "v.svs")
    assert (volume.scale, volume.units) == ((0.499, 0.499), (MICRO, MICRO))
    assert any("holds 2 images: number 0 is read" in notice for notice in volume.notices)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
@pytest.mark.parametrize("level", [0, 1])
def test_scale_and_translation_come_to_the_output(tmp_path: Path, version: str, level: int) -> None:
    image = noise(2, 32, 40)
    path = write_multiscale(
        tmp_path / "v.zarr",
        image,
        "cyx",
        transformations=[
            [scale(1, 2, 3), translation(0, 10, -20)],
            [scale(1, 4, 6), translation(0, 11, -18.5)],
        ],
        common=[scale(1, 10, 0.5), translation(0, 1000, 7)],
        version=version,
    )
    volume = open_volume(path, level=level)
    assert volume.scale == ((20, 1.5), (40, 3.0))[level]
    assert volume.translation == ((1100, -3), (1110, -2.25))[level]
    model = write_unet(tmp_path / "u.pt", depth=1, in_channels=2)
    output = tmp_path / "o.zarr"
    options = Options(level=level, ome_version=version, write="probabilities")
    segment(path, model=model, output=output, options=options, engine="serial")
    answer = open_volume(output)
    assert (answer.scale, answer.translation) == (volume.scale, volume.translation)
    assert answer.units == ("micrometer",) * 2
    stated = zarr.open_group(output, mode="r").attrs.asdict()
    image_of = (stated["ome"] if version == "0.5" else stated)["multiscales"][0]
    transformations = image_of["datasets"][0]["coordinateTransformations"]
    assert transformations[1] == translation(0, *volume.translation)


def test_transformations_come_one_after_the_other() -> None:
    axes = [{"name": name, "type": "space"} for name in "yx"]
    datasets = [{"path": "0", "coordinateTransformations": [scale(2, 3), translation(1, 1)]}]
    image = {"axes": axes, "datasets": datasets, "coordinateTransformations": [scale(10, 10)]}
    found = parse_multiscale({"multiscales": [image]})
    assert found is not None
    assert (found.scales, found.translations) == (((20.0, 30.0),), ((10.0, 10.0),))
    for wrong in ([1], ["a", 1], [float("nan"), 0], "1"):
        datasets[0]["coordinateTransformations"] = [{"type": "translation", "translation": wrong}]
        with pytest.raises(ValueError, match=r"translation .* one number per axis"):
            parse_multiscale({"multiscales": [image]})


def test_what_lies_beside_an_image_is_said(tmp_path: Path) -> None:
    path = write_multiscale(
        tmp_path / "v.zarr", noise(32, 40), "yx", transformations=[[scale(1, 1)], [scale(2, 2)]]
    )
    group = zarr.open_group(path)
    group.create_array("raw", data=noise(4, 4))
    group.create_group("tables")
    group.create_group("labels").attrs["ome"] = {"labels": ["cells", "nuclei"]}
    ome = dict(group.attrs["ome"])  # type: ignore[call-overload]
    ome["multiscales"] = [*ome["multiscales"], ome["multiscales"][0]]
    group.attrs["ome"] = ome
    said = " / ".join(plan(path, model=write_unet(tmp_path / "u.pt", depth=1)).notices)
    for part in ("holds 2 images: number 0 is read", "2 resolutions: level 0", "cells, nuclei",
                 "raw, tables"):  # fmt: skip
        assert part in said
    assert describe_file(path, series=1)[0]["notices"]
    with pytest.raises(BadRequest, match=r"series \(=2\) must be from 0 to 1"):
        open_volume(path, series=2)


@pytest.mark.parametrize("version", ["0.4", "0.5"])
def test_images_of_a_bioformats2raw_layout_are_chosen(tmp_path: Path, version: str) -> None:
    root = zarr.create_group(tmp_path / "v.zarr", zarr_format=3 if version == "0.5" else 2)
    layout = {"bioformats2raw.layout": 3}
    named = root.create_group("OME").attrs
    root.attrs.update({"ome": {"version": "0.5", **layout}} if version == "0.5" else layout)
    images = [noise(20, 30, seed=seed) for seed in range(3)]
    for number, image in enumerate(images):
        write_multiscale(
            tmp_path / "v.zarr" / str(number), image, "yx", transformations=[[scale(2, 2)]],
            version=version,
        )  # fmt: skip
        if number == 0:  # the only one is read
            np.testing.assert_array_equal(whole(open_volume(tmp_path / "v.zarr"))[0], image)
    series = {"series": ["0", "1", "2"]}
    named.update({"ome": series} if version == "0.5" else series)
    with pytest.raises(BadRequest, match="holds 3 images, 0 to 2; choose one with series"):
        open_volume(tmp_path / "v.zarr")
    chosen = open_volume(tmp_path / "v.zarr", series=2)
    np.testing.assert_array_equal(whole(chosen)[0], images[2])
    assert chosen.scale == (2.0, 2.0)
    assert chosen.identity != open_volume(tmp_path / "v.zarr", series=1).identity
    options = Options(series=2)
    model = write_unet(tmp_path / "u.pt", depth=1)
    segment(tmp_path / "v.zarr", model=model, output=tmp_path / "a.zarr", options=options,
            engine="serial")  # fmt: skip
    segment(tmp_path / "v.zarr" / "2", model=model, output=tmp_path / "b.zarr", engine="serial")
    a, b = (whole(open_volume(tmp_path / name)) for name in ("a.zarr", "b.zarr"))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("axes", ["cyx", "yxc", "czyx", "zcyx", "zyxc", "tzyxc", "ctyx"])
@pytest.mark.parametrize("channels", [(1,), (3, 0), (2, 2, 1), (0, 1, 2, 3)])
def test_channels_are_read_in_the_order_asked_for(
    tmp_path: Path, axes: str, channels: tuple[int, ...]
) -> None:
    shape = {"t": 2, "c": 4, "z": 3, "y": 7, "x": 9}
    image = noise(*(shape[axis] for axis in axes))
    chunks = tuple(min(2, n) for n in image.shape)
    volume = open_volume(
        write_volume(tmp_path / "v.zarr", image, axes, chunks=chunks), channels=channels
    )
    front = np.moveaxis(image, axes.index("c"), 0)
    assert volume.channels == len(channels)
    np.testing.assert_array_equal(whole(volume), front[list(channels)])
    again = pickle.loads(pickle.dumps(volume))
    inner = Region((1,) * len(volume.shape), volume.shape)
    np.testing.assert_array_equal(
        again.read(inner), front[(list(channels), *(slice(1, None) for _ in volume.shape))]
    )
    assert volume.decoded_channels == max(
        2 * len({channel // 2 for channel in channels}), len(channels)
    )


def test_channels_of_every_order_of_a_tiff(tmp_path: Path) -> None:
    for axes in map("".join, itertools.permutations("TZC")):
        shape = {"T": 2, "Z": 3, "C": 4}
        image = noise(*(shape[axis] for axis in axes), 8, 9)
        path = tmp_path / f"{axes}.ome.tif"
        names = {"Channel": {"Name": ["DAPI", "GFP", "488", "GFP"]}}
        tifffile.imwrite(path, image, ome=True, metadata={"axes": f"{axes}YX", **names})
        if axes.replace("C", "") != "TZ":
            with pytest.raises(BadRequest, match=r"must end in \(z\)yx; transpose"):
                open_volume(path)
            continue
        volume = open_volume(path, channels=("488", 0))
        assert (volume.channels, volume.channel_names) == (2, ("488", "DAPI"))
        wanted = np.moveaxis(image, axes.index("C"), 0)[[2, 0]]
        np.testing.assert_array_equal(whole(volume), wanted)
        assert open_volume(path, channels=(488,)).channel_names == ("488",)
        with pytest.raises(BadRequest, match="is the name of channels 1 and 3"):
            open_volume(path, channels=("GFP",))
        with pytest.raises(BadRequest, match=r"\(=RFP\) must be of 0 to 3, DAPI, GFP, 488, GFP"):
            open_volume(path, channels=("RFP",))
        with pytest.raises(BadRequest, match=r"channels \(=4\) must be of 0 to 3"):
            open_volume(path, channels=(4,))


@pytest.mark.parametrize("normalize", ["percentile:2,98", "zscore"])
def test_a_network_of_fewer_inputs_runs_on_chosen_channels(tmp_path: Path, normalize: str) -> None:
    image = noise(4, 40, 50, dtype="float32") * np.float32([1, 10, 100, 1000])[:, None, None]
    labels = {"omero": {"channels": [{"label": name} for name in ("a", "b", "c", "d")]}}
    path = write_multiscale(
        tmp_path / "v.zarr", image, "cyx", transformations=[[scale(1, 1, 1)]], attributes=labels
    )
    cut = write_volume(tmp_path / "w.zarr", image[[3, 1]], "cyx")
    model = write_unet(tmp_path / "u.pt", depth=1, in_channels=2, normalize=normalize)
    with pytest.raises(BadRequest, match="choose some with --channels"):
        plan(path, model=model)
    shown = describe_plan(plan(path, model=model, options=Options(channels=("d", 1))))
    assert "2 channels: d, 1" in shown
    result = CliRunner().invoke(
        main,
        ["segment", str(path), "--model", str(model), "-o", str(tmp_path / "o.zarr"),
         "--channels", "d,1", "--write", "probabilities", "--engine", "serial", "--tile", "16,16"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    options = Options(write="probabilities", tile=(16, 16))
    segment(cut, model=model, output=tmp_path / "p.zarr", options=options, engine="serial")
    a, b = (whole(open_volume(tmp_path / name)) for name in ("o.zarr", "p.zarr"))
    np.testing.assert_array_equal(a, b)
    with pytest.raises(BadRequest, match="begun with another plan"):
        segment(path, model=model, output=tmp_path / "o.zarr",
                options=Options(write="probabilities", tile=(16, 16), channels=(1, 3)),
                engine="serial")  # fmt: skip
    for wrong in ((), (1.5,), "ab"):
        with pytest.raises(BadRequest, match="must be numbers or names"):
            Options(channels=wrong)  # type: ignore[arg-type]


def test_a_training_learns_from_all_pages_or_the_image_asked_for(tmp_path: Path) -> None:
    masks = (PAGES > 128).astype("uint8")
    image, labels = (
        write_pages(tmp_path / name, pages) for name, pages in (("i.tif", PAGES), ("l.tif", masks))
    )
    small: dict[str, Any] = {"base": 2, "depth": 1, "patch": (8, 8), "steps": 1, "ndim": 2}
    material = open_material([(str(image), str(labels))], [], Recipe(**small))
    assert (material.images[0].shape, material.labels[0].shape) == (PAGES.shape,) * 2
    study = prepare(material, Recipe(**small), tmp_path, resume=False, first=False, scanned=None)
    assert len([notice for notice in study.notices if "read as a stack" in notice]) == 2
    one = open_material([(str(image), str(labels))], [], Recipe(**small, series=2, channels=(0, 0)))
    assert one.channels == 2
    np.testing.assert_array_equal(whole(one.images[0]), np.stack([PAGES[2]] * 2))
    np.testing.assert_array_equal(whole(one.labels[0])[0], masks[2])


def test_a_prediction_is_compared_where_it_lies(tmp_path: Path) -> None:
    truth = (noise(40, 50) > 128).astype("uint8")
    labels = write_multiscale(
        tmp_path / "l.zarr", truth, "yx", transformations=[[scale(2, 0.5), translation(100, 3)]]
    )

    def part(name: str, *place: float, size: tuple[float, float] = (2, 0.5)) -> Path:
        image = truth[10:30, 20:45]
        listed = [scale(*size), translation(*place)]
        return write_multiscale(tmp_path / name, image, "yx", transformations=[listed])

    right = part("a.zarr", 120, 13)
    scores = evaluate(right, labels, kind="classes")
    assert scores.pixels is not None
    assert (scores.region, scores.pixels.pixel_error) == ("10:30,20:45", 0)
    inner = evaluate(right, labels, kind="classes", region="12:20,25:45")
    assert inner.pixels is not None
    assert (inner.region, inner.pixels.pixel_error) == ("12:20,25:45", 0)
    with pytest.raises(BadRequest, match=r"lies at 10:30,20:45 of the labels, of which region"):
        evaluate(right, labels, region="0:20,20:45")
    with pytest.raises(BadRequest, match="give region within that"):
        evaluate(part("b.zarr", 160, 13), labels)
    with pytest.raises(BadRequest, match="covers nothing of them"):
        evaluate(part("c.zarr", 1160, 13), labels)
    with pytest.raises(BadRequest, match=r"lies 20.5 voxels from the labels .* along x"):
        evaluate(part("d.zarr", 120, 13.25), labels)
    with pytest.raises(BadRequest, match="give both the same scale and units"):
        evaluate(part("e.zarr", 120, 13, size=(4, 1)), labels)
    # A part that does not say where it lies is laid on the region, as it always was.
    plain = write_volume(tmp_path / "p.zarr", truth[10:30, 20:45], "yx")
    assert evaluate(plain, labels, region="10:30,20:45", kind="classes").voxels == 500
    # Of two whole volumes one may have lost its place; both with one are compared where they meet.
    lost = write_multiscale(tmp_path / "f.zarr", truth, "yx", transformations=[[scale(2, 0.5)]])
    assert evaluate(lost, labels, kind="classes").voxels == truth.size


def test_objects_of_64_bits_are_told_apart(tmp_path: Path) -> None:
    labels = np.full((4, 6), 2**53 + 1, "uint64")
    labels[:, :2] = 2**53
    path = write_volume(tmp_path / "l.zarr", labels, "yx")
    mask = write_volume(tmp_path / "m.zarr", (labels == 2**53).astype("uint8"), "yx")
    scores = evaluate(mask, path, kind="mask", label_objects=[2**53])
    assert scores.pixels is not None
    assert scores.pixels.pixel_error == 0


def test_numbered_objects_of_a_region_lie_where_the_region_does(tmp_path: Path) -> None:
    image = (noise(40, 50) > 128).astype("uint8")
    path = write_multiscale(
        tmp_path / "v.zarr", image, "yx", transformations=[[scale(2, 0.5), translation(100, 3)]]
    )
    region = Region((10, 20), (30, 45))
    label_components(
        open_volume(path), tmp_path / "o.zarr", foreground=lambda v: v[0] > 0, region=region
    )
    assert open_volume(tmp_path / "o.zarr").translation == (120, 13)


def test_labels_of_several_images_are_compared_one_by_one(tmp_path: Path) -> None:
    masks = (PAGES > 128).astype("uint8")
    labels = write_pages(tmp_path / "l.tif", masks)
    prediction = write_volume(tmp_path / "p.zarr", masks[3], "yx")
    result = CliRunner().invoke(
        main, ["evaluate", str(prediction), str(labels), "--series", "3", "--json"]
    )
    assert result.exit_code == 0, result.output
    assert json.loads(result.output)["pixels"]["pixel_error"] == 0
    with pytest.raises(BadRequest, match="must have the labels' shape"):
        evaluate(prediction, labels)


def test_axes_that_are_named_keep_the_sizes_of_their_voxels(tmp_path: Path) -> None:
    said = {"axes": "ZYX", "spacing": 1.5, "unit": "um"}
    tifffile.imwrite(tmp_path / "v.tif", PAGES, imagej=True, resolution=(4, 5), metadata=said)
    assert open_volume(tmp_path / "v.tif", axes="ZYX").scale == (1.5, 0.2, 0.25)
    with pytest.raises(BadRequest, match="must name the 3 dimensions"):
        open_volume(tmp_path / "v.tif", axes="yx")


def test_a_transformation_that_cannot_be_carried_over_is_refused() -> None:
    axes = [{"name": name, "type": "space"} for name in "yx"]
    for entry in ({"type": "scale", "path": "s"}, {"type": "affine", "affine": [[1, 0], [0, 1]]}):
        datasets = [{"path": "0", "coordinateTransformations": [{"type": "identity"}, entry]}]
        with pytest.raises(ValueError, match="must be a scale or a translation"):
            parse_multiscale({"multiscales": [{"axes": axes, "datasets": datasets}]})
