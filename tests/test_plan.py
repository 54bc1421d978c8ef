"""The plan's figures are exact, and what cannot work is refused before anything is written."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

import tilepipe as tp
from tests.support import noise, right_to, write_unet, write_volume
from tilepipe.engines import serial
from tilepipe.errors import BadRequest
from tilepipe.geometry import Region, ceil_to, mirror
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import export
from tilepipe.graph.sweep import Sweep
from tilepipe.models.cost import Liveness
from tilepipe.models.model import wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import UNet
from tilepipe.models.windows import whole
from tilepipe.options import Options
from tilepipe.planning.costs import _decoded
from tilepipe.planning.plan import default_target
from tilepipe.planning.regions import regions_of
from tilepipe.runs.fence import Right
from tilepipe.segmentation.resume import create_output
from tilepipe.segmentation.worker import SegmentJob
from tilepipe.testing import zoo
from tilepipe.volumes.output import Output
from tilepipe.volumes.volume import Volume

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

    from tilepipe.models.model import Model
    from tilepipe.models.windows import Span
    from tilepipe.planning.regions import Regions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_unet(tmp_path_factory.mktemp("model") / "unet.pt")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_volume(tmp_path / "image.zarr", noise(90, 110), "yx", chunks=(32, 32))


@pytest.mark.parametrize("strategy", ["direct", "sweep"])
def test_bytes_read_are_what_is_decoded(
    strategy: str, model: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = 0
    read = Volume.read

    def counted(self: Volume, region: Region) -> NDArray[np.generic]:
        nonlocal decoded
        whole = [
            min(n, ceil_to(b, c)) - a // c * c
            for a, b, c, n in zip(region.start, region.stop, self.chunks, self.shape, strict=True)
        ]
        decoded += int(np.prod(whole))
        return read(self, region)

    monkeypatch.setattr(Volume, "read", counted)
    options = Options(tile=(32, 48), chunks=(16, 16), strategy=strategy)
    report = tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert decoded == report.plan.costs.read_bytes
    assert report.plan.costs.tiles == 9
    if strategy == "direct":
        assert report.plan.costs.calls == 9


class Here(ThreadPoolExecutor):
    """Runs what is submitted at once, in the thread that submits it."""

    def submit(self, function: Callable[..., Any], /, *args: Any, **more: Any) -> Future[Any]:
        """Return what is done already."""
        done: Future[Any] = Future()
        done.set_result(function(*args, **more))
        return done


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("valid_unet", "regions"),
        ("ResidualNetwork", "regions"),
        ("Modern", "regions"),
        ("align_corners", "regions"),
        ("valid_unet", "sweep"),
        ("ResidualNetwork", "sweep"),
        ("Modern", "sweep"),
        ("align_corners", "sweep"),
        ("same_unet", "windows"),
        ("ResidualNetwork", "windows"),
    ],
)
def test_multiply_adds_are_what_is_done(name: str, strategy: str, tmp_path: Path) -> None:
    """The plan's figure is what the counter of the library counts while the tiles run."""
    torch.save(getattr(zoo, name)().state_dict(), tmp_path / "weights.pt")
    channels = 2 if name == "ResidualNetwork" else 1
    source = write_volume(tmp_path / "v.zarr", noise(channels, 90, 110), "cyx")
    options = Options(
        network=f"tilepipe.testing.zoo:{name}", tile=(32, 48), chunks=(16, 16), inexact=True,
        strategy="sweep" if strategy == "sweep" else "direct",
    )  # fmt: skip
    plan = tp.plan(source, model=tmp_path / "weights.pt", output=tmp_path / "o", options=options)
    if strategy == "windows":
        network = tp.load_model(
            tmp_path / "weights.pt", network=f"tilepipe.testing.zoo:{name}"
        ).module
        example = torch.rand(1, channels, 160, 160)
        torch.jit.save(torch.jit.trace(network, example), tmp_path / "script.pt")
        plan = tp.plan(
            source, model=tmp_path / "script.pt", output=tmp_path / "o",
            options=Options(tile=(32, 48), chunks=(16, 16), inexact=True),
        )  # fmt: skip
    assert plan.strategy == strategy
    create_output(Output.at(plan.target), plan, {}, overwrite=False)
    added = {torch.ops.mkldnn._convolution_pointwise_: _added_convolution}
    with (
        right_to(plan.target) as right,
        FlopCounterMode(display=False, custom_mapping=added) as counter,
    ):
        worker = SegmentJob(plan, right).open()
        worker._compute = Here()  # the counter sees its own thread only
        for tile in plan.grid:
            worker(tile.index)
    assert counter.get_total_flops() // 2 == plan.costs.multiply_adds
    network = tp.load_model(tmp_path / "weights.pt", network=f"tilepipe.testing.zoo:{name}").module
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, channels, *plan.box.shape))
    if strategy != "windows":
        assert counter.get_total_flops() // 2 == plan.costs.floor


