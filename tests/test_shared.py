"""Real images and a real network, where they are at hand: ``../shared`` beside the checkout."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import zarr

import tilepipe as tp
from tests.support import one_pass, read, write_unet
from tilepipe.models.spec import find_profile
from tilepipe.options import Options
from tilepipe.volumes.volume import open_volume

SHARED = Path(__file__).parents[2] / "shared"
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no real data: {SHARED} is absent")
BROAD = SHARED / "models" / "nuclei-broad"


def test_the_nuclei_network_of_the_zoo_gives_its_published_output(tmp_path: Path) -> None:
    image = np.load(BROAD / "test_input.npy")[0, 0]
    zarr.create_array(tmp_path / "image.zarr", data=image)
    options = Options(
        tile=(128, 128), boundary="network", normalize="zscore", write="probabilities"
    )
    tp.segment(tmp_path / "image.zarr", model=BROAD / "weights.pt", output=tmp_path / "out.zarr",
               options=options)  # fmt: skip
    truth = np.load(BROAD / "test_output.npy")[0]
    assert np.abs(read(tmp_path / "out.zarr") - truth).max() < 1e-5


def test_its_context_is_structural_not_the_declared_32() -> None:
    profile = find_profile(tp.load_model(BROAD / "weights.pt"))
    assert min(profile.context.before + profile.context.after) >= 53
    assert (profile.context.step, profile.method) == ((8, 8), "probe")


@pytest.mark.parametrize(
    ("name", "ndim", "channels", "tile"),
    [
        pytest.param("isbi2012/train-volume.tif", 2, 1, (8, 256, 256), marks=pytest.mark.long),
        pytest.param("fib25/volume.tif", 3, 1, (80, 128, 128), marks=pytest.mark.long),
        ("bluemarble/west.tif", 2, 3, (1024, 1024)),
        pytest.param(
            "histology/cmu-1-small-region.svs", 2, 3, (1024, 1024), marks=pytest.mark.long
        ),
    ],
)
def test_real_images_from_tiff_and_from_zarr(
    name: str, ndim: int, channels: int, tile: tuple[int, ...], tmp_path: Path
) -> None:
    model = write_unet(tmp_path / "unet.pt", ndim=ndim, in_channels=channels)
    source = SHARED / "data" / name
    options = Options(write="logits", tile=tile)
    tp.segment(source, model=model, output=tmp_path / "tiff.zarr", options=options)
    volume = open_volume(source)
    whole = tp.plan(source, model=model).grid.shape
    image = volume.read(tp.plan(source, model=model).grid[0].write.whole(whole))
    axes = "c" * (channels > 1) + volume.axes
    zarr.create_array(tmp_path / "copy.zarr", data=image if channels > 1 else image[0],
                      dimension_names=list(axes))  # fmt: skip
    tp.segment(tmp_path / "copy.zarr", model=model, output=tmp_path / "zarr.zarr", options=options)
    found = read(tmp_path / "tiff.zarr")
    np.testing.assert_array_equal(found, read(tmp_path / "zarr.zarr"))
    truth = one_pass(model, image / np.float32(255))
    assert np.abs(found - truth).max() < 1e-5 * np.ptp(truth)
