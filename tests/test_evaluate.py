"""Evaluation, block by block, gives what the definitions give on the whole arrays."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.ndimage
import tifffile
from click.testing import CliRunner, Result

import tilepipe as tp
from tests.support import noise, write_volume
from tilepipe.cli import main
from tilepipe.errors import BadRequest
from tilepipe.evaluation.evaluate import evaluate
from tilepipe.evaluation.scores import object_scores, partition_scores, pixel_scores
from tilepipe.evaluation.table import tabulate
from tilepipe.instances import blocks
from tilepipe.instances.growth import grow

if TYPE_CHECKING:
    from numpy.typing import NDArray

ISBI = Path(__file__).parents[2] / "shared" / "data" / "isbi2012" / "train-labels.tif"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["evaluate", *(str(argument) for argument in arguments)])


def blobs(*shape: int, seed: int) -> NDArray[np.uint8]:
    """Return a mask of cells with borders between them."""
    smooth = scipy.ndimage.gaussian_filter(np.random.default_rng(seed).random(shape), 1.5)
    return (smooth > np.quantile(smooth, 0.4)).astype(np.uint8)


def planewise(mask: NDArray[np.generic]) -> NDArray[np.int64]:
    """Return the components of each plane, numbered anew in each."""
    return np.stack([scipy.ndimage.label(plane)[0] for plane in mask]).astype(np.int64)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 3000)
    monkeypatch.setattr(blocks, "CHUNK", 16)


def write(path: Path, image: NDArray[np.generic]) -> Path:
    return write_volume(path, image, "zyx"[-image.ndim :], chunks=(2, 16, 16)[-image.ndim :])


def test_classes_are_those_of_the_whole(tmp_path: Path, small_blocks: None) -> None:
    true, found = noise(6, 50, 40, seed=1) % 4, noise(6, 50, 40, seed=2) % 3
    scores = evaluate(write(tmp_path / "p.zarr", found), write(tmp_path / "l.zarr", true))
    assert scores.kind == "classes"
    assert scores.voxels == true.size
    assert scores.pixels == pixel_scores(tabulate(found, true))
    assert scores.partition is scores.objects is None
    kept = true != 3
    less = evaluate(tmp_path / "p.zarr", tmp_path / "l.zarr", ignore=3, region="1:5,7:,:33")
    box = np.s_[1:5, 7:, :33]
    assert less.pixels == pixel_scores(tabulate(found[box][kept[box]], true[box][kept[box]]))
    assert less.region == "1:5,7:50,0:33"


@pytest.mark.parametrize("components", ["plane", "volume"])
def test_membranes_are_those_of_the_whole(
    tmp_path: Path, small_blocks: None, components: str
) -> None:
    true, found = blobs(5, 60, 50, seed=1), blobs(5, 60, 50, seed=1)
    found[:, ::9] = 0
    found[:, 30:34, 20:24] = 1
    paths = write(tmp_path / "p.zarr", found), write(tmp_path / "l.zarr", true * 255)
    told: dict[str, list[tuple[int, int]]] = {}
    scores = evaluate(
        *paths,
        kind="membrane",
        components=components,  # type: ignore[arg-type]
        progress=lambda what, done, blocks: told.setdefault(what, []).append((done, blocks)),
    )
    if components == "plane":
        plane: NDArray[np.int64] | None = np.arange(5)[:, None, None]
        ids, known, axes = planewise(found), planewise(true), (1, 2)
    else:
        plane, axes = None, (0, 1, 2)
        ids, known = (scipy.ndimage.label(m)[0].astype(np.int64) for m in (found, true))
    assert scores.partition == partition_scores(tabulate(ids, known, plane=plane))
    assert scores.objects == object_scores(tabulate(ids, known, plane=plane))
    thinned = grow(ids, axes)[0]
    assert scores.thinned == partition_scores(tabulate(thinned, known, plane=plane))
    assert scores.pixels == pixel_scores(tabulate(found, true))
    assert scores.thinned is not None
    assert scores.partition is not None
    assert scores.thinned.v_rand.score > scores.partition.v_rand.score
    assert all(len(steps) > 1 and steps[-1][0] == steps[-1][1] for steps in told.values())
    assert json.loads(json.dumps(scores.asdict()))["thinned"]["v_rand"]["score"] < 1


def test_instances_are_those_of_the_whole(tmp_path: Path, small_blocks: None) -> None:
    true, found = (planewise(blobs(4, 40, 50, seed=seed)) for seed in (3, 4))
    paths = (
        write(tmp_path / "p.zarr", found.astype(np.uint16)),
        write(tmp_path / "l.zarr", true.astype(np.uint32)),
    )
    for components, plane in (("volume", None), ("plane", np.arange(4)[:, None, None])):
        scores = evaluate(*paths, components=components, kind="instances")  # type: ignore[arg-type]
        table = tabulate(found, true, plane=plane)
        assert scores.objects == object_scores(table)
        assert scores.partition == partition_scores(table)
    assert evaluate(*paths).kind == "instances"


def test_labels_that_number_objects_are_the_true_objects_of_membranes(tmp_path: Path) -> None:
    true = np.zeros((20, 20), np.uint16)
    true[:, :9], true[:, 9:18] = 7, 300  # they touch: a mask of them would be one object
    found = np.ones((20, 20), np.uint8)
    found[:, 9] = 0
    write(tmp_path / "p.zarr", found)
    write(tmp_path / "l.zarr", true)
    scores = evaluate(tmp_path / "p.zarr", tmp_path / "l.zarr", kind="membrane")
    assert scores.thinned is not None
    assert scores.objects is not None
    assert (scores.objects.predicted, scores.objects.true) == (2, 2)
    assert scores.thinned.v_rand.merge == 1
    joined = evaluate(
        tmp_path / "p.zarr", tmp_path / "l.zarr", kind="membrane", label_objects=[7, 300]
    )
    assert joined.objects is not None
    assert joined.objects.true == 1


def test_what_is_an_object_may_be_said(tmp_path: Path) -> None:
    mask = blobs(30, 40, seed=5)
    labels = write(tmp_path / "l.zarr", mask * 255)
    inverse = write(tmp_path / "i.zarr", 1 - mask)
    grey = noise(30, 40, dtype="float32")
    grey[...] = np.where(mask, 0.7 + 0.3 * grey, 0.6 * grey)
    stack = np.stack((grey, 1 - grey))
    channels = write_volume(tmp_path / "c.zarr", stack, "cyx")
    alone = write(tmp_path / "g.zarr", grey)
    for scores in (
        evaluate(inverse, labels, objects=[0]),
        evaluate(inverse, inverse, objects=[0], label_objects=[0]),
        evaluate(labels, inverse, label_objects=[0]),
        evaluate(alone, labels, threshold=0.65),
        evaluate(channels, labels, threshold=0.65, channel=0),
        evaluate(channels, labels, threshold=0.35, channel=1, objects=[0]),
        evaluate(channels, labels, kind="mask", objects=[0]),
    ):
        assert scores.kind == "mask"
        assert scores.pixels is not None
    assert scores.pixels.classes[1].dice > 0.9  # the largest channel: above one half
    for path, options in (
        (inverse, {"objects": [0]}),
        (alone, {"threshold": 0.65}),
        (channels, {"threshold": 0.65, "channel": 0}),
    ):
        found = evaluate(path, labels, **options)  # type: ignore[arg-type]
        assert found.pixels is not None
        assert found.pixels.pixel_error == 0


@pytest.mark.parametrize("label", [7, 2**53 + 1, 2**63 + 5])
def test_objects_of_any_number_are_masks(tmp_path: Path, label: int) -> None:
    known = np.zeros((12, 16), np.uint64)
    known[:4], known[4:6], known[6:8] = label, label + 1, 2**64 - 1
    labels = write(tmp_path / "l.zarr", known)
    mask = write(tmp_path / "p.zarr", (known == label).astype(np.uint8))
    scores = evaluate(mask, labels, kind="mask", label_objects=[label], ignore=2**64 - 1)
    assert scores.pixels is not None
    assert (scores.voxels, scores.pixels.pixel_error) == (160, 0)
    assert [one.true for one in scores.pixels.classes] == [96, 64]


@pytest.mark.parametrize(("predicted", "true"), [("u8", "u8"), ("u8", "i8"), ("i8", "u8")])
def test_classes_of_64_bits_are_shown_as_they_are(
    tmp_path: Path, predicted: str, true: str
) -> None:
    """A table counts labels by their bits, and -1 has the bits of 2**64 - 1."""
    values = {"u8": [3, 2**63, 2**64 - 1, 2**63 + 7], "i8": [3, -(2**63), -1, -(2**63) + 7]}
    rows = np.repeat(np.arange(4), [6, 4, 3, 3])[:, None] * np.ones(5, int)
    paths = [
        write(tmp_path / f"{name}.zarr", np.array(values[kind], kind)[rows])
        for name, kind in (("p", predicted), ("l", true))
    ]
    scores = evaluate(*paths, kind="classes")
    assert scores.pixels is not None
    every = sorted({*values[predicted], *values[true]})
    assert [one.label for one in scores.pixels.classes] == every
    counts = dict(zip(values[true], (30, 20, 15, 15), strict=True))
    assert [one.true for one in scores.pixels.classes] == [counts.get(n, 0) for n in every]
    same = predicted == true
    assert scores.pixels.pixel_error == (0 if same else 50 / 80)
    assert [one.dice for one in scores.pixels.classes if one.dice] == [1] * (4 if same else 1)
    shown = run(*paths, "--kind", "classes")
    assert all(f"class {n} " in shown.output for n in every), shown.output


def test_a_prediction_of_the_region_alone_is_laid_on_the_labels(tmp_path: Path) -> None:
    true = noise(6, 20, 30) % 2
    write(tmp_path / "l.zarr", true)
    write(tmp_path / "p.zarr", np.ascontiguousarray(true[2:4, 5:]))
    scores = evaluate(tmp_path / "p.zarr", tmp_path / "l.zarr", region="2:4,5:,:")
    assert scores.pixels is not None
    assert scores.pixels.pixel_error == 0
    assert scores.voxels == 2 * 15 * 30
    with pytest.raises(BadRequest, match="shape 2,15,30 must have the labels' shape, 6,20,30"):
        evaluate(tmp_path / "p.zarr", tmp_path / "l.zarr")


def test_the_public_function_and_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "scratch"))
    labels = write(tmp_path / "l.zarr", blobs(40, 40, seed=1))
    scores = tp.evaluate(labels, labels, kind="membrane", warping=True)
    assert isinstance(scores, tp.Scores)
    assert scores.partition is not None
    assert scores.partition.v_rand.score == scores.partition.v_info.score == 1
    assert scores.warping_error == 0
    assert not any((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["none.zarr", "{labels}"], "none.zarr"),
        (["{labels}", "none.zarr"], "none.zarr"),
        (["{labels}", "{other}"], "shape 30,40 must have the labels' shape, 30,41"),
        (["{labels}", "{labels}", "--region", "3:3,:"], "must hold voxels"),
        (["{labels}", "{labels}", "--region", "3:9"], "each of the 2 axes"),
        (["{labels}", "{labels}", "--region", "0:31,:"], "30,40"),
        (["{labels}", "{labels}", "--region", "a:b,:"], "must be slices"),
        (["{labels}", "{labels}", "--kind", "poems"], "--kind"),
        (["{labels}", "{labels}", "--kind", "classes", "--objects", "1"], "is for masks"),
        (["{labels}", "{labels}", "--instances", "--threshold", "1"], "is for masks"),
        (["{labels}", "{labels}", "--objects", "x"], "whole numbers"),
        (["{labels}", "{labels}", "--components", "plane"], "needs kind instances or membrane"),
        (["{labels}", "{labels}", "--channel", "1"], "channel (=1) must lie in 0:1"),
        (["{grey}", "{labels}"], "give threshold"),
        (["{labels}", "{grey}"], "must be integers"),
        (["{rgb}", "{labels}"], "has 3 channels"),
        (["{ids}", "{ids}", "--kind", "classes"], "at most 256 classes"),
        (["{labels}", "{empty}", "--membrane"], "hold no object"),
        (["{labels}", "{empty}", "--instances"], "hold no object"),
        (["{empty}", "{empty}", "--ignore", "0"], "leaves no voxel"),
        (["{broken}", "{labels}", "--membrane"], "cannot read voxels"),
        (["{labels}"], "LABELS"),
    ],
)
def test_bad_requests_end_with_2_and_a_line(
    arguments: list[str], says: str, tmp_path: Path
) -> None:
    mask = blobs(30, 40, seed=1)
    images = {
        "labels": mask,
        "other": blobs(30, 41, seed=1),
        "grey": mask.astype(np.float32),
        "empty": mask * 0,
        "ids": np.arange(30 * 40, dtype=np.uint16).reshape(30, 40),
    }
    paths = {name: write(tmp_path / f"{name}.zarr", image) for name, image in images.items()}
    paths["rgb"] = write_volume(tmp_path / "rgb.zarr", np.stack((mask,) * 3), "cyx")
    paths["broken"] = write(tmp_path / "broken.zarr", mask)
    (tmp_path / "broken.zarr" / "c" / "0" / "0").write_bytes(b"no chunk")
    found = run(*(argument.format(**paths) for argument in arguments))
    assert found.exit_code == 2, found.output
    assert says in found.output
    assert found.output.startswith("tilepipe: ")
    assert found.output.count("\n") == 1


def test_the_command_shows_a_table_and_speaks_json(tmp_path: Path) -> None:
    labels = write(tmp_path / "l.zarr", blobs(3, 30, 40, seed=1) * 255)
    shown = run(labels, labels, "--membrane", "--warping")
    assert shown.exit_code == 0, shown.output
    assert (
        "V-Rand        1.000000 (split 1.000000, merge 1.000000), mean of 3 planes" in shown.output
    )
    assert "warping error 0.000000" in shown.output
    found = json.loads(run(labels, labels, "--kind", "classes", "--json").output)
    assert found["pixels"]["classes"][1]["label"] == 255
    assert found["thinned"] is None


def test_axes_are_for_files_that_do_not_say_them(tmp_path: Path) -> None:
    import zarr

    image = noise(3, 20, 30) % 3
    labels = write(tmp_path / "l.zarr", image)
    zarr.create_array(tmp_path / "p.zarr", data=np.moveaxis(image, 0, -1)[None])
    with pytest.raises(BadRequest):
        evaluate(tmp_path / "p.zarr", labels)
    zarr.create_array(tmp_path / "q.zarr", data=image[None])
    scores = evaluate(tmp_path / "q.zarr", labels, axes="czyx")
    assert scores.pixels is not None
    assert scores.pixels.pixel_error == 0


@pytest.mark.skipif(not ISBI.exists(), reason="needs ../shared/data/isbi2012")
def test_a_gap_in_one_membrane_costs_a_little(tmp_path: Path) -> None:
    labels = tifffile.imread(ISBI)
    same = evaluate(ISBI, ISBI, kind="membrane", region="20:24,:,:", warping=True)
    assert same.partition is not None
    assert same.thinned is not None
    assert same.partition.v_rand.score == same.thinned.v_rand.score == 1
    assert same.thinned.voi_merge == same.warping_error == 0
    opened = labels[20:24].copy()
    opened[1, 302, 105:112] = 255  # between two of the largest cells
    tifffile.imwrite(tmp_path / "open.tif", opened, photometric="minisblack")
    gap = evaluate(tmp_path / "open.tif", ISBI, kind="membrane", region="20:24,:,:", warping=True)
    assert gap.thinned is not None
    assert 0.95 < gap.thinned.v_rand.score < 0.99
    assert gap.thinned.v_rand.split == pytest.approx(1)
    assert gap.thinned.v_rand.merge < 0.97
    assert 0 < gap.thinned.voi_merge < 0.1
    assert gap.warping_error is not None
    assert 0 < gap.warping_error < 1e-5
    assert gap.objects is not None
    assert gap.objects.predicted == gap.objects.true - 1
