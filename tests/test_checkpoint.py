"""Checkpoints: what is saved is loaded again, and no code is run that a file names."""

from __future__ import annotations

import copy
import re
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import nn

import tilepipe as tp
from tests.support import assert_close, noise, one_pass, read, write_volume
from tests.test_unet import SHIPPED
from tilepipe.commands.inspect import describe_file
from tilepipe.errors import BadRequest
from tilepipe.models.checkpoint import read_checkpoint, save_checkpoint
from tilepipe.models.model import load_model
from tilepipe.models.unet import UNet
from tilepipe.options import Options

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

CONTEXT = {"before": [2, 2], "after": [2, 2], "step": [1, 1]}
SAID = {"normalize": "zscore", "labels": ["denoised"], "provenance": {"seed": 1}}
CODE = """
from pathlib import Path
from torch import nn
(Path(__file__).parent / "imported").touch()
def make(width=3, classes=1):
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, classes, 3))
"""


class Own(nn.Module):
    """A network of one's own."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, width, 3), nn.ReLU(), nn.Conv2d(width, 1, 3), nn.Hardtanh()
        )

    def forward(self, image: Tensor) -> Tensor:
        """Lose two voxels on each side."""
        answer: Tensor = self.layers(image)
        return answer


def own(network: str, **arguments: object) -> dict[str, object]:
    return {"name": "network", "network": network, "arguments": arguments}


def save_own(path: Path, network: str = "tests.test_checkpoint:Own", **more: object) -> nn.Module:
    torch.manual_seed(0)
    made = Own(width=5)
    said = {**SAID, "architecture": own(network, width=5), **more}
    save_checkpoint(path, made, **said)  # type: ignore[arg-type]
    return made.eval()


def test_ones_own_network_comes_back_with_its_arguments(tmp_path: Path) -> None:
    made = save_own(tmp_path / "own.pt", answer="values", context=CONTEXT)
    model = load_model(tmp_path / "own.pt", network="tests.test_checkpoint:Own")
    assert (model.kind, model.axes, model.channels) == ("checkpoint", 2, 1)
    assert (model.normalize, model.labels, model.answer) == ("zscore", ("denoised",), "values")
    assert (model.provenance, model.trained) == ({"seed": 1}, CONTEXT)
    image = torch.rand(1, 1, 20, 21)
    assert torch.equal(model.module(image), made(image))
    with pytest.raises(BadRequest, match="does not fit the network"):
        load_model(
            tmp_path / "own.pt", network="tests.test_checkpoint:Own", network_args={"width": 4}
        )
    with pytest.raises(BadRequest, match="does not fit the network"):
        load_model(tmp_path / "own.pt", network="tests.test_checkpoint:Own", network_args={})


def test_code_that_a_file_names_is_not_imported(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(CODE)
    reference, path = f"{tmp_path}/nets.py:make", tmp_path / "own.pt"
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Conv2d(3, 1, 3))
    save_checkpoint(path, network, architecture=own(reference), **SAID)  # type: ignore[arg-type]
    with pytest.raises(BadRequest) as refusal:
        load_model(path)
    assert str(refusal.value) == (
        f"model (={path}) was trained with the network {reference}, whose code the file does not"
        f" hold; give --network {reference} if you trust it"
    )
    assert not (tmp_path / "imported").exists()
    assert "nets" not in sys.modules
    digests = {load_model(path, network=reference).digest}
    assert (tmp_path / "imported").exists()
    (tmp_path / "nets.py").write_text(CODE + "# another\n")
    digests |= {load_model(path, network=reference).digest}
    digests |= {load_model(path, network=reference, network_args={"width": 3}).digest}
    assert len(digests) == 3


def test_what_is_to_be_added_can_be_pasted_into_a_shell(tmp_path: Path) -> None:
    save_own(tmp_path / "own.pt", network="x; rm -rf ~:make")
    with pytest.raises(BadRequest, match=re.escape("give --network 'x; rm -rf ~:make' if")):
        load_model(tmp_path / "own.pt")


def test_a_unet_needs_no_code(tmp_path: Path) -> None:
    options = {"base": 2, "depth": 2, "attention": True, "residual": True}
    network = UNet(**options).eval()  # type: ignore[arg-type]
    labels = {"labels": ["ground", "cell"]}
    save_checkpoint(tmp_path / "a.pt", network, architecture=options, **{**SAID, **labels})  # type: ignore[arg-type]
    content = torch.load(tmp_path / "a.pt", weights_only=True)
    assert content["architecture"] == {"name": "unet", **options}
    assert content["answer"] == "classes"
    model, image = load_model(tmp_path / "a.pt"), torch.rand(1, 1, 40, 42)
    assert torch.equal(model.module(image), network(image))
    with pytest.raises(BadRequest, match=r"is neither \(checkpoint\): leave it out"):
        load_model(tmp_path / "a.pt", network="tests.test_checkpoint:Own")


def test_a_checkpoint_of_before_is_read(tmp_path: Path) -> None:
    content = torch.load(SHIPPED, weights_only=True)
    for name in ("answer", "context"):  # as the first version wrote it
        content.pop(name, None)
    for name in ("attention", "residual"):
        content["architecture"].pop(name, None)
    torch.save(content, tmp_path / "old.pt")
    said = read_checkpoint(SHIPPED, content)
    assert (said.network, said.answer, said.context) == (None, "classes", None)
    model = load_model(tmp_path / "old.pt")
    assert (model.labels, model.answer, model.trained) == (
        ("background", "nucleus"),
        "classes",
        None,
    )


DAMAGE = {
    "tilepipe": [(2, "of format 2"), ("1", "of format '1'"), (None, "of format NoneType")],
    "architecture": [
        ([], "its architecture must be plain values"),
        ({}, "unknown architecture NoneType"),
        ({"name": "vgg\nx"}, r"unknown architecture 'vgg\nx'"),
        ({"name": torch.ones(3, 3)}, "its architecture must be plain values"),
        ({"name": "unet", "colour": 3}, "cannot build: UNet.__init__() got an unexpected"),
        ({"name": "network"}, "its network must read"),
        ({"name": "network", "network": "make"}, "its network must read"),
        ({"name": "network", "network": "a:b\n"}, "its network must read"),
        ({"name": "network", "network": "a:\x1b[2J"}, "its network must read"),
        ({"name": "unet", "base": 10**7}, "does not fit the network"),
        ({"name": "unet", "base": 10**30}, "cannot build"),
        ({"name": "unet", "base": "8"}, "cannot build"),
        (own("a:b", width=torch.ones(2, 2)), "its architecture must be plain values"),
        ({"name": "network", "network": "a:b", "arguments": [1]}, "its arguments must be plain"),
    ],
    "weights": [(None, "its weights must be"), ({}, "its weights"), ({"a": 3}, "its weights")],
    "normalize": [(3, "its normalize must be"), ("none\nno", "its normalize must be")],
    "labels": [("ab", "its labels must be"), ([1, 2], "its labels"), (["a"], "each of its 2")],
    "answer": [
        ("guesses", "its answer must be one of classes, values"),
        (["classes"], "its answer"),
    ],
    "context": [
        (3, "its context must be plain"),
        ({"before": [1]}, "its context must list"),
        ({**CONTEXT, "step": [1]}, "its context must list"),
        ({**CONTEXT, "step": [1.0, 1.0]}, "its context must list"),
    ],
    "provenance": [([1], "its provenance must be"), ({"a": torch.ones(1)}, "its provenance")],
}


@pytest.mark.parametrize(("key", "value", "says"), [(k, *d) for k, v in DAMAGE.items() for d in v])
def test_a_damaged_checkpoint_is_refused_in_one_line(
    tmp_path: Path, key: str, value: object, says: str
) -> None:
    content = torch.load(SHIPPED, weights_only=True)
    torch.save({**content, key: value}, tmp_path / "model.pt")
    with pytest.raises(BadRequest, match=re.escape(says)) as refusal:
        load_model(tmp_path / "model.pt")
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("key", ["architecture", "weights"])
def test_what_a_checkpoint_needs_must_be_there(tmp_path: Path, key: str) -> None:
    content = torch.load(SHIPPED, weights_only=True)
    del content[key]
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(BadRequest, match=f"its {key} must be"):
        load_model(tmp_path / "model.pt")


def test_what_would_not_be_read_is_not_written(tmp_path: Path) -> None:
    for more, says in (
        ({"answer": "guesses"}, "its answer"),
        ({"context": {"before": [1]}}, "its context"),
        ({"provenance": {"when": object()}}, "its provenance"),
        ({"labels": [3]}, "its labels"),
        ({"architecture": own("nowhere")}, "its network"),
    ):
        with pytest.raises(BadRequest, match=says):
            save_own(tmp_path / "own.pt", **copy.copy(more))
    assert not any(tmp_path.iterdir())


def test_a_network_of_values_is_asked_for_values(tmp_path: Path) -> None:
    save_own(tmp_path / "own.pt", answer="values", normalize="none", context=CONTEXT)
    image = noise(61, 47, dtype="float32")
    source, model = write_volume(tmp_path / "image.zarr", image, "yx"), tmp_path / "own.pt"
    reference = "tests.test_checkpoint:Own"
    for write in ("labels", "probabilities", "logits"):
        with pytest.raises(BadRequest) as refusal:
            tp.plan(source, model=model, options=Options(network=reference, write=write))
        assert str(refusal.value) == (
            f"write (={write}) needs classes; model (={model}) was trained for values: use"
            " --write values"
        )
    options = Options(network=reference, write="values", tile=(16, 20))
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=options)
    with torch.inference_mode():
        padded = nn.functional.pad(torch.from_numpy(image)[None, None], [2] * 4, mode="reflect")
        truth = load_model(model, network=reference).module(padded)[0].numpy()
    assert_close(read(tmp_path / "out.zarr"), truth)
    facts, text = describe_file(model, network=reference)
    assert (facts["answer"], facts["trained"]) == ("values", CONTEXT)
    assert "trained for   values, with a context of 2,2 before, 2,2 after, step 1,1" in text


def test_a_network_of_one_channel_finds_one_class(tmp_path: Path) -> None:
    options = {"base": 2, "depth": 2, "classes": 1}
    model, image = tmp_path / "one.pt", noise(40, 33)
    said = {**SAID, "labels": ["cell"], "normalize": "none"}
    save_checkpoint(model, UNet(**options), architecture=options, **said)  # type: ignore[arg-type]
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    tp.segment(source, model=model, output=tmp_path / "out.zarr", options=Options(tile=(16, 16)))
    logits = one_pass(model, image[None].astype("float32"))[0]
    found, clear = read(tmp_path / "out.zarr"), abs(logits) > 1e-5 * abs(logits).max()
    assert (found == (logits > 0))[clear].all()


def test_labels_must_name_the_channels_that_a_network_gives(tmp_path: Path) -> None:
    save_own(tmp_path / "own.pt", labels=["one", "two"])
    source = write_volume(tmp_path / "image.zarr", noise(30, 30), "yx")
    with pytest.raises(BadRequest, match=r"labels \(=one, two\) .* name each of its 1 output chan"):
        tp.plan(
            source,
            model=tmp_path / "own.pt",
            options=Options(network="tests.test_checkpoint:Own"),
        )
