"""Small real volumes and networks on disk, and the whole-image answer to compare with."""

from __future__ import annotations

from contextlib import closing, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
import zarr

from tilepipe.geometry import Region, mirror
from tilepipe.models.checkpoint import save_checkpoint
from tilepipe.models.model import load_model
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import UNet
from tilepipe.models.windows import whole
from tilepipe.runs.fence import Right
from tilepipe.runs.ledger import Ledger, lay_plan, take_lease
from tilepipe.volumes.output import Output

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from numpy.typing import NDArray

SCALE = "scale:0.00392156862745098,0"


def write_unet(path: Path, *, normalize: str = SCALE, **architecture: object) -> Path:
    """Write a checkpoint of the paper's network with random weights."""
    torch.manual_seed(0)
    chosen = {"ndim": 2, "base": 2, "depth": 3, **architecture}
    network = UNet(**chosen)  # type: ignore[arg-type]
    labels = ["background", "object", "border"][: int(str(chosen.get("classes", 2)))]
    save_checkpoint(
        path, network, architecture=chosen, normalize=normalize, labels=labels, provenance={}
    )
    return path


def write_volume(
    path: Path, image: NDArray[np.generic], axes: str, chunks: object = "auto"
) -> Path:
    """Write a Zarr v3 array that says its axes."""
    zarr.create_array(
        path, data=np.asarray(image), chunks=chunks or "auto", dimension_names=list(axes)
    )
    return path


def noise(*shape: int, dtype: str = "uint8", seed: int = 0) -> NDArray[np.generic]:
    """Return grey values over the whole of the type's range, or 0 to 1 for floats."""
    random = np.random.default_rng(seed)
    if np.dtype(dtype).kind == "f":
        return random.random(shape).astype(dtype)
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
    return random.integers(low, high, shape, dtype=dtype, endpoint=True)


def one_pass(model_path: Path, image: NDArray[np.floating]) -> NDArray[np.float32]:
    """Return what one pass over the whole mirrored image gives; (classes, *axes), float32.

    ``image`` is (channels, *axes), normalized already; axes in front of the network's are looped.
    """
    model = load_model(model_path)
    profile = find_profile(model)
    if image.ndim - 1 > profile.axes:
        return np.stack([one_pass(model_path, part) for part in np.moveaxis(image, 1, 0)], axis=1)
    shape = image.shape[1:]
    box = whole(profile, shape, None)
    for axis, (a, b) in enumerate(zip(box.start, box.stop, strict=True), start=1):
        image = np.take(image, mirror(a, b, image.shape[axis]), axis=axis)
    with torch.inference_mode():
        answer = model.module(torch.from_numpy(image.astype(np.float32))[None])[0].numpy()
    origin = tuple(a + o for a, o in zip(box.start, profile.offset, strict=True))
    kept: NDArray[np.float32] = answer[(slice(None), *Region.whole(shape).within(origin))]
    return kept


@contextmanager
def right_to(target: str | Path) -> Iterator[Right]:
    """Own an output for a while, as a run does."""
    output = Output.at(target)
    with closing(take_lease(output)) as lease:
        yield Right(output, lease.name, lease.token)


def new_ledger(target: str | Path, plan: Mapping[str, object], *, tiles: int) -> Ledger:
    """Begin a ledger where no output need be, open for writing."""
    output = Output.at(target)
    lease = take_lease(output)
    return Ledger(output, lay_plan(output, plan, tiles=tiles), tiles=tiles, lease=lease)


def read(path: Path) -> NDArray[np.generic]:
    """Return the full resolution of an output."""
    return np.asarray(zarr.open_array(path / "0", mode="r")[:])


def assert_close(found: NDArray[np.generic], truth: NDArray[np.generic]) -> None:
    """Fail where values differ by more than float rounding."""
    assert found.shape == truth.shape
    assert np.abs(found - truth).max() <= 1e-5 * np.ptp(truth)
