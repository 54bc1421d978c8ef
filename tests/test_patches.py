"""Samples are the whole mirrored image's, seen by the frame that segmenting gives the network."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from scipy import ndimage

from tests.support import assert_close, noise, one_pass, write_unet, write_volume
from tilepipe.errors import BadRequest
from tilepipe.geometry import Region
from tilepipe.models.model import load_model, wrap
from tilepipe.models.spec import find_profile
from tilepipe.models.unet import UNet
from tilepipe.training.dataset import open_dataset
from tilepipe.training.loader import Loader
from tilepipe.training.patches import Patches, frame
from tilepipe.training.preparation import _objects, count_classes, make_patches
from tilepipe.training.ranks import Team
from tilepipe.training.recipe import Recipe
from tilepipe.training.targets import IGNORE, border_weights, class_map

if TYPE_CHECKING:
    from numpy.typing import NDArray

PLAIN = {"elastic": 0.0, "rotate": "none", "flip": False, "scale": 0.0, "grey": 0.0}
NETWORKS = {
    "valid": {"ndim": 2},
    "same": {"ndim": 2, "padding": "same"},
    "3d": {"ndim": 3, "depth": 2},
    "anisotropic": {"ndim": 3, "depth": 3, "kernels": [(1, 3, 3), 3, 3], "pools": [(1, 2, 2), 2]},
}


def cells(*shape: int, seed: int = 0) -> NDArray[np.uint16]:
    """Return numbered cells with gaps between them."""
    random = np.random.default_rng(seed)
    field = ndimage.gaussian_filter(random.random(shape), 3)
    numbered: NDArray[np.uint16] = ndimage.label(field > np.median(field))[0].astype(np.uint16)
    return numbered


def samples(
    folder: Path,
    image: NDArray[np.generic],
    labels: NDArray[np.generic],
    mask: NDArray[np.generic] | None = None,
    **options: object,
) -> tuple[Patches, Path]:
    """Return the samples of a training, and the network that they are framed for."""
    architecture = options.pop("architecture", NETWORKS["valid"])
    chosen = {"target": "foreground", "steps": 1, "normalize": "none", **PLAIN, **options}
    recipe = Recipe(**chosen)  # type: ignore[arg-type]
    axes, masks = "zyx"[-image.ndim :], []
    if mask is not None:
        masks = [str(write_volume(folder / "mask.zarr", mask, axes))]
    chunks = tuple(min(24, n) for n in image.shape)
    places = [
        str(write_volume(folder / f"{name}.zarr", array, axes, chunks))
        for name, array in (("image", image), ("labels", labels))
    ]
    model = write_unet(folder / "unet.pt", normalize="none", **architecture)  # type: ignore[arg-type]
    profile = find_profile(load_model(model))
    dataset = open_dataset([(places[0], places[1])], (), recipe, masks=masks)
    patch = recipe.patch or (20,) * profile.axes
    patches = make_patches(
        dataset,
        count_classes(dataset, recipe, profile.axes),
        recipe,
        frame(profile, patch),
        folder=folder,
    )
    return patches, model


def place_of(patches: Patches, number: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the leading coordinates of a sample and where its answer begins."""
    _, region, voxel = patches.census.draw(number, np.random.default_rng((patches.seed, number)))
    axes = len(patches.frame.answer)
    return voxel[:-axes], patches._start(voxel[-axes:], region, axes)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_network_answers_a_patch_as_segment_answers_it(tmp_path: Path, name: str) -> None:
    shape = (2, 90, 70) if NETWORKS[name]["ndim"] == 2 else (40, 50, 46)
    image = noise(*shape, dtype="float32")
    patches, model = samples(
        tmp_path, image, cells(*shape), architecture=NETWORKS[name], ndim=NETWORKS[name]["ndim"]
    )
    truth = one_pass(model, image[None])
    network = load_model(model).module
    inner = tuple(
        slice(s, s + n) for s, n in zip(patches.frame.skip, patches.frame.answer, strict=True)
    )
    checked = 0
    for number in range(40):
        leading, start = place_of(patches, number)
        if any(s % 4 for s in start):  # off the lattice the answer is another's
            continue
        with torch.inference_mode():
            answer = network(torch.from_numpy(patches[number].image)[None])[0].numpy()
        where = Region(
            start, tuple(a + n for a, n in zip(start, patches.frame.answer, strict=True))
        )
        inside = where.intersect(Region.whole(shape[-len(start) :]))
        here = (slice(None), *inside.within(start))
        index = (slice(None), *leading, *inside.slices)
        assert_close(answer[(slice(None), *inner)][here], truth[index])
        checked += 1
    assert checked or name != "valid"


