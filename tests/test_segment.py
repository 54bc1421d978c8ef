"""The story end to end, on real stores: what is written is one pass over the whole image."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tifffile
import torch
import zarr

import tilepipe as tp
from tests.support import assert_close, noise, one_pass, read, write_unet, write_volume
from tilepipe.engines import dask
from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, mirror
from tilepipe.models.model import load_model
from tilepipe.models.unet import UNet
from tilepipe.options import Options
from tilepipe.testing import refusals, zoo
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@pytest.mark.parametrize("strategy", ["sweep", "direct"])
@pytest.mark.parametrize("write", ["labels", "probabilities", "logits", "values"])
def test_a_plane_in_tiles_is_one_pass_over_the_whole(
    tmp_path: Path, write: str, strategy: str
) -> None:
    model = write_unet(tmp_path / "unet.pt")
    image = noise(101, 83)
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    report = tp.segment(
        source,
        model=model,
        output=tmp_path / "out.zarr",
        options=Options(write=write, tile=(32, 20), strategy=strategy),
    )
    assert (report.done, report.tiles, report.failures) == (20, 20, [])
    truth = one_pass(model, image[None] / 255)
    found = read(tmp_path / "out.zarr")
    if write == "labels":
        assert found.dtype == np.uint8
        clear = np.abs(truth[0] - truth[1]) > 1e-5 * np.ptp(truth)
        np.testing.assert_array_equal(found[clear], truth.argmax(0)[clear])
    elif write == "probabilities":
        assert_close(found, torch.softmax(torch.from_numpy(truth), 0).numpy())
    else:
        assert_close(found, truth)


@pytest.mark.parametrize("shape", [(30, 41, 29), (1, 7, 53), (9, 1, 1)])
def test_a_volume_in_tiles_is_one_pass_over_the_whole(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    model = write_unet(tmp_path / "unet.pt", ndim=3)
    image = noise(*shape)
    source = write_volume(tmp_path / "image.zarr", image, "zyx")
    options = Options(write="logits", tile=(8, 12, 16))
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert_close(read(tmp_path / "out.zarr"), one_pass(model, image[None] / 255))


@pytest.mark.parametrize("strategy", ["sweep", "direct"])
@pytest.mark.parametrize(
    ("shape", "architecture"),
    [
        ((83, 61), {"padding": "same", "batch_norm": True}),
        ((19, 41, 37), {"pools": [[1, 2, 2], 2], "kernels": [[1, 3, 3], 3, 3]}),
    ],
)
def test_gated_skips_and_residual_blocks_in_tiles_are_one_pass(
    tmp_path: Path, shape: tuple[int, ...], architecture: dict[str, object], strategy: str
) -> None:
    more = {"ndim": len(shape), "attention": True, "residual": True, **architecture}
    model = write_unet(tmp_path / "unet.pt", **more)  # type: ignore[arg-type]
    image = noise(*shape)
    source = write_volume(tmp_path / "image.zarr", image, "zyx"[-len(shape) :])
    tile = (8, 20, 16)[-len(shape) :]
    options = Options(write="logits", tile=tile, strategy=strategy, threads=1)
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert_close(read(tmp_path / "out.zarr"), one_pass(model, image[None] / 255))


def test_a_plane_network_goes_slice_by_slice(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt")
    image = noise(5, 40, 36)
    source = write_volume(tmp_path / "image.zarr", image, "zyx")
    options = Options(write="logits", tile=(2, 20, 16))
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert_close(read(tmp_path / "out.zarr"), one_pass(model, image[None] / 255))


def test_channels_may_be_anywhere(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt", in_channels=3)
    image = noise(40, 36, 3)
    tifffile.imwrite(tmp_path / "image.tif", image, photometric="rgb", tile=(16, 16))
    options = Options(write="logits", tile=(16, 32))
    tp.segment(tmp_path / "image.tif", model=model, output=tmp_path / "out.zarr", options=options)
    truth = one_pass(model, np.moveaxis(image, -1, 0) / 255)
    assert_close(read(tmp_path / "out.zarr"), truth)


@pytest.mark.parametrize("boundary", ["mirror", "network"])
def test_windows_smaller_than_tiles(tmp_path: Path, boundary: str) -> None:
    """A program of one fixed size is run at that size, several times for each tile."""
    network = zoo.same_unet().float().eval()
    program = torch.export.export(network, (torch.rand(1, 1, 120, 120),))
    torch.export.save(program, tmp_path / "fixed.pt2")
    torch.save(network.state_dict(), tmp_path / "free.pt")
    image = noise(139, 97, dtype="float32")
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    options = Options(write="logits", tile=(64, 64), boundary=boundary)
    tp.segment(
        source, model=tmp_path / "fixed.pt2", output=tmp_path / "fixed.zarr", options=options
    )
    free = Options(write="logits", boundary=boundary, network="tilepipe.testing.zoo:same_unet")
    tp.segment(source, model=tmp_path / "free.pt", output=tmp_path / "free.zarr", options=free)
    if boundary == "mirror":
        assert_close(read(tmp_path / "fixed.zarr"), read(tmp_path / "free.zarr"))
    padded = np.zeros((1, 1, 144, 120), np.float32)  # the next sizes that each accepts
    padded[0, 0, :139, :97] = image
    with torch.inference_mode():
        truth = network(torch.from_numpy(padded))[0].numpy()[:, :139, :97]
    if boundary == "network":
        assert_close(read(tmp_path / "fixed.zarr"), truth)


def test_several_windows_in_a_tile_and_shards(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt")
    image = noise(150, 170)
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    options = Options(write="logits", chunks=(16, 16), shards=(80, 64), tile=(80, 128))
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert_close(read(tmp_path / "out.zarr"), one_pass(model, image[None] / 255))
    assert zarr.open_array(tmp_path / "out.zarr/0").shards == (1 * 2, 80, 64)


@pytest.fixture(scope="module")
def scheduler() -> Iterator[str]:
    with dask.local_client(1, threads=3, dashboard=False) as client:
        yield str(client.scheduler_info()["address"])


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_sweep_along_any_axis_and_with_any_engine(
    tmp_path: Path, scheduler: str, axis: int
) -> None:
    """Long tiles, several channels in and out, units of several slabs, NaN counted once."""
    model = write_unet(tmp_path / "unet.pt", ndim=3, depth=2, in_channels=2, normalize="none")
    shape = [20, 20, 20]
    shape[axis] = 83
    image = noise(2, *shape, dtype="float32")
    image[0, 3, 4, 5] = np.nan
    source = write_volume(tmp_path / "image.zarr", image, "czyx", chunks=(1, 9, 9, 9))
    tile = tuple(40 if a == axis else 10 for a in range(3))
    options = Options(write="probabilities", tile=tile, chunks=(10, 10, 10), strategy="sweep")
    reports = [
        tp.segment(
            source, model=model, output=tmp_path / engine, options=options, engine=engine,
            scheduler=scheduler if engine == "dask" else None,
        )
        for engine in ("serial", "dask")
    ]  # fmt: skip
    assert all(report.plan.sizes.sweep is not None for report in reports)
    assert [report.nonfinite for report in reports] == [1, 1]
    assert reports[0].plan.identity() == reports[1].plan.identity()
    found, other = read(tmp_path / "serial"), read(tmp_path / "dask")
    assert found.tobytes() == other.tobytes()
    truth = one_pass(model, np.nan_to_num(image, nan=0.0))
    assert_close(found, torch.softmax(torch.from_numpy(truth), 0).numpy())


def test_a_sweep_that_cannot_be_is_refused(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt")
    source = write_volume(tmp_path / "image.zarr", noise(4, 40, 40), "zyx")
    with pytest.raises(BadRequest, match=r"strategy .*=sweep.* as many axes as the volume"):
        tp.plan(source, model=model, options=Options(strategy="sweep"))


def test_one_channel_and_its_threshold(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt", classes=1)
    image = noise(40, 40)
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    options = Options(threshold=0.6)
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    probability = 1 / (1 + np.exp(-one_pass(model, image[None] / 255)[0].astype(float)))
    clear = np.abs(probability - 0.6) > 1e-5
    np.testing.assert_array_equal(read(tmp_path / "out.zarr")[clear], (probability > 0.6)[clear])


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_grey_values_of_every_type(tmp_path: Path, dtype: str) -> None:
    model = write_unet(tmp_path / "unet.pt", normalize="zscore")
    image = noise(44, 40, dtype=dtype)
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    options = Options(write="logits", tile=(16, 16))
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    wide = image.astype(float)
    truth = one_pass(model, ((wide - wide.mean()) / wide.std())[None])
    assert_close(read(tmp_path / "out.zarr"), truth)


def test_values_that_are_not_finite_are_counted_once_and_taken_as_zero(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt", normalize="none")
    image = noise(60, 60, dtype="float32")
    image[30, 31], image[2, 3], image[59, 0] = np.nan, np.inf, -np.inf
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    options = Options(write="logits", tile=(16, 16))
    report = tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert report.nonfinite == 3
    clean = np.where(np.isfinite(image), image, 0)
    assert_close(read(tmp_path / "out.zarr"), one_pass(model, clean[None]))


def test_the_output_says_what_it_is(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt")
    source = write_volume(tmp_path / "image.zarr", noise(40, 40), "yx")
    tp.segment(source, model=model, output=tmp_path / "out.zarr")
    attributes = json.loads((tmp_path / "out.zarr/zarr.json").read_text())["attributes"]
    ours = attributes["tilepipe"]
    assert ours["state"] == "done"
    assert ours["plan"]["model"]["digest"] == load_model(model).digest
    assert ours["plan"]["profile"]["context"] == {
        "before": [20, 20], "after": [20, 20], "step": [4, 4]
    }  # fmt: skip
    assert set(ours["versions"]) == {"tilepipe", "python", "torch", "zarr", "numpy"}
    volume = open_volume(tmp_path / "out.zarr")
    assert (volume.kind, volume.axes, volume.shape) == ("OME-Zarr 0.5", "yx", (40, 40))


def test_a_network_without_context_is_refused_or_run_inexactly(tmp_path: Path) -> None:
    weights = tmp_path / "weights.pt"
    torch.save(refusals.GroupNormed().state_dict(), weights)
    source = write_volume(tmp_path / "image.zarr", noise(40, 40), "yx")
    options = Options(network="tilepipe.testing.refusals:GroupNormed", tile=(16, 16))
    with pytest.raises(BadRequest, match=r"group normalisation .*layer norm.* --inexact"):
        tp.segment(
            source, model=tmp_path / "weights.pt", output=tmp_path / "out.zarr", options=options
        )
    assert not (tmp_path / "out.zarr").exists()
    inexact = Options(network="tilepipe.testing.refusals:GroupNormed", tile=(16, 16), inexact=True)
    report = tp.segment(source, model=weights, output=tmp_path / "out.zarr", options=inexact)
    assert any(notice.startswith("INEXACT") for notice in report.plan.notices)


def test_the_five_lines_of_the_python_api(tmp_path: Path) -> None:
    model = write_unet(tmp_path / "unet.pt")
    source = write_volume(tmp_path / "image.zarr", noise(40, 40), "yx")
    assert tp.open_volume(source).shape == (40, 40)
    assert tp.load_model(model).channels == 1
    assert tp.context(model).before == (20, 20)
    assert tp.context(tp.load_model(model)) == tp.context(UNet(ndim=2, base=1, depth=3))
    assert tp.plan(source, model=model).costs.tiles == 1
    assert tp.segment(source, model=model).done == 1
    assert (tmp_path / "image-segmented.zarr").exists()


@pytest.mark.parametrize(
    "wrong",
    [{"tile": "64,64"}, {"tile": 64}, {"memory": "4GB"}, {"threads": 1.5}, {"chunks": (8.0, 8)}],
)
def test_sizes_are_numbers(wrong: dict[str, Any]) -> None:
    with pytest.raises(BadRequest, match=f"{next(iter(wrong))} .* whole number"):
        Options(**wrong)


@pytest.mark.parametrize("boundary", ["mirror", "network"])
@pytest.mark.parametrize("network", ["align_corners", "bilinear", "ResidualNetwork", "Attention"])
@pytest.mark.parametrize("strategy", ["regions", "sweep"])
def test_padded_networks_at_odd_sizes(
    tmp_path: Path, network: str, boundary: str, strategy: str
) -> None:
    """Regions of the whole graph are exact where no lattice is, with tiles off it, too."""
    torch.manual_seed(0)
    module = getattr(zoo, network)().eval()
    torch.save(module.state_dict(), tmp_path / "weights.pt")
    channels = 2 if network == "ResidualNetwork" else 1
    image = noise(channels, 61, 85, dtype="float32")
    source = write_volume(tmp_path / "image.zarr", image, "cyx")
    options = Options(
        write="probabilities" if network == "Attention" else "logits", tile=(19, 37),
        boundary=boundary, network=f"tilepipe.testing.zoo:{network}",
        strategy="sweep" if strategy == "sweep" else "direct",
    )  # fmt: skip
    report = tp.segment(
        source, model=tmp_path / "weights.pt", output=tmp_path / "out.zarr", options=options
    )
    plan = report.plan
    assert plan.strategy == strategy
    whole = image
    for axis, (a, b) in enumerate(zip(plan.box.start, plan.box.stop, strict=True), start=1):
        if boundary == "mirror":
            whole = np.take(whole, mirror(a, b, image.shape[axis]), axis=axis)
        else:
            pads = [(0, 0)] * 3
            pads[axis] = (0, b - image.shape[axis])
            whole = np.pad(whole, pads)
    with torch.inference_mode():
        answer = module(torch.from_numpy(np.ascontiguousarray(whole))[None])[0].numpy()
    if boundary == "network" and network not in ("ResidualNetwork", "Attention"):
        assert whole.shape[1:] == (61, 85)  # these networks take odd sizes as they are
    truth = answer[(slice(None), *Region.whole((61, 85)).within(plan.box.start))]
    assert_close(read(tmp_path / "out.zarr"), truth)
