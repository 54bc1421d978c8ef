"""Training: it learns, goes on to the same weights, and leaves all that segment needs."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
from contextlib import ExitStack
from dataclasses import fields
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import zarr
from click import Context, Option
from click.testing import CliRunner
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from tests.support import read, write_volume
from tilepipe.cli import main
from tilepipe.errors import BadRequest
from tilepipe.models.model import load_model
from tilepipe.options import Options
from tilepipe.segmentation.segment import segment
from tilepipe.testing.storage import unavailable
from tilepipe.training.dataset import open_dataset
from tilepipe.training.learner import rate
from tilepipe.training.recipe import CHOICES, Recipe
from tilepipe.training.targets import class_map
from tilepipe.training.train import train
from tilepipe.training.validate import score

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tilepipe.training.experiment import Experiment
    from tilepipe.training.meter import TrainReport

SMALL = {
    "target": "mask", "ndim": 2, "base": 4, "depth": 2, "patch": (24, 24), "elastic": 2.0,
    "validate_every": 1000, "threads": 1, "lr": 0.01, "batch": 4,
}  # fmt: skip


def discs(*shape: int, seed: int = 0) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Return bright discs on a dark ground, with noise, and which voxels they are."""
    random = np.random.default_rng(seed)
    labels = np.zeros(shape, np.uint8)
    y, x = np.ogrid[: shape[-2], : shape[-1]]
    for plane in labels.reshape(-1, *shape[-2:]):
        for _ in range(8):
            cy, cx = random.uniform(0, shape[-2]), random.uniform(0, shape[-1])
            plane[(y - cy) ** 2 + (x - cx) ** 2 < random.uniform(4, 9) ** 2] = 1
    image = labels + random.normal(0, 0.7, shape)
    return image.astype(np.float32), labels


@pytest.fixture
def pair(tmp_path: Path) -> tuple[str, str]:
    """Return an image of four planes on disk, and its labels."""
    image, labels = discs(4, 80, 90)
    places = [tmp_path / "image.zarr", tmp_path / "labels.zarr"]
    for place, array in zip(places, (image, labels), strict=True):
        write_volume(place, array, "zyx", (1, 40, 45))
    return str(places[0]), str(places[1])


def weights(path: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(path, weights_only=True)
    return dict(saved["weights"])


def log_of(path: Path) -> list[dict[str, str]]:
    with (path.with_name(f"{path.name}.training") / "log.csv").open() as file:
        return list(csv.DictReader(file))


def test_it_learns_and_segment_needs_nothing_else(tmp_path: Path, pair: tuple[str, str]) -> None:
    told: list[TrainReport] = []
    experiments: list[Experiment] = []
    recipe = Recipe(**SMALL, steps=120, batch_norm=True)  # type: ignore[arg-type]
    last = train(
        [pair], output=tmp_path / "u.pt", recipe=recipe, preview=tmp_path / "p.png",
        tensorboard=True,
        prepared=experiments.append, progress=told.append,
    )  # fmt: skip
    assert last.score is not None
    assert last.score.error < 0.06 < told[0].score.error  # type: ignore[union-attr]
    assert last.step == 120
    assert last.done == 1
    report = segment(pair[0], model=tmp_path / "u.pt", output=tmp_path / "out.zarr")
    assert not report.failures
    truth = discs(4, 80, 90)[1]
    assert (read(tmp_path / "out.zarr") != truth).mean() < 0.08
    model = load_model(tmp_path / "u.pt")
    assert model.labels == ("background", "object")
    assert model.normalize == "zscore"
    assert model.provenance["sources"] == ["image.zarr", "labels.zarr"]  # no paths of one's own
    rows = log_of(tmp_path / "u.pt")
    assert [int(row["step"]) for row in rows] == [0, *range(10, 121, 10), 120]
    measured = [row for row in rows if row["loss"]]
    assert [int(row["step"]) for row in measured] == list(range(10, 121, 10))
    for before, row in pairwise(measured):
        seconds = float(row["seconds"]) - float(before["seconds"])
        assert 0 < 10 * SMALL["batch"] / float(row["patches_per_second"]) <= seconds + 0.01
        assert 0 <= float(row["waited"]) <= 1
    losses = [float(row["loss"]) for row in measured]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) / 2
    assert (tmp_path / "p.png").stat().st_size > 1000
    events = EventAccumulator(str(tmp_path / "u.pt.training" / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(10, 121, 10))
    assert [e.step for e in events.Scalars("error")] == [0, 120]
    assert experiments[0].held_out_voxels == 4 * 10 * 90


@pytest.mark.parametrize(
    "options",
    [
        {"dropout": 0.2, "average": 0.9, "batch_norm": True},
        {
            "optimizer": "sgd",
            "lr": 1e-3,
            "accumulate": 2,
            "loss": "both",
            "weight_map": True,
            "w0": 3.0,
        },
    ],
    ids=["adamw", "sgd"],
)
def test_a_training_that_goes_on_equals_an_unbroken_one(
    tmp_path: Path, pair: tuple[str, str], options: dict[str, object]
) -> None:
    recipe = Recipe(**{**SMALL, "steps": 14, "validate_every": 8, "batch": 2, **options})  # type: ignore[arg-type]
    train([pair], output=tmp_path / "whole.pt", recipe=recipe)

    def interrupt(report: TrainReport) -> None:
        if report.step == 10:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="--resume"):
        train([pair], output=tmp_path / "broken.pt", recipe=recipe, progress=interrupt)
    train([pair], output=tmp_path / "broken.pt", recipe=recipe, resume=True)
    for name in ("whole.pt", "whole.pt.training/last.pt"):
        one, other = weights(tmp_path / name), weights(tmp_path / name.replace("whole", "broken"))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    rows = [log_of(tmp_path / f"{name}.pt") for name in ("whole", "broken")]
    assert [row["step"] for row in rows[0]] == [row["step"] for row in rows[1]]