@pytest.mark.parametrize("target", ["mask", "foreground", "membrane", "border"])
def test_samples_are_crops_of_the_mirrored_whole(tmp_path: Path, target: str) -> None:
    image, labels = noise(3, 60, 80), cells(3, 60, 80)
    patches, _ = samples(
        tmp_path, image, labels, target=target, ndim=2, val_region=("2:3,:,:",),
        weight_map=True, w0=10.0, sigma=3.0, patch=(20, 28),
    )  # fmt: skip
    pad = 200
    for number in range(12):
        (plane,), start = place_of(patches, number)
        sample, read = patches[number], patches.frame.read
        grown = np.pad(image[plane], pad, mode="reflect")
        box = Region(
            *(
                tuple(n + s + pad for n, s in zip(e, start, strict=True))
                for e in (read.start, read.stop)
            )
        )
        assert np.array_equal(sample.image[0], grown[box.slices].astype(np.float32))
        inside = tuple(slice(a, a + n) for a, n in zip(start, patches.frame.answer, strict=True))
        classes = class_map(np.pad(labels[plane], pad, mode="reflect"), target)[pad:-pad, pad:-pad]
        assert np.array_equal(sample.truth, classes[inside])
        objects = ndimage.label(labels[plane])[0] if target == "mask" else labels[plane]
        mirrored = np.pad(objects, 30, mode="reflect")
        at = class_map(np.pad(labels[plane], 30, mode="reflect"), target)
        between = border_weights(
            mirrored, w0=10.0, sigma=3.0, at=at == (1 if target == "membrane" else 0)
        )
        weights = 1 + between[30:-30, 30:-30][inside]
        assert np.array_equal(sample.weights, weights.astype(np.float32))


def test_nothing_held_out_is_ever_learned(tmp_path: Path) -> None:
    labels = np.zeros((60, 90), np.uint8)
    labels[:, :40] = 1
    labels[20:30, 50:70] = 2  # held out
    patches, _ = samples(
        tmp_path, noise(60, 90), labels, target="classes", classes=3, elastic=8.0, rotate="any",
        flip=True, scale=0.3, val_region=("20:30,50:70",), weight_map=True,
    )  # fmt: skip
    seen = [patches[number] for number in range(60)]
    assert {int(c) for s in seen for c in np.unique(s.truth)} == {0, 1, IGNORE}
    assert all(not s.weights[s.truth == IGNORE].any() for s in seen)
    assert all(s.weights[s.truth != IGNORE].min() >= 1 for s in seen)


def test_where_the_mask_is_0_the_labels_say_nothing(tmp_path: Path) -> None:
    labels = np.zeros((60, 90), np.uint8)
    labels[:, 40:] = 1
    mask = np.ones((60, 90), np.uint8)
    mask[:, 45:] = 0
    patches, _ = samples(tmp_path, noise(60, 90), labels, mask, target="mask", elastic=3.0)
    assert patches.census.counts == [(60 - 7) * 40, (60 - 7) * 5]
    for number in range(30):
        sample = patches[number]
        counts = np.bincount(sample.truth.ravel(), minlength=256)
        assert counts[0] > 0
        assert counts[IGNORE] > 0 or counts[1] < 6 * 20
        assert np.array_equal(sample.weights > 0, sample.truth != IGNORE)