def _added_convolution(
    total: torch.Size, image: torch.Size, weight: torch.Size, *args: object, **kwargs: object
) -> int:
    """Count a convolution that is added to what is there as the library counts a plain one."""
    return int(conv_flop_count(list(image), list(weight), list(total)))


@given(st.integers(1, 40), st.integers(1, 9), st.integers(-30, 39), st.integers(1, 60))
def test_chunks_that_a_mirrored_range_needs(length: int, chunk: int, low: int, size: int) -> None:
    places = mirror(low, low + size, length)
    first, last = places.min() // chunk * chunk, min(length, ceil_to(int(places.max()) + 1, chunk))
    if low < length and low + size > 0:  # as every window, it holds voxels of the volume
        assert _decoded(low, low + size, length, chunk) == last - first


def swept(name: str, length: int) -> tuple[Regions, list[list[Span]], Model]:
    """Return a region ``length`` rows long with its spans, and its network."""
    model = wrap(getattr(zoo, name)().float())
    profile = find_profile(model)
    box = whole(profile, (length, 512), None)
    graph = export(model.on_meta(), (1, 1, *box.shape))
    regions = regions_of(profile, graph, box, (length, 256))
    return regions, [regions.along(0, 0, length), regions.along(1, 0, 256)], model


@pytest.mark.parametrize("name", ["valid_unet", "same_unet", "bilinear"])
def test_a_longer_sweep_takes_no_more_memory(name: str) -> None:
    costs = [
        regions.swept(spans, 0, 64)
        for regions, spans, _ in (swept(name, 64 * times) for times in (8, 32, 320))
    ]
    assert costs[2].multiply_adds > 9 * costs[1].multiply_adds
    assert costs[2].peak == costs[1].peak <= 1.1 * costs[0].peak


@pytest.mark.parametrize("name", ["valid_unet", "same_unet", "align_corners"])
def test_the_memory_of_a_sweep_is_what_its_tensors_take(name: str) -> None:
    regions, spans, model = swept(name, 512)
    predicted = regions.swept(spans, 0, 64).peak
    output = regions.output_box(Region((0, 0), (512, 256)))
    sweep = Sweep(RegionEvaluator(regions.graph, model.on_meta()), output, 0)
    alive = Liveness(torch.empty(1, device="meta"))
    with torch.inference_mode(), alive:
        for _ in sweep.run(64, lambda r: torch.empty(1, 1, *r.shape, device="meta")):
            pass
    assert 0.7 * alive.peak <= predicted <= 1.45 * alive.peak


def test_a_larger_memory_never_costs_more_work(model: Path, source: Path) -> None:
    works = [
        tp.plan(source, model=model, options=Options(memory=mb * 10**6)).costs
        for mb in (700, 1000, 4000)
    ]
    assert works[0].multiply_adds >= works[1].multiply_adds >= works[2].multiply_adds
    assert all(w.memory <= mb * 10**6 for w, mb in zip(works, (700, 1000, 4000), strict=True))


