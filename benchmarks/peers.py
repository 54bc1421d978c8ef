"""What others offer, on the same network, image, threads and memory format."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
import zarr
from cases import Case, load, model_of, multiply_adds

from tilepipe.models.spec import find_profile

if TYPE_CHECKING:
    from pathlib import Path


def timed(function: Any) -> dict[str, object]:
    """Return seconds of wall and of all processors."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def halo(profile: Any) -> list[int]:
    """Return voxels round a block that are enough on both sides, and keep it on the lattice."""
    found = []
    for lead, after, step in zip(
        profile.lead, profile.context.after, profile.context.step, strict=True
    ):
        depth = lead
        while depth < after:
            depth += step
        found.append(depth)
    return found


def on_block(network: Any, profile: Any, values: Any, depth: list[int], calls: list[Any]) -> Any:
    """Return the network's answer inside of a block that has ``depth`` voxels round it."""
    sizes = [profile.accepted(a, n) for a, n in enumerate(values.shape)]
    after = [(0, size - n) for size, n in zip(sizes, values.shape, strict=True)]
    tensor = torch.from_numpy(np.pad(values, after))[None, None]
    calls.append(tuple(tensor.shape[2:]))
    layout = torch.channels_last if values.ndim == 2 else torch.channels_last_3d
    with torch.inference_mode():
        answer = network(tensor.contiguous(memory_format=layout))[0]
    begin = [d - o for d, o in zip(depth, profile.offset, strict=True)]
    inner = [n - 2 * d for n, d in zip(values.shape, depth, strict=True)]
    place = [slice(a, a + n) for a, n in zip(begin, inner, strict=True)]
    return answer[(slice(None), *place)].numpy()


def same_size(network: Any, image: Any, profile: Any, calls: list[Any]) -> Any:
    """Run a network so that the answer has the size of the image, mirrored where it is valid."""
    if not any(profile.shrink):
        calls.append(tuple(image.shape[2:]))
        return network(image)
    pads: list[int] = []
    for n, lead, after, size, step in zip(
        image.shape[:1:-1], profile.lead[::-1], profile.context.after[::-1],
        profile.smallest[::-1], profile.context.step[::-1], strict=True,
    ):  # fmt: skip
        want = lead + n + after
        accepted = size + max(0, -(-(want - size) // step)) * step
        pads += [lead, accepted - lead - n]
    grown = F.pad(image, pads, mode="reflect")
    calls.append(tuple(grown.shape[2:]))
    answer = network(grown)
    return answer[(..., *(slice(n) for n in image.shape[2:]))]


def map_overlap(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Use dask's own overlap, with a depth that is enough, and write what comes to Zarr."""
    import dask
    import dask.array as da

    network, profile = load(case, folder), find_profile(model_of(case, folder))
    depth, calls = halo(profile), list[Any]()

    def block(values: Any) -> Any:
        torch.set_num_threads(threads)
        return on_block(network, profile, values.astype(np.float32) / 255, depth, calls)

    image = da.from_zarr(folder / "image.zarr").rechunk(case.block)
    grown = da.overlap.overlap(image, depth=dict(enumerate(depth)), boundary="reflect")
    answer = grown.map_blocks(block, dtype=np.float32, new_axis=0, chunks=(2, *image.chunks))
    out = zarr.create_array(
        folder / "overlap.zarr", shape=(2, *case.shape), chunks=(2, *case.block), dtype="float32",
        overwrite=True,
    )  # fmt: skip
    with dask.config.set(scheduler="synchronous"):
        found = timed(lambda: da.store(answer, out, lock=False))
    work = sum(multiply_adds(case, folder, tuple(shape)) for shape in calls)
    return {**found, "multiply_adds": work, "out": "overlap.zarr"}


def torch_em(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Use torch-em's prediction with a halo that is enough, from Zarr to Zarr."""
    from torch_em.util.prediction import predict_with_halo

    network, profile = load(case, folder), find_profile(model_of(case, folder))
    depth, calls = halo(profile), list[Any]()

    def predict(_: Any, image: Any) -> Any:
        torch.set_num_threads(threads)
        inner = on_block(network, profile, image[0, 0].numpy(), depth, calls)
        return torch.from_numpy(np.pad(inner, [(0, 0), *((d, d) for d in depth)]))[None]

    out = zarr.create_array(
        folder / "torch-em.zarr", shape=(2, *case.shape), chunks=(2, *case.block),
        dtype="float32", overwrite=True,
    )  # fmt: skip
    image = zarr.open_array(folder / "image.zarr", mode="r")
    found = timed(
        lambda: predict_with_halo(
            image, network, ["cpu"], case.block, depth, output=out, disable_tqdm=True,
            preprocess=lambda values: values.astype(np.float32) / 255, prediction_function=predict,
        )
    )  # fmt: skip
    work = sum(multiply_adds(case, folder, shape) for shape in calls)
    return {**found, "multiply_adds": work, "out": "torch-em.zarr"}


def monai(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Use MONAI's sliding window; each window is mirrored outside, as a valid network needs."""
    from monai.inferers import sliding_window_inference

    network, profile = load(case, folder), find_profile(model_of(case, folder))
    layout = torch.channels_last if len(case.shape) == 2 else torch.channels_last_3d
    calls: list[Any] = []

    def predictor(image: Any) -> Any:
        return same_size(network, image.contiguous(memory_format=layout), profile, calls)

    out = zarr.create_array(
        folder / "monai.zarr", shape=(2, *case.shape), chunks=(2, *case.block), dtype="float32",
        overwrite=True,
    )  # fmt: skip

    def run() -> None:
        image = zarr.open_array(folder / "image.zarr", mode="r")[:]
        tensor = torch.from_numpy(image.astype(np.float32) / 255)[None, None]
        out[:] = sliding_window_inference(
            tensor, case.window, 1, predictor, overlap=float(name.split()[1]), mode="gaussian"
        )[0].numpy()

    found = timed(run)
    work = sum(multiply_adds(case, folder, shape) for shape in calls)
    return {**found, "multiply_adds": work, "out": "monai.zarr"}


def per_pixel(name: str, case: Case, folder: Path, threads: int) -> dict[str, object]:
    """Time one patch per pixel, on a sample; the seconds are those of all pixels."""
    network, profile = load(case, folder), find_profile(model_of(case, folder))
    image = torch.rand(1, 1, *profile.smallest)
    network(image)
    found = timed(lambda: [network(image) for _ in range(5)])
    pixels = int(np.prod(case.shape))
    work = pixels * multiply_adds(case, folder, profile.smallest)
    return {k: v / 5 * pixels for k, v in found.items()} | {"multiply_adds": work}
