"""What a network's output means: nothing is activated twice."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilepipe as tp
from tests.support import noise, one_pass, read, write_volume
from tilepipe.graph.calls import graph_calls, script_calls
from tilepipe.graph.graph import export
from tilepipe.graph.meaning import read_meaning
from tilepipe.options import Options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray

SINGLE: dict[str, Callable[[Tensor], Tensor | dict[str, Tensor]]] = {
    "last": lambda y: y[:, :1].sigmoid(),
    "clamp": lambda y: torch.sigmoid(y[:, :1]).clamp(1e-6, 1 - 1e-6),
    "a channel": lambda y: torch.sigmoid(y)[:, :1],
    "a channel selected": lambda y: torch.sigmoid(y)[:, 0].unsqueeze(1),
    "clone": lambda y: torch.sigmoid(y[:, :1]).clone(),
    "contiguous": lambda y: torch.sigmoid(y[:, :1]).contiguous(),
    "dropout": lambda y: F.dropout(torch.sigmoid(y[:, :1]), 0.5, False),
    "times one": lambda y: torch.sigmoid(y[:, :1]) * 1.0,
    "plus zero": lambda y: 0 + torch.sigmoid(y[:, :1]) / 1,
    "a crop": lambda y: torch.sigmoid(y[:, :1])[:, :, 2:-2, 2:-2],
    "narrow": lambda y: torch.sigmoid(y).narrow(1, 0, 1),
    "a dict": lambda y: {"mask": torch.sigmoid(y[:, :1])},
    "by exp": lambda y: 1 / (1 + torch.exp(-y[:, :1])),
    "by exp over": lambda y: torch.exp(y[:, :1]) / (1 + torch.exp(y[:, :1])),
    "by tanh": lambda y: 0.5 * (1 + torch.tanh(y[:, :1] / 2)),
    "hardsigmoid": lambda y: F.hardsigmoid(y[:, :1]),
    "hardsigmoid by hand": lambda y: F.relu6(y[:, :1] + 3) / 6,
    "one minus": lambda y: 1 - torch.sigmoid(y[:, :1]),
    "cast": lambda y: torch.sigmoid(y[:, :1]).double().float(),
    "pad": lambda y: F.pad(torch.sigmoid(y[:, :1])[:, :, 1:-1, 1:-1], (1, 1, 1, 1)),
    "upsampled": lambda y: F.interpolate(
        F.avg_pool2d(torch.sigmoid(y[:, :1]), 2), scale_factor=2.0, mode="bilinear"
    ),
    "permute": lambda y: torch.sigmoid(y.permute(0, 2, 3, 1))[..., :1].permute(0, 3, 1, 2),
    "mean of two": lambda y: (torch.sigmoid(y[:, :1]) + torch.sigmoid(y[:, 1:2])) / 2,
    "a class of a softmax": lambda y: torch.softmax(y, dim=1)[:, 1:2],
    "a class selected": lambda y: torch.softmax(y, dim=1)[:, 1].unsqueeze(1),
    "a class by exp": lambda y: (torch.exp(y) / torch.exp(y).sum(1, keepdim=True))[:, 1:2],
    "a thresholded sigmoid": lambda y: (torch.sigmoid(y[:, :1]) > 0.6).float(),
}
"""Forms that give one channel of probabilities."""
CLASSES: dict[str, Callable[[Tensor], Tensor | dict[str, Tensor]]] = {
    "last": lambda y: torch.softmax(y, dim=1),
    "clamp": lambda y: torch.softmax(y, dim=1).clamp(0, 1),
    "clone": lambda y: torch.softmax(y, dim=1).clone(),
    "dropout": lambda y: F.dropout(torch.softmax(y, dim=1), 0.5, False),
    "times one": lambda y: torch.softmax(y, dim=1) * 1.0,
    "a crop": lambda y: torch.softmax(y, dim=1)[:, :, 2:-2, 2:-2],
    "a dict": lambda y: {"classes": torch.softmax(y, dim=-3)},
    "by exp": lambda y: torch.exp(y) / torch.exp(y).sum(dim=1, keepdim=True),
    "by exp, stable": lambda y: _stable(y),
    "exp of log": lambda y: F.log_softmax(y, dim=1).exp(),
    "permute": lambda y: torch.softmax(y.permute(0, 2, 3, 1), dim=-1).permute(0, 3, 1, 2),
    "mean of two": lambda y: (torch.softmax(y, dim=1) + torch.softmax(2 * y, dim=1)) / 2,
    "one and its rest": lambda y: _with_rest(torch.sigmoid(y[:, :1])),
}
"""Forms that give probabilities of classes that exclude one another."""
MASKS: dict[str, Callable[[Tensor], Tensor | dict[str, Tensor]]] = {
    "last": lambda y: torch.sigmoid(y),
    "clamp": lambda y: torch.sigmoid(y).clamp(0, 1),
    "cat": lambda y: torch.cat([torch.sigmoid(part) for part in y.split(1, dim=1)], dim=1),
    "by exp": lambda y: 1 / (1 + torch.exp(-y)),
    "part of a softmax": lambda y: torch.softmax(y, dim=1)[:, 1:],
}
"""Forms that give several channels, each a probability of its own."""
FORMS = {"single": SINGLE, "classes": CLASSES, "masks": MASKS}
ALL = [
    (kind, form, how)
    for kind, forms in FORMS.items()
    for form in forms
    for how in ("graph", "script")
    # A script is probed with NaN, which these do not let pass.
    if not (how == "script" and form in ("pad", "a thresholded sigmoid"))
]


def _stable(y: Tensor) -> Tensor:
    e = torch.exp(y - y.amax(dim=1, keepdim=True))
    return e / e.sum(dim=1, keepdim=True)


def _with_rest(p: Tensor) -> Tensor:
    return torch.cat([1 - p, p], dim=1)


class Ending(nn.Module):
    """A convolution to three channels of wide logits, and what is done to them."""

    def __init__(self, kind: str, form: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 3, 3, padding=1)
        self.form = FORMS[kind][form]

    def forward(self, x: Tensor) -> Tensor | dict[str, Tensor]:
        return self.form(self.conv(x))


def write_network(path: Path, network: nn.Module, how: str) -> Path:
    """Write a network as a program whose graph can be read, or as a script."""
    torch.manual_seed(3)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=3.0)
            with torch.no_grad():  # on noise from 0 to 1 the logits have both signs
                layer.weight -= layer.weight.mean(dim=(1, 2, 3), keepdim=True)
                layer.bias = nn.Parameter(0.3 * torch.randn(layer.bias.shape))
    network.eval()
    example = torch.rand(1, 1, 64, 64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        if how == "graph":
            size = {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
            torch.export.save(
                torch.export.export(network, (example,), dynamic_shapes=(size,)), path
            )
        else:
            torch.jit.trace(network, example, strict=False).save(str(path))
    return path


def truth_of(model: Path, image: NDArray[np.generic]) -> NDArray[np.float32]:
    return one_pass(model, image[None].astype(np.float32))


QUICK = (
    "clamp",
    "a channel",
    "clone",
    "dropout",
    "times one",
    "a crop",
    "a dict",
    "by exp",
    "last",
)
"""Forms that are segmented in the quick suite; all are read in it."""
SEGMENTED = [
    pytest.param(
        kind, form, how, marks=[] if form in QUICK else pytest.mark.long, id=f"{kind} {form} {how}"
    )
    for kind, form, how in ALL
]


@pytest.mark.parametrize("kind", FORMS)
def test_every_form_is_read_from_a_graph_and_from_a_script(kind: str) -> None:
    for form in FORMS[kind]:
        network = Ending(kind, form).eval()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch.jit is deprecated
            traced = torch.jit.trace(network, torch.rand(1, 1, 16, 16), strict=False)
        script = script_calls(traced, 0)
        assert script is not None
        graph = graph_calls(export(network.to("meta"), (1, 1, 32, 32)))
        for call in (graph, script):
            found = read_meaning(call, 2)
            assert found.activation in ("sigmoid", "softmax"), form
            assert found.apart == (kind != "classes"), form
            assert (found.low, found.high) == (0, 1) or form == "clamp"


@pytest.mark.parametrize(
    "ending",
    [
        lambda y: y,
        lambda y: torch.sigmoid(y) * y,
        lambda y: torch.softmax(y, dim=2),
        lambda y: torch.sigmoid(y) - 0.5,
        lambda y: torch.tanh(y),
        lambda y: F.relu(y),
        lambda y: torch.exp(y) / torch.exp(y).sum(dim=2, keepdim=True),
        lambda y: torch.logit(torch.sigmoid(y)),
        lambda y: F.conv2d(torch.sigmoid(y), torch.ones(3, 3, 1, 1)),
    ],
)
def test_what_is_no_probability_is_not_taken_for_one(ending: Callable[[Tensor], Tensor]) -> None:
    network = Ending("masks", "last").eval()
    network.form = ending
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = script_calls(torch.jit.trace(network, torch.rand(1, 1, 16, 16)), 0)
    assert script is not None
    assert not read_meaning(script, 2).activation


class Written(nn.Module):
    """What `torch.jit.script` keeps branches and calls of functions of."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.drop = nn.Conv2d(1, 3, 3, padding=1), nn.Dropout2d(0.5)
        self.soft = nn.Softmax(dim=1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = self.drop(self.soft(self.conv(x)))
        one, two, _ = y.chunk(3, 1)
        return {"all": y, "two": two, "more": one + two, "logits": self.conv(x)}


@pytest.mark.parametrize("frozen", [False, True])
def test_each_head_of_a_script_has_its_own_meaning(tmp_path: Path, frozen: bool) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated
        script = torch.jit.script(Written().eval())
        (torch.jit.freeze(script) if frozen else script).save(str(tmp_path / "model.pt"))
        loaded = torch.jit.load(str(tmp_path / "model.pt")).eval()
    heads = [script_calls(loaded, head) for head in range(5)]
    found = [head and read_meaning(head, 2) for head in heads]
    assert [one and (one.activation, one.apart) for one in found] == [
        ("softmax", False), ("softmax", True), ("", False), ("", False), None
    ]  # fmt: skip
    assert found[2] is not None
    assert found[2].high == 2  # a sum of two classes, as far as their bounds say


@pytest.mark.parametrize(("kind", "form", "how"), SEGMENTED)
def test_probabilities_are_not_activated_again(
    tmp_path: Path, kind: str, form: str, how: str
) -> None:
    suffix = {"graph": ".pt2", "script": ".pt"}[how]
    model = write_network(tmp_path / f"model{suffix}", Ending(kind, form), how)
    image = noise(27, 22, dtype="float32")
    source = write_volume(tmp_path / "image.zarr", image, "yx")
    truth = truth_of(model, image)
    twice = form in ("last", "clamp", "by exp")
    for write in ("labels", "probabilities") if twice else ("labels",):
        options = Options(write=write, tile=(16, 22), normalize="none", threads=1)
        tp.segment(source, model=model, output=tmp_path / f"{write}.zarr", options=options)
    if twice:
        np.testing.assert_allclose(read(tmp_path / "probabilities.zarr"), truth, atol=1e-5)
    found = read(tmp_path / "labels.zarr")
    if kind == "classes":
        top = np.sort(truth, axis=0)
        wanted, clear = truth.argmax(0), top[-1] - top[-2] > 1e-4
        assert len(np.unique(wanted)) > 1
    else:
        chosen = truth if kind == "masks" else truth[0]
        wanted, clear = chosen > 0.5, np.abs(chosen - 0.5) > 1e-4
        assert 0.05 < wanted.mean() < 0.95
    assert found.shape == wanted.shape
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found[clear], wanted[clear])


class Appending(nn.Module):
    """Its outputs are a list that grows, and changes once more at the end."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, image: torch.Tensor) -> list[torch.Tensor]:
        values = self.first(image)
        found = [torch.sigmoid(values)]
        found.append(values)
        found[0] = values
        return found


def test_a_list_that_a_script_changes_says_nothing() -> None:
    """Its first element was a sigmoid when it was made."""
    script = torch.jit.script(Appending().eval())
    assert script_calls(script, 1) is None
    call = script_calls(script, 0)
    assert call is None or not read_meaning(call, 2).activation


class Mixed(nn.Module):
    """A probability and two distances, as networks of star-convex objects give them."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values = self.first(image)
        return torch.cat([torch.sigmoid(values[:, :1]), values[:, 1:]], dim=1)


def test_probabilities_beside_other_values_are_not_activated_again() -> None:
    graph = export(Mixed().to("meta"), (1, 1, 32, 32))
    meaning = read_meaning(graph_calls(graph), 2)
    assert not meaning.activation
    assert meaning.strange == "probabilities in some channels and other values in others"