class Own(nn.Module):
    """A network of one's own: it learns to double values."""

    def __init__(self, channels: int = 4) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, channels, 3, padding=1), nn.ReLU(), nn.Conv2d(channels, 1, 1)
        )

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": self.body(image)}


@pytest.mark.parametrize("loss", ["l1", "l2"])
def test_values_are_learned_by_a_network_of_ones_own(tmp_path: Path, loss: str) -> None:
    image = discs(60, 70)[0]
    places = [tmp_path / "image.zarr", tmp_path / "values.zarr"]
    for place, array in zip(places, (image, 2 * image + 1), strict=True):
        write_volume(place, array, "yx", (32, 32))
    recipe = Recipe(
        target="values", loss=loss, network="tests.test_train:Own", network_args={"channels": 6},
        steps=250, lr=0.02, patch=(20, 20), normalize="none", threads=1, validate_every=1000,
        elastic=0, rotate="quarter", grey=0, scale=0,
    )  # fmt: skip
    last = train([(str(places[0]), str(places[1]))], output=tmp_path / "n.pt", recipe=recipe)
    assert last.score is not None
    assert last.score.error < 0.2
    with pytest.raises(BadRequest, match="--network"):
        load_model(tmp_path / "n.pt")
    options = Options(network="tests.test_train:Own", write="values", threads=1)
    segment(places[0], model=tmp_path / "n.pt", output=tmp_path / "o.zarr", options=options)
    assert np.abs(read(tmp_path / "o.zarr")[0] - (2 * image + 1)).mean() < 0.2


@pytest.mark.parametrize(
    ("options", "volume"),
    [
        ({"attention": True, "residual": True, "padding": "same", "ndim": 3, "depth": 2}, 3),
        ({"pools": [(1, 2, 2)], "kernels": [(1, 3, 3), 3], "ndim": 3, "in_plane": True}, 3),
        ({"classes": 1, "loss": "dice", "class_weights": True, "balance": True}, 2),
    ],
    ids=["gated", "anisotropic", "sigmoid"],
)
def test_options_run(tmp_path: Path, options: dict[str, object], volume: int) -> None:
    image, labels = discs(24, 40, 44)
    places = [tmp_path / "image.zarr", tmp_path / "labels.zarr"]
    for place, array in zip(places, (image, labels), strict=True):
        write_volume(place, array, "zyx", (8, 20, 22))
    patch = (8,) * volume
    recipe = Recipe(**{**SMALL, "patch": patch, "steps": 2, "batch": 1, **options})  # type: ignore[arg-type]
    last = train([(str(places[0]), str(places[1]))], output=tmp_path / "u.pt", recipe=recipe)
    assert last.score is not None
    assert len(last.score.dice) == 2