@settings(max_examples=6)
@given(data=st.data())
def test_every_plan_has_one_writer_for_each_write_unit(
    model: Path, tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    shape = data.draw(st.tuples(st.integers(1, 3000), st.integers(1, 3000)))
    path = tmp_path_factory.mktemp("volume") / "v.zarr"
    zarr.create_array(path, shape=shape, dtype="uint8", chunks=(256, 256), dimension_names="yx")
    write = data.draw(st.sampled_from(["labels", "probabilities"]))
    plan = tp.plan(path, model=model, options=Options(write=write, memory=900 * 10**6))
    for n, tile, unit, chunk in zip(
        shape, plan.sizes.tile, plan.sizes.unit, plan.sizes.chunks, strict=True
    ):
        assert tile % 4 == 0
        assert tile % unit == 0 or tile >= n
        assert unit % chunk == 0


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tile": (0, 32)}, "must be positive"),
        ({"tile": (-4, 32)}, "must be positive"),
        ({"tile": (32,)}, "one size for each of the axes yx"),
        ({"tile": (16, 16), "chunks": (32, 32)}, "or two tiles write into one"),
        ({"tile": (16, 16), "chunks": (16, 16), "shards": (32, 32)}, "or two tiles write into one"),
        ({"chunks": (16, 16), "shards": (24, 16)}, "must be a multiple of the chunks"),
        ({"memory": 10**6}, r"memory \(=1 MB\) must hold the smallest tile"),
        ({"boundary": "network"}, "consumes 40,40 voxels: use mirror"),
        ({"boundary": "periodic"}, "must be one of mirror, network"),
        ({"normalize": "minmax"}, "must be none, zscore"),
        ({"normalize": "scale:0,1"}, "must not scale by 0"),
        ({"normalize": "percentile:90,10"}, "0 <= LO < HI <= 100"),
        ({"threshold": 0.5}, "one output channel"),
        ({"threshold": 2.0}, "between 0 and 1"),
        ({"axes": "zyx"}, "axes"),
        ({"device": "tpu"}, "must be auto, cpu, cuda"),
        ({"threads": 0}, "must be positive"),
        ({"ome_version": "0.4", "shards": (32, 32), "chunks": (16, 16)}, "shards"),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused_in_one_line(
    options: dict[str, object], says: str, model: Path, source: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadRequest, match=says) as caught:
        tp.segment(
            source, model=model, output=tmp_path / "out.zarr",
            options=Options(**options),  # type: ignore[arg-type]
        )  # fmt: skip
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.zarr").exists()


@pytest.mark.long
def test_windows_begin_on_the_lattice(tmp_path: Path) -> None:
    script = torch.jit.trace(UNet(ndim=2, base=2, depth=2).eval(), torch.rand(1, 1, 44, 44))
    torch.jit.save(script, tmp_path / "script.pt")
    source = write_volume(tmp_path / "v.zarr", noise(90, 110), "yx")
    for options, says in (
        (Options(tile=(31, 32)), r"tile \(=31,32\) along y must .*step \(=2\); nearest: 30 or 32"),
        (Options(chunks=(5, 8)), r"chunks \(=5,8\) .* multiple of the network's step"),
    ):
        with pytest.raises(BadRequest, match=says):
            tp.plan(source, model=tmp_path / "script.pt", options=options)


def test_chunks_of_a_tile_off_the_lattice_divide_it(model: Path, tmp_path: Path) -> None:
    source = tmp_path / "v.zarr"
    zarr.create_array(source, shape=(5000, 5000), dtype="uint8", chunks=(512, 512),
                      dimension_names="yx")  # fmt: skip
    plan = tp.plan(source, model=model, options=Options(tile=(1500, 1021)))
    assert plan.sizes.tile == (1500, 1021)
    assert plan.sizes.chunks == (500, 1021)  # a prime has no divisor that would do
    assert plan.costs.tiles == 4 * 5


def test_volumes_that_do_not_fit_the_network(model: Path, tmp_path: Path) -> None:
    three = write_volume(tmp_path / "c.zarr", noise(3, 40, 40), "cyx")
    with pytest.raises(BadRequest, match=r"reads 1 channel; .* 3 channels"):
        tp.plan(three, model=model)
    solid = write_unet(tmp_path / "solid.pt", ndim=3)
    flat = write_volume(tmp_path / "f.zarr", noise(40, 40), "yx")
    with pytest.raises(BadRequest, match="reads 3 axes; the volume yx"):
        tp.plan(flat, model=solid)
    film = write_volume(tmp_path / "t.zarr", noise(4, 40, 40), "tyx")
    with pytest.raises(BadRequest, match="reads zyx; the volume's axes are tyx"):
        tp.plan(film, model=solid)


def test_a_million_tiles_are_planned_at_once(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "huge.zarr"
    zarr.create_array(path, shape=(1_000_000, 1_000_000), dtype="uint8", chunks=(4096, 4096),
                      dimension_names="yx")  # fmt: skip
    plan = tp.plan(path, model=model, options=Options(tile=(1024, 1024), chunks=(1024, 1024)))
    assert plan.costs.tiles == 977**2
    assert plan.costs.recompute > 0


def test_a_job_is_small(model: Path, source: Path) -> None:
    import pickle

    plan = tp.plan(source, model=model)
    assert (
        len(pickle.dumps(SegmentJob(plan, Right(Output.at(plan.target), "lock", "0" * 32)))) < 5000
    )
    assert serial.run.__module__ == "tilepipe.engines.serial"


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("a/volume.zarr", "a/volume-segmented.zarr"),
        ("volume.ome.zarr/0", "volume-segmented.zarr"),
        ("slide.ome.tiff", "slide-segmented.zarr"),
        ("stack.TIF", "stack-segmented.zarr"),
    ],
)
def test_the_target_lies_beside_the_source(source: str, target: str) -> None:
    assert default_target(source) == target
