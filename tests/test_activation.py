"""What is applied to a network's output, by whom, and what is refused before any tile."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import zarr
from click.testing import CliRunner
from torch import Tensor, nn

import tilepipe as tp
from tests.support import noise, one_pass, read, write_unet, write_volume
from tilepipe.cli import main
from tilepipe.commands.inspect import describe_file
from tilepipe.errors import BadRequest
from tilepipe.models.unet import UNet
from tilepipe.options import Options

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.segmentation.report import Report


class Channels(nn.Module):
    """Two levels, and what its name says at the end."""

    def __init__(self, ending: str, channels: int = 3) -> None:
        super().__init__()
        self.ending = ending
        self.first, self.deep = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(8, channels, 1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        a = torch.relu(self.first(x))
        b = torch.relu(self.deep(F.max_pool2d(a, 2)))
        align = True if self.ending == "aligned" else None
        up = F.interpolate(b, scale_factor=2.0, mode="bilinear", align_corners=align)
        y = 4 * self.last(torch.cat([a, up], 1))
        if self.ending == "softsign":  # no rule says that this lies in 0 to 1
            return (y / (1 + y.abs()) + 1) / 2
        if self.ending == "two":
            return y, torch.sigmoid(y).clone()
        endings = {
            "logits": lambda: y,
            "sigmoid": lambda: torch.sigmoid(y) * 1.0,
            "aligned": lambda: torch.sigmoid(y).clone(),
            "bytes": lambda: torch.sigmoid(y) * 255,
            "logsigmoid": lambda: F.logsigmoid(y),
            "log softmax": lambda: F.log_softmax(y, dim=1),
            "numbers": lambda: y.argmax(dim=1, keepdim=True).float(),
        }
        return endings[self.ending]()


def write_network(path: Path, network: nn.Module, size: int | None = None) -> Path:
    """Write a program; of one ``size``, else of any."""
    torch.manual_seed(1)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight)
            nn.init.normal_(layer.bias, std=0.5)  # type: ignore[arg-type]
    edge = size or 64
    free = None if size else ({2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO},)
    example = (torch.rand(1, 1, edge, edge),)
    torch.export.save(torch.export.export(network.eval(), example, dynamic_shapes=free), path)
    return path


def write_image(folder: Path, *shape: int) -> Path:
    axes = "zyx"[-len(shape) :]
    return write_volume(folder / "image.zarr", noise(*shape, dtype="float32"), axes)


PLAIN = Options(normalize="none", threads=1, tile=(16, 32))


@pytest.mark.parametrize(
    ("ending", "how"),
    [("sigmoid", "sweep"), ("sigmoid", "direct"), ("sigmoid", "fixed"), ("aligned", "direct")],
)
def test_classes_that_overlap_are_a_mask_each(tmp_path: Path, ending: str, how: str) -> None:
    network = Channels(ending)
    model = write_network(tmp_path / "free.pt2", network)
    source = write_image(tmp_path, 45, 38)
    truth = one_pass(model, np.asarray(zarr.open_array(source, mode="r")[:])[None])
    options = replace(PLAIN, strategy="auto" if how == "fixed" else how, threshold=0.7)
    if how == "fixed":
        model = write_network(tmp_path / "fixed.pt2", network, size=48)
    shown = tp.plan(source, model=model, output=tmp_path / "out.zarr", options=options)
    assert (shown.answer.dtype, shown.answer.channels, shown.answer.stacked) == ("uint8", 3, True)
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    found = read(tmp_path / "out.zarr")
    assert found.shape == (3, 45, 38)
    assert found.dtype == np.uint8
    clear = np.abs(truth - 0.7) > 1e-4
    np.testing.assert_array_equal(found[clear], (truth > 0.7)[clear])
    assert (found.sum(axis=0) > 1).mean() > 0.01  # they do overlap
    known = zarr.open_group(tmp_path / "out.zarr", mode="r").attrs["tilepipe"]["plan"]  # type: ignore[index, call-overload]
    assert known["activation"] == {"name": "sigmoid", "by": "network", "apart": True}  # type: ignore[index, call-overload]


def test_masks_of_a_volume_slice_by_slice_are_evaluated_and_gone_on_with(tmp_path: Path) -> None:
    model = write_network(tmp_path / "model.pt2", Channels("sigmoid"))
    source = write_image(tmp_path, 3, 33, 34)
    options = Options(normalize="none", precision="bfloat16", tile=(1, 16, 34), threads=1)
    output = tmp_path / "out.zarr"
    report = tp.segment(source, model=model, output=output, options=options)
    found = read(output)
    assert (found.shape, report.done) == ((3, 3, 33, 34), 9)
    truth = write_volume(tmp_path / "truth.zarr", found[1], "zyx")
    scores = tp.evaluate(output, truth, channel=1)
    assert (scores.kind, scores.pixels and scores.pixels.pixel_error) == ("mask", 0.0)
    with pytest.raises(BadRequest, match="has 3 channels; say which one with channel"):
        tp.evaluate(output, truth)
    values, text = describe_file(output)
    assert values["channels"] == 3
    assert "3 channels" in text
    again = tp.segment(source, model=model, output=output, options=options)
    assert (again.before, again.done) == (9, 0)
    other = replace(options, activation="softmax")
    with pytest.raises(
        BadRequest, match=r"begun with another plan \(activation sigmoid, not softmax\)"
    ):
        tp.segment(source, model=model, output=output, options=other)


@pytest.mark.parametrize(
    ("channels", "ending", "options", "shown"),
    [
        (1, "logits", {}, "sigmoid: by tilepipe"),
        (1, "sigmoid", {}, "sigmoid: by the network"),
        (3, "logits", {}, "softmax: by tilepipe"),
        (3, "log softmax", {"write": "probabilities"}, "softmax: by tilepipe"),
        (3, "logits", {"activation": "sigmoid", "threshold": 0.3},
         "sigmoid: by tilepipe; a mask for each of 3 channels, above 0.3"),
        (3, "sigmoid", {}, "sigmoid: by the network; a mask for each of 3 channels, above 0.5"),
        (3, "sigmoid", {"activation": "softmax"}, "softmax: by tilepipe"),
        (3, "logits", {"write": "logits"}, "none: logits are written"),
        (3, "two", {"head": 1, "write": "probabilities"}, "sigmoid: by the network"),
        (3, "softsign", {"activation": "none"},
         "none: the network's values are taken for probabilities; a mask for each of 3"),
    ],
)  # fmt: skip
def test_the_plan_says_what_is_applied_and_by_whom(
    tmp_path: Path, channels: int, ending: str, options: dict[str, object], shown: str
) -> None:
    model = write_network(tmp_path / "model.pt2", Channels(ending, channels))
    source = write_image(tmp_path, 45, 38)
    words = ["plan", str(source), "--model", str(model)]
    for name, value in options.items():
        words += [f"--{name}", str(value)]
    text = CliRunner().invoke(main, words).output
    row = next(line for line in text.splitlines() if line.startswith("activation"))
    assert row.removeprefix("activation").strip().startswith(shown)
    if ending != "softsign":  # once is enough of what takes longer
        return
    found = json.loads(CliRunner().invoke(main, [*words, "--json"]).output)
    assert found["activation"] == {"name": "", "by": "", "apart": True}


@pytest.mark.parametrize(
    ("write", "channels"),
    [
        ("labels", 1),
        ("probabilities", 3),
        pytest.param("labels", 3, marks=pytest.mark.long),
        pytest.param("probabilities", 1, marks=pytest.mark.long),
    ],
)
def test_logits_that_all_lie_in_0_to_1_are_refused(
    tmp_path: Path, write: str, channels: int
) -> None:
    model = write_network(tmp_path / "model.pt2", Channels("softsign", channels))
    source = write_image(tmp_path, 45, 38)
    truth = one_pass(model, np.asarray(zarr.open_array(source, mode="r")[:])[None])
    assert truth.min() > 0
    assert truth.max() < 1
    options = replace(PLAIN, write=write)
    output = tmp_path / "out.zarr"
    with pytest.raises(BadRequest, match=r"all lie in 0 to 1.*--activation none"):
        tp.segment(source, model=model, output=output, options=options)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".zarr"] == ["image.zarr"]
    tp.plan(source, model=model, options=replace(options, activation="sigmoid"))
    tp.segment(source, model=model, output=output, options=replace(options, activation="none"))
    found = read(output)
    if write == "labels":
        clear, wanted = np.abs(truth - 0.5) > 1e-4, truth > 0.5
        found = found if channels > 1 else found[None]
        np.testing.assert_array_equal(found[clear], wanted[clear])
    else:
        np.testing.assert_allclose(found, truth, atol=1e-4)


def test_the_refusal_is_a_line_and_exit_code_2(tmp_path: Path) -> None:
    model = write_network(tmp_path / "model.pt2", Channels("softsign", 1))
    source = write_image(tmp_path, 45, 38)
    for command in ("plan", "segment"):
        result = CliRunner().invoke(main, [command, str(source), "--model", str(model)])
        assert result.exit_code == 2
        assert "--activation none (probabilities) or --activation sigmoid" in result.output
    assert not (tmp_path / "image-segmented.zarr").exists()


def test_values_that_fill_0_to_1_on_the_volume_are_refused(tmp_path: Path) -> None:
    """A network that was trained to give masks without an activation; noise would leave 0 to 1."""
    network = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(1.0), network.bias.zero_()  # type: ignore[union-attr]
    torch.save(network.state_dict(), tmp_path / "model.pt")
    arguments = {"in_channels": 1, "out_channels": 1, "kernel_size": 1}
    options = replace(PLAIN, network="torch.nn:Conv2d", network_args=arguments)
    source = write_image(tmp_path, 45, 38)
    with pytest.raises(BadRequest, match="all lie in 0 to 1"):
        tp.plan(source, model=tmp_path / "model.pt", options=options)
    wide = replace(options, normalize="scale:8,-4")  # the same weights give logits then
    tp.plan(source, model=tmp_path / "model.pt", options=wide)


@pytest.mark.parametrize("kind", ["noise", "zeros", pytest.param("a spot", marks=pytest.mark.long)])
def test_networks_of_small_weights_are_not_refused_by_chance(tmp_path: Path, kind: str) -> None:
    """Their logits often lie in 0 to 1 on a volume, and more so on an empty one."""
    image = noise(80, 80, dtype="float32") if kind == "noise" else np.zeros((80, 80), np.float32)
    if kind == "a spot":
        image[40, 40] = 1
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    inside = 0
    for seed in range(3):
        torch.manual_seed(seed)
        network = UNet(ndim=2, base=2, depth=2, classes=1)
        torch.save(network.state_dict(), tmp_path / "model.pt")
        arguments = {"ndim": 2, "base": 2, "depth": 2, "classes": 1}
        options = replace(PLAIN, network="tilepipe.models.unet:UNet", network_args=arguments)
        tp.plan(source, model=tmp_path / "model.pt", options=options)
        with torch.no_grad():
            found = network.eval()(torch.from_numpy(image[None, None]))
        inside += bool(found.min() >= 0 and found.max() <= 1)
    assert inside  # of some it could have been thought


@pytest.mark.parametrize("normalize", ["percentile:1,99", "zscore"])
def test_a_normalisation_of_the_whole_is_not_computed_for_the_trial(
    tmp_path: Path, normalize: str
) -> None:
    model = write_network(tmp_path / "model.pt2", Channels("softsign", 1))
    source = write_image(tmp_path, 45, 38)
    with pytest.raises(BadRequest, match="all lie in 0 to 1"):
        tp.plan(source, model=model, options=replace(PLAIN, normalize=normalize))
    model = write_network(tmp_path / "model.pt2", Channels("logits", 1))
    tp.plan(source, model=model, options=replace(PLAIN, normalize=normalize))


@pytest.mark.parametrize(
    ("ending", "channels", "options", "match"),
    [
        ("bytes", 1, {}, "gives values of 0 to 255, which are neither logits nor probabilities"),
        ("numbers", 3, {}, "gives values of 0 to 2, which are neither"),
        ("logsigmoid", 1, {}, "gives logarithms of probabilities, which are neither"),
        ("logits", 1, {"activation": "softmax"}, r"activation \(=softmax\) needs several channels"),
        ("sigmoid", 1, {"write": "logits"}, r"write \(=logits\) needs a network that ends before"),
        ("logits", 3, {"threshold": 0.4}, r"threshold \(=0.4\) is for networks of one output"),
    ],
)
def test_what_contradicts_itself_is_refused(
    tmp_path: Path, ending: str, channels: int, options: dict[str, object], match: str
) -> None:
    model = write_network(tmp_path / "model.pt2", Channels(ending, channels))
    source = write_image(tmp_path, 45, 38)
    with pytest.raises(BadRequest, match=match):
        tp.plan(source, model=model, options=replace(PLAIN, **options))  # type: ignore[arg-type]


@pytest.mark.parametrize("write", ["logits", "values"])
def test_an_activation_is_for_labels_and_probabilities(write: str) -> None:
    with pytest.raises(BadRequest, match=r"activation \(=sigmoid\) is for labels and prob"):
        Options(write=write, activation="sigmoid")


def test_a_checkpoint_says_itself_what_it_gives(tmp_path: Path) -> None:
    """Trained here it gives logits, whatever they are on this volume."""
    torch.manual_seed(0)
    model = write_unet(tmp_path / "unet.pt", classes=1, normalize="none")
    content = torch.load(model, weights_only=True)
    for name, weight in content["weights"].items():
        weight.zero_()
        if name.endswith("bias"):
            weight += 0.25
    torch.save(content, model)
    source = write_image(tmp_path, 45, 38)
    shown = tp.plan(source, model=model)
    assert str(shown.activation) == "sigmoid: by tilepipe"


class Hidden(nn.Module):
    """Three probabilities that overlap, in a form that no graph says."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values = self.first(image)
        return torch.where(values > 0, values, -values).remainder(1.0)


def test_masks_that_were_told_by_a_trial_are_gone_on_with(tmp_path: Path) -> None:
    """What the trial has found is of the run, and not tried again by the one that goes on."""
    model = write_network(tmp_path / "model.pt2", Hidden())
    source, output = write_image(tmp_path, 45, 38), tmp_path / "out.zarr"
    options = replace(PLAIN, activation="none")

    def stop(report: Report) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tp.segment(source, model=model, output=output, options=options, progress=stop)
    report = tp.segment(source, model=model, output=output, options=options)
    assert (report.before, report.unfinished) == (1, 0)
    assert str(report.plan.activation) == "none"
    assert report.plan.activation.apart
    image = np.asarray(zarr.open_array(source, mode="r")[:])
    truth = one_pass(model, image[None])
    clear = np.abs(truth - 0.5) < 0.49
    np.testing.assert_array_equal(read(output)[clear], (truth > 0.5)[clear])