def test_what_cannot_be_trained_is_refused_in_one_line(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    good = {**SMALL, "steps": 2}
    write_volume(tmp_path / "small.zarr", np.zeros((4, 8, 8), np.uint8), "zyx")
    write_volume(tmp_path / "zero.zarr", np.zeros((4, 80, 90), np.uint8), "zyx")
    write_volume(tmp_path / "times.zarr", discs(4, 80, 90)[1], "tyx")
    cases: list[tuple[dict[str, object], tuple[str, str], str]] = [
        ({"classes": 3}, pair, r"classes \(=3\) must be 2 for target mask or 1"),
        ({"val_region": ("0:4,:,:",)}, pair, "leaves nothing"),
        ({"train_region": ("0:9,:,:",)}, pair, r"train_region \(=0:9,:,:\) must"),
        ({"patch": (8, 8, 8)}, pair, r"patch \(=8,8,8\) must have 2 sizes"),
        ({"names": ("cell",)}, pair, r"names \(=cell\) must be 2"),
        ({"ndim": 4}, pair, r"ndim \(=4\) must be 2"),
        ({"network": "tests.nothing:Own"}, pair, "cannot be built"),
        ({"padding": "same", "kernels": [2, 2]}, pair, "must be odd"),
        ({}, (pair[0], str(tmp_path / "small.zarr")), r"4,8,8 voxels must have the image's"),
        ({}, (pair[0], str(tmp_path / "zero.zarr")), "hold the class 0 alone"),
        ({}, (pair[0], str(tmp_path / "times.zarr")), r"axes tyx must have the image's, zyx"),
        ({}, (pair[0], pair[0]), "must be integers"),
        ({}, (pair[0], str(tmp_path / "none.zarr")), "does not exist"),
    ]
    for options, volumes, said in cases:
        with pytest.raises(BadRequest, match=said) as refusal:
            train([volumes], output=tmp_path / "u.pt", recipe=Recipe(**{**good, **options}))  # type: ignore[arg-type]
        assert "\n" not in str(refusal.value)
        assert not (tmp_path / "u.pt").exists()
        assert not (tmp_path / "u.pt.training").exists(), options


def test_what_is_held_out_is_seen_as_in_the_whole_image(tmp_path: Path) -> None:
    image, labels = discs(4, 80, 90)
    image[3] = 5 + 3 * image[3]  # alone it would be normalized otherwise
    places = [tmp_path / "image.zarr", tmp_path / "labels.zarr"]
    for place, array in zip(places, (image, labels), strict=True):
        write_volume(place, array, "zyx", (1, 40, 45))
    recipe = Recipe(**{**SMALL, "steps": 1, "val_region": ("3:4,:,:",)})  # type: ignore[arg-type]
    train([(str(places[0]), str(places[1]))], output=tmp_path / "u.pt", recipe=recipe)
    segment(places[0], model=tmp_path / "u.pt.training/last.pt", output=tmp_path / "o.zarr")
    held_out = read(tmp_path / "u.pt.training" / "held-out-0-segmented.zarr")
    assert np.array_equal(held_out[0], read(tmp_path / "o.zarr")[3])


def test_of_a_large_volume_no_more_is_held_out_than_is_soon_segmented(tmp_path: Path) -> None:
    places = [str(tmp_path / "image.zarr"), str(tmp_path / "labels.zarr")]
    for place in places:
        zarr.create_array(
            place, shape=(4096, 8000, 9000), chunks=(64, 64, 64), dtype="u1", dimension_names="zyx"
        )
    found = open_dataset([(places[0], places[1])], (), Recipe(steps=1))
    (region,) = found.volumes[0].held_out
    assert 2**23 < region.size <= 2**25
    assert region.stop == (4096, 8000, 9000)
    assert sum(part.size for part in found.volumes[0].regions) == 4096 * 8000 * 9000 - region.size


def test_what_goes_on_is_the_same_training(tmp_path: Path, pair: tuple[str, str]) -> None:
    recipe = Recipe(**{**SMALL, "steps": 1})  # type: ignore[arg-type]
    train([pair], output=tmp_path / "u.pt", recipe=recipe)
    other = write_volume(tmp_path / "other.zarr", discs(4, 80, 90)[1], "zyx")
    for volumes in ([(pair[0], str(other))], [pair, pair]):
        with pytest.raises(BadRequest, match=r"volumes \(=.*as this training began"):
            train(volumes, output=tmp_path / "u.pt", recipe=recipe, resume=True)
    state = tmp_path / "u.pt.training" / "state.pt"
    for damage in (b"", b"junk", (tmp_path / "u.pt").read_bytes(), state.read_bytes()[:999]):
        state.write_bytes(damage)
        with pytest.raises(BadRequest, match=r"^resume: .*state\.pt (cannot be read|is no state)"):
            train([pair], output=tmp_path / "u.pt", recipe=recipe, resume=True)


def test_storage_that_fails_is_told_in_a_line(tmp_path: Path, pair: tuple[str, str]) -> None:
    recipe = Recipe(**{**SMALL, "steps": 2, "normalize": "none"})  # type: ignore[arg-type]

    with ExitStack() as stack:

        def fail(experiment: Experiment) -> None:
            for plane in range(4):
                stack.enter_context(unavailable(Path(pair[0]) / f"c/{plane}/0/0"))

        with pytest.raises(BadRequest, match=r"cannot go on: .* \(chunk c/./0/0\)") as refusal:
            train([pair], output=tmp_path / "u.pt", recipe=recipe, prepared=fail)
    assert "\n" not in str(refusal.value)


def test_classes_that_are_held_out_alone_are_refused(tmp_path: Path) -> None:
    image, labels = discs(4, 80, 90)
    labels[3, :9] = 2
    places = [tmp_path / "image.zarr", tmp_path / "labels.zarr"]
    for place, array in zip(places, (image, labels), strict=True):
        write_volume(place, array, "zyx", (1, 40, 45))
    options = {**SMALL, "steps": 1, "target": "classes", "val_region": ("3:4,:,:",)}
    with pytest.raises(BadRequest, match=r"hold the class 2 .* held out.*--classes 3"):
        train(
            [(str(places[0]), str(places[1]))], output=tmp_path / "u.pt",
            recipe=Recipe(**options),  # type: ignore[arg-type]
        )  # fmt: skip


class Soft(Own):
    """A network that ends in what the loss does."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": super().forward(image)["values"].sigmoid()}


class Two(Own):
    """A network of two outputs."""

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        answer = super().forward(image)["values"]
        return {"one": answer, "other": answer}


@pytest.mark.parametrize(
    ("network", "said"),
    [("Soft", r"ends in sigmoid, which the loss does itself"), ("Two", "has 2 outputs; one can")],
)
def test_networks_that_cannot_be_trained(
    tmp_path: Path, pair: tuple[str, str], network: str, said: str
) -> None:
    options = {**SMALL, "steps": 1, "classes": 1, "network": f"tests.test_train:{network}"}
    with pytest.raises(BadRequest, match=said):
        train([pair], output=tmp_path / "u.pt", recipe=Recipe(**options))  # type: ignore[arg-type]


@pytest.mark.long
def test_trainings_do_not_take_each_others_place(tmp_path: Path, pair: tuple[str, str]) -> None:
    good = {**SMALL, "steps": 1}
    recipe = Recipe(**good)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"state\.pt does not exist"):
        train([pair], output=tmp_path / "u.pt", recipe=recipe, resume=True)
    train([pair], output=tmp_path / "u.pt", recipe=recipe)
    with pytest.raises(BadRequest, match="--resume, or replace"):
        train([pair], output=tmp_path / "u.pt", recipe=recipe)
    other = Recipe(**{**good, "lr": 0.5})  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"lr \(=0.5\) must be 0.01, as this training began"):
        train([pair], output=tmp_path / "u.pt", recipe=other, resume=True)
    (tmp_path / "v.pt.training").mkdir()
    (tmp_path / "v.pt.training" / "thesis.txt").write_text("mine")
    (tmp_path / "v.pt.training" / "log.csv").write_text("of a training that was killed early")
    for overwrite in (False, True):
        train([pair], output=tmp_path / "v.pt", recipe=recipe, overwrite=overwrite)
        assert (tmp_path / "v.pt.training" / "thesis.txt").read_text() == "mine"
        assert log_of(tmp_path / "v.pt")[-1]["step"] == "1"
    train([pair], output=tmp_path / "u.pt", recipe=other, overwrite=True)
    with pytest.raises(BadRequest, match="must be a file and"):
        train([pair], output=tmp_path / "w.pt", recipe=recipe, folder=tmp_path / "u.pt")


OTHERS = {
    "log.csv": "of a training that another program logs",
    "tensorboard/notes.txt": "of years",
    "objects-0.zarr/thesis.txt": "of years",
    "state.pt": "",
}


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("name", OTHERS)
def test_a_training_removes_nothing_of_others(
    tmp_path: Path, pair: tuple[str, str], name: str, named: bool
) -> None:
    folder = tmp_path / ("runs" if named else "u.pt.training")
    place = folder / name
    place.parent.mkdir(parents=True)
    place.write_text(OTHERS[name])
    if name == "state.pt":
        place.rename(tmp_path / "other")
        place.symlink_to(tmp_path / "other")
    elif name == "log.csv" and not named:
        return  # which is a training that was killed early
    recipe = Recipe(**{**SMALL, "steps": 1})  # type: ignore[arg-type]
    for overwrite in (False, True):
        with pytest.raises(BadRequest, match=r"no training of tilepipe|never removes|is there"):
            train(
                [pair], output=tmp_path / "u.pt", recipe=recipe, overwrite=overwrite,
                folder=folder if named else None,
            )  # fmt: skip
        assert place.read_text() == OTHERS[name]


def test_a_training_that_is_refused_has_removed_nothing(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    folder = tmp_path / "u.pt.training"
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"of a week")
    recipe = Recipe(**{**SMALL, "steps": 1})  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match="does not exist"):
        train(
            [(pair[0], str(tmp_path / "typo.zarr"))], output=tmp_path / "u.pt", recipe=recipe,
            overwrite=True,
        )  # fmt: skip
    assert (folder / "state.pt").read_bytes() == b"of a week"


def test_a_loss_that_is_not_finite_ends_in_one_line(tmp_path: Path, pair: tuple[str, str]) -> None:
    wild = {**SMALL, "steps": 40, "optimizer": "sgd", "lr": 1e18, "clip": 0.0, "warmup": 0.0}
    with pytest.raises(BadRequest, match=r"the loss became .* at step .* smaller --lr than 1e\+18"):
        train([pair], output=tmp_path / "u.pt", recipe=Recipe(**wild))  # type: ignore[arg-type]
    assert all(torch.isfinite(w).all() for w in weights(tmp_path / "u.pt").values())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "a training needs one"),
        ({"steps": 0}, r"steps \(=0\) must be a whole number of at least 1"),
        ({"steps": 1, "target": "cells"}, r"target \(=cells\) must be one of"),
        ({"steps": 1, "dropout": 1.0}, r"dropout \(=1.0\) must be a number at least 0 and below 1"),
        ({"steps": 1, "lr": 0.0}, r"lr \(=0.0\) must be a number above 0"),
        ({"steps": 1, "lr": float("inf")}, r"lr \(=inf\) must be a number above 0"),
        ({"steps": 1, "sigma": float("inf")}, r"sigma \(=inf\) must be"),
        ({"steps": 1, "seed": -1}, r"seed \(=-1\) must be a whole number in 0:4294967296"),
        ({"steps": 1, "loss": "l1"}, "does not fit target"),
        ({"steps": 1, "target": "values", "balance": True}, "no classes"),
    ],
)
def test_recipes_that_make_no_sense_are_refused(options: dict[str, object], said: str) -> None:
    with pytest.raises(BadRequest, match=said):
        Recipe(**options)  # type: ignore[arg-type]


def test_the_learning_rate_rises_and_falls() -> None:
    recipe = Recipe(steps=100, lr=0.1, warmup=0.1)
    rates = [rate(recipe, done / 100) for done in range(101)]
    assert max(rates) == rates[10] == 0.1
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert abs(rates[-1]) < 1e-12


def test_every_target_but_values_has_classes() -> None:
    labels = np.array([[0, 1], [2, 2]])
    for target in CHOICES["target"]:
        if target == "values":
            with pytest.raises(ValueError, match="has no classes"):
                class_map(labels, target)
        else:
            assert class_map(labels, target).dtype == np.uint8


def test_scores_of_a_table() -> None:
    found = score(np.array([[50, 10], [0, 40]]))
    assert found.error == pytest.approx(0.1)
    assert found.dice == pytest.approx((100 / 110, 80 / 90))
    assert found.iou == pytest.approx((50 / 60, 40 / 50))


def test_the_command_takes_its_options_from_a_file_too(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    config = tmp_path / "small.toml"
    config.write_text(
        'target = "mask"\nndim = 2\nbase = 4\ndepth = 2\npatch = [24, 24]\nsteps = 3\nthreads = 1\n'
        'val-region = ["3:4,:,:"]\nkernels = [[3, 3], 3]\nlr = 0.5\n'
    )
    arguments = ["train", *pair, "-o", str(tmp_path / "u.pt"), "--config", str(config)]
    done = CliRunner().invoke(main, [*arguments, "--lr", "0.001", "--steps", "2"])
    assert done.exit_code == 0, done.output
    assert "2 steps, adamw, learning rate 0.001" in done.stdout
    assert "held out: Dice" in done.stderr
    recipe = load_model(tmp_path / "u.pt").provenance["recipe"]
    assert recipe["kernels"] == [[3, 3], 3]  # type: ignore[index]
    assert recipe["val_region"] == ["3:4,:,:"]  # type: ignore[index]


@pytest.mark.parametrize("name", ["train", "evaluate"])
def test_every_option_is_explained_in_a_sentence(name: str) -> None:
    command = main.get_command(Context(main), name)
    assert command is not None
    options = [p for p in command.params if isinstance(p, Option) and p.opts and p.expose_value]
    assert len(options) > 12
    for option in options:
        sentence = (option.help or "").partition(" [")[0]
        assert len(sentence.split()) > 2, option.opts
        assert sentence[0].isupper(), option.opts
        assert sentence.endswith("."), option.opts


def test_options_of_the_recipe_stand_in_groups_and_all_of_them_do() -> None:
    text = CliRunner().invoke(main, ["train", "--help"]).output
    first = text.index("What is learned from:")
    for field in fields(Recipe):
        assert text.index(f"--{field.name.replace('_', '-')}") > first


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["a.tif", "-o", "u.pt", "--steps", "1"], "must be pairs"),
        (["a.tif", "b.tif", "-o", "u.pt"], "a training needs one"),
        (["a.tif", "b.tif", "-o", "u.tif", "--steps", "1"], "ends in .pt"),
        (["a.tif", "b.tif", "-o", "u.pt", "--steps", "1"], "a.tif) does not exist"),
        (["a.tif", "b.tif", "-o", "no/u.pt", "--steps", "1"], "folder that exists"),
        (["a.tif", "b.tif", "-o", "u.pt", "--config", "no.toml"], "config (=no.toml) cannot be"),
        (["a.tif", "b.tif", "-o", "u.pt", "--kernels", "x"], "must be sizes by level"),
        (["a.tif", "b.tif", "-o", "u.pt", "--steps", "1", "--resume"], "state.pt does not exist"),
    ],
)
def test_the_command_refuses_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(main, ["train", *arguments])
    assert done.exit_code == 2
    assert said in done.stderr
    assert done.stderr.startswith("tilepipe: ")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_several_volumes_and_one_held_out_whole(tmp_path: Path, pair: tuple[str, str]) -> None:
    pairs, experiments = [pair], []
    for number, shape in enumerate([(2, 60, 50), (1, 64, 64)]):
        places = [tmp_path / f"{name}-{number}.zarr" for name in ("image", "labels")]
        for place, array in zip(places, discs(*shape, seed=number + 1), strict=True):
            write_volume(place, array, "zyx", (1, 30, 25))
        pairs.append((str(places[0]), str(places[1])))
    recipe = Recipe(**SMALL, steps=1)  # type: ignore[arg-type]
    last = train(
        pairs[:2], output=tmp_path / "u.pt", recipe=recipe, apart=pairs[2:],
        prepared=experiments.append,
    )  # fmt: skip
    assert last.score is not None
    assert experiments[0].held_out_voxels == 64 * 64
    assert sum(experiments[0].counts) == 4 * 80 * 90 + 2 * 60 * 50
    census = experiments[0].patches.census
    drawn = [census.draw(n, np.random.default_rng((0, n)))[0] for n in range(600)]
    assert set(drawn) == {0, 1}
    share = 2 * 60 * 50 / sum(experiments[0].counts)
    assert abs(drawn.count(1) / 600 - share) < 0.08  # 5 standard deviations


def test_regions_that_overlap_count_once(pair: tuple[str, str]) -> None:
    regions = ("0:2,:,:", "1:3,10:60,:", "0:3,20:30,5:9")
    recipe = Recipe(**{**SMALL, "train_region": regions, "val_region": ("2:4,50:,:",)}, steps=1)  # type: ignore[arg-type]
    learned = open_dataset([pair], (), recipe).volumes[0].regions
    counts = np.zeros((4, 80, 90), int)
    for region in learned:
        counts[region.slices] += 1
    wanted = np.zeros((4, 80, 90), int)
    wanted[0:2] = wanted[1:3, 10:60] = wanted[0:3, 20:30, 5:9] = 1
    wanted[2:4, 50:] = 0
    assert np.array_equal(counts, wanted)


def test_patience_ends_a_training_and_goes_on_nowhere(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    hopeless = {**SMALL, "lr": 1e-12, "steps": 50, "validate_every": 2, "patience": 2}
    recipe = Recipe(**hopeless)  # type: ignore[arg-type]
    assert train([pair], output=tmp_path / "u.pt", recipe=recipe).step == 4
    with (tmp_path / "u.pt.training" / "log.csv").open("a") as file:
        file.write("5,7")  # as a full disk leaves it
    assert train([pair], output=tmp_path / "u.pt", recipe=recipe, resume=True).step == 4
    assert [row["step"] for row in log_of(tmp_path / "u.pt")][:3] == ["0", "2", "2"]


@pytest.mark.long
def test_two_processes_train_together(tmp_path: Path, pair: tuple[str, str]) -> None:
    arguments = [
        *pair, "--target", "mask", "--ndim", "2", "--base", "4", "--depth", "2", "--patch", "24,24",
        "--steps", "6", "--batch", "1", "--threads", "1", "--device", "cpu",
        "--validate-every", "100",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    together = [*command, "-m", "tilepipe.cli", "train", *arguments, "-o", str(tmp_path / "a.pt")]
    subprocess.run(together, check=True, env=environment, capture_output=True, timeout=300)
    alone = ["train", *arguments, "--batch", "2", "-o", str(tmp_path / "b.pt")]
    subprocess.run(
        [sys.executable, "-m", "tilepipe.cli", *alone],
        check=True, env=environment, capture_output=True, timeout=300,
    )  # fmt: skip
    one, other = (weights(tmp_path / f"{name}.pt.training/last.pt") for name in "ab")
    for key in one:  # the same patches; gradients are added up in another order
        assert torch.allclose(one[key], other[key], atol=2e-4), key


def test_two_trainings_do_not_share_a_folder(tmp_path: Path, pair: tuple[str, str]) -> None:
    """The second would write its state over the first one's, and each would resume the other's."""
    recipe = Recipe(**SMALL, steps=2)  # type: ignore[arg-type]
    second: list[str] = []

    def begin_another(report: TrainReport) -> None:
        for overwrite in (False, True):
            with pytest.raises(BadRequest) as caught:
                train(
                    [pair],
                    output=tmp_path / "other.pt",
                    recipe=recipe,
                    folder=tmp_path / "log",
                    overwrite=overwrite,
                )
            second.append(str(caught.value))

    train(
        [pair], output=tmp_path / "u.pt", recipe=recipe, folder=tmp_path / "log",
        progress=begin_another,
    )  # fmt: skip
    assert "is being written by another training (host" in second[-1]
    assert not (tmp_path / "other.pt").exists()
    assert not (tmp_path / "log" / "lock").exists()
    train([pair], output=tmp_path / "u.pt", recipe=recipe, folder=tmp_path / "log", overwrite=True)


def test_a_training_that_was_killed_before_its_first_state_begins_anew(
    tmp_path: Path, pair: tuple[str, str]
) -> None:
    """A job that always says ``--resume`` may be killed at any moment."""
    (tmp_path / "u.pt.training").mkdir()
    recipe = Recipe(**SMALL, steps=2)  # type: ignore[arg-type]
    with pytest.raises(BadRequest, match=r"state\.pt does not exist"):
        train([pair], output=tmp_path / "u.pt", recipe=recipe, resume=True)
    (tmp_path / "u.pt.training" / ".tilepipe-training").touch()
    assert train([pair], output=tmp_path / "u.pt", recipe=recipe, resume=True).step == 2