def test_samples_do_not_depend_on_who_makes_them(tmp_path: Path) -> None:
    image, labels = noise(70, 64), cells(70, 64)
    wild = {
        "elastic": 4.0,
        "rotate": "any",
        "flip": True,
        "grey": 0.2,
        "noise": 0.2,
        "balance": True,
    }
    patches, _ = samples(tmp_path, image, labels, **wild)
    found = []
    for workers, first in ((1, 0), (3, 0), (2, 2)):
        alone = Team(torch.device("cpu"), 0, 1)
        with closing(Loader(patches, alone, batch=2, workers=workers)) as loader:
            batches = loader.batches(first)
            found.append([next(batches) for _ in range(4 - first)])
    for one, other in zip(found[0], found[1], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for one, other in zip(found[0][2:], found[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    shared = []
    for rank in range(2):
        both = Team(torch.device("cpu"), rank, 2)
        with closing(Loader(patches, both, batch=1, workers=1)) as loader:
            shared.append(loader.batch(1)[0])
    assert torch.equal(torch.cat(shared), found[0][1][0])
    assert not torch.equal(found[0][0][0], found[0][1][0])


@pytest.mark.parametrize("patch", [17, 18, 21])
def test_what_a_network_pads_never_counts(patch: int) -> None:
    torch.manual_seed(0)
    network = UNet(ndim=2, base=2, depth=3, padding="same").eval()
    made = frame(find_profile(wrap(network)), (patch, patch))
    assert all(n >= patch for n in made.answer)
    size, around = made.read.shape[0], 32
    larger = torch.rand(1, 1, size + 2 * around, size + 2 * around)
    at = [slice(s, s + n) for s, n in zip(made.skip, made.answer, strict=True)]
    with torch.inference_mode():
        alone = network(larger[..., around:-around, around:-around])[..., at[0], at[1]]
        within = network(larger)[..., around:-around, around:-around][..., at[0], at[1]]
    assert_close(alone.numpy(), within.numpy())


def test_a_network_without_room_for_an_answer_is_refused() -> None:
    network = UNet(ndim=2, base=2, depth=3, padding="same")
    profile = replace(find_profile(wrap(network)), fixed=True, smallest=(32, 32))
    with pytest.raises(BadRequest, match=r"reads 32 voxels and nothing else.* context, 46"):
        frame(profile, (8, 8))


def test_grey_values_that_are_not_finite_are_0_for_the_network(tmp_path: Path) -> None:
    image = noise(40, 40, dtype="float32") + 100
    image[::3, ::3] = np.nan
    patches, _ = samples(tmp_path, image, cells(40, 40), normalize="scale:0.5,-50")
    sample = patches[0].image
    assert np.isfinite(sample).all()
    assert (sample == 0).mean() > 0.05
    assert abs(sample).max() < 1


def test_what_is_ignored_is_no_object(tmp_path: Path) -> None:
    labels = np.zeros((64, 64), np.int32)
    labels[:, :20], labels[:, 24:44] = -1, 5
    options = {"weight_map": True, "ignore": -1, "val_region": ("none",)}
    patches, _ = samples(tmp_path, noise(64, 64), labels, **options)
    for number in range(5):
        assert set(np.unique(patches[number].weights)) <= {0, 1}


def test_objects_of_a_mask_in_time_are_numbered_in_3d(tmp_path: Path) -> None:
    labels = np.zeros((2, 16, 16, 16), np.uint8)
    labels[:, 4:12, 4:12, 4:6] = labels[:, 4:12, 4:12, 8:10] = 1
    places = [str(tmp_path / "image.zarr"), str(tmp_path / "labels.zarr")]
    for place, array in zip(places, (noise(*labels.shape), labels), strict=True):
        write_volume(Path(place), array, "tzyx")
    recipe = Recipe(target="mask", weight_map=True, steps=1)
    volume = open_dataset([(places[0], places[1])], (), recipe).volumes[0].labels.volume
    objects = _objects(volume, recipe, 3, tmp_path / "objects.zarr").read(
        Region.whole(volume.shape)
    )
    assert len(np.unique(objects)) == 1 + 2 * 2


def test_values_move_with_the_image(tmp_path: Path) -> None:
    image = noise(64, 64, dtype="float32")
    wild = {"elastic": 4.0, "rotate": "any", "flip": True}
    patches, _ = samples(tmp_path, image, image * 2, target="values", **wild)
    for number in range(5):
        sample = patches[number]
        box = tuple(
            slice(b, b + n) for b, n in zip(patches.frame.before, patches.frame.answer, strict=True)
        )
        known = sample.weights > 0
        assert np.array_equal(known, ~np.isnan(sample.truth[0]))
        twice = 2 * sample.image[0][box]
        assert np.allclose(sample.truth[0][known], twice[known], atol=1e-5)


def test_bytes_decoded_are_few_where_chunks_are_kept(tmp_path: Path) -> None:
    image, labels = noise(300, 300), cells(300, 300)
    patches, _ = samples(tmp_path, image, labels, cache=40_000)
    cache = patches.volumes[0].image._cache
    before = cache.bytes_read
    for number in range(64):
        patches[number]
    patch = np.prod(patches.frame.read.shape)
    assert (cache.bytes_read - before) / 64 < 12 * patch


def test_labels_that_are_kept_are_not_decoded_to_draw_from_them(tmp_path: Path) -> None:
    labels = np.zeros((90, 80), np.uint8)
    labels[3:6, 4:6], labels[50:53] = 1, 1  # rare: blocks are searched
    patches, _ = samples(tmp_path, noise(90, 80), labels, target="mask", balance=True)
    for place in (tmp_path / "labels.zarr" / "c").rglob("*"):
        if place.is_file():
            place.unlink()  # which would read as 0
    assert sum((patches[number].truth == 1).any() for number in range(20)) > 5
