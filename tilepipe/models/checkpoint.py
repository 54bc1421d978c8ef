"""Checkpoints: the weights of a trained network, and all that is needed to run them again.

A file of `torch.save` that holds tensors and plain values only. The network is the paper's, built
from its options, or one's own: then the file holds the name of its code, never the code, and
nothing here imports what a file names.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from tilepipe.errors import BadRequest
from tilepipe.storage.location import sync_file, whole_file

if TYPE_CHECKING:
    from torch import Tensor, nn

FORMAT = 1
ANSWERS = ("classes", "values")
"""What a network was trained for: one score for each class, or values as in restoration."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """What a checkpoint says; plain values, checked, beside the weights."""

    network: str | None
    """``package.module:factory`` of one's own network; None for the paper's."""
    arguments: Mapping[str, object]
    """What the network is built with."""
    weights: Mapping[str, Tensor]
    normalize: str | None
    """What is done to grey values first; None where it is not said."""
    labels: tuple[str, ...]
    """Names of the output's channels, in their order; may be empty."""
    answer: str
    """``classes`` or ``values``."""
    context: Mapping[str, object] | None
    """Voxels before and after, and step, that the network was trained with; not relied upon."""
    provenance: Mapping[str, object]


def save_checkpoint(
    path: str | Path,
    network: nn.Module,
    *,
    architecture: Mapping[str, object],
    normalize: str,
    labels: Sequence[str],
    provenance: Mapping[str, object],
    context: Mapping[str, object] | None = None,
    answer: str = "classes",
) -> None:
    """Write a checkpoint that ``torch.load(path, weights_only=True)`` reads; whole or not at all.

    Args:
        path: The file; one that is there is replaced.
        network: The trained network, whose weights are written.
        architecture: What ``UNet(**architecture)`` was built with; or, of a network of one's own,
            ``{"name": "network", "network": "package.module:factory", "arguments": {...}}``.
        normalize: What the network expects done to the grey values first: ``none``, ``scale:A,B``
            (value * A + B), ``percentile:LO,HI`` or ``zscore``.
        labels: The names of the answer's channels in their order: the classes, what a network of
            one channel looks for, or what its values are.
        provenance: Where the weights come from: versions, seed, steps, measures.
        context: What the network was trained with: lists of voxels ``before``, ``after`` and
            ``step``, along the network's axes. It is kept for people and not relied upon.
        answer: ``classes``, or ``values`` where the network was trained to give those.

    Raises:
        BadRequest: What `read_checkpoint` would refuse: values that are not plain, or labels that
            do not fit the network.
        OSError: The file cannot be written.
    """
    path = Path(path)
    content = {
        "tilepipe": FORMAT,
        "architecture": {"name": "unet", **architecture},
        "weights": {
            name: weight.detach().cpu().contiguous()
            for name, weight in network.state_dict().items()
        },
        "normalize": normalize,
        "labels": list(labels),
        "answer": answer,
        "provenance": dict(provenance),
    }
    if context is not None:
        content["context"] = dict(context)
    read_checkpoint(path, content)
    save_whole(path, content)


def save_whole(path: Path, content: Mapping[str, object]) -> None:
    """Write a file of `torch.save`, whole or not at all; one that is there is replaced."""
    with whole_file(path) as partial:
        torch.save(content, partial)
    sync_file(path.parent)


def read_checkpoint(path: Path, content: Mapping[str, object]) -> Checkpoint:
    """Return what a checkpoint says, as `save_checkpoint` wrote it; ``path`` is for messages.

    Keys that an earlier version did not write have their defaults. Raises BadRequest where the
    content is damaged, of a later version, or not made of tensors and plain values.
    """
    if content.get("tilepipe") != FORMAT:
        raise BadRequest(
            f"model (={path}) is a checkpoint of format {_shown(content.get('tilepipe'))}; this"
            f" tilepipe reads {FORMAT}: use the version that wrote it"
        )
    architecture = _mapping(path, "architecture", content.get("architecture"))
    network, arguments = _architecture(path, dict(architecture))
    weights = content.get("weights")
    if not (
        isinstance(weights, Mapping)
        and weights
        and all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in weights.items())
    ):
        raise _damaged(path, "weights", "must be tensors by name")
    normalize, labels = content.get("normalize"), content.get("labels") or []
    if not (normalize is None or _is_text(normalize)):
        raise _damaged(path, "normalize", "must be a line of text")
    if not (isinstance(labels, list) and all(map(_is_text, labels))):
        raise _damaged(path, "labels", "must be a list of names")
    classes = arguments.get("classes", 2) if network is None else len(labels)
    if "labels" in content and len(labels) != classes:
        raise BadRequest(
            f"labels (={', '.join(labels):.200}) of model (={path}) must name each of its"
            f" {_shown(classes)} classes; give one per class"
        )
    if (answer := content.get("answer", ANSWERS[0])) not in ANSWERS:
        raise _damaged(path, "answer", f"must be one of {', '.join(ANSWERS)}")
    context = content.get("context")
    return Checkpoint(
        network=network,
        arguments=arguments,
        weights=cast("Mapping[str, Tensor]", weights),
        normalize=cast("str | None", normalize),
        labels=tuple(labels),
        answer=str(answer),
        context=None if context is None else _context(path, context),
        provenance=_mapping(path, "provenance", content.get("provenance") or {}),
    )


def needs_code(path: Path, checkpoint: Checkpoint) -> BadRequest:
    """Return the refusal of a checkpoint whose network's code was not given by the user."""
    network = shlex.quote(str(checkpoint.network))
    return BadRequest(
        f"model (={path}) was trained with the network {checkpoint.network}, whose code the file"
        f" does not hold; give --network {network} if you trust it"
    )


def _architecture(
    path: Path, architecture: dict[str, object]
) -> tuple[str | None, Mapping[str, object]]:
    """Return the factory of one's own network or None, and what to build it with."""
    if (name := architecture.pop("name", None)) == "unet":
        return None, architecture
    if name != "network":
        raise BadRequest(
            f"model (={path}) has the unknown architecture {_shown(name)}; known: unet, network"
        )
    network = architecture.get("network")
    if not (isinstance(network, str) and _is_text(network) and ":" in network.strip(":")):
        raise _damaged(path, "network", "must read package.module:factory or file.py:factory")
    return network, _mapping(path, "arguments", architecture.get("arguments", {}))


def _context(path: Path, context: object) -> Mapping[str, object]:
    mapping = _mapping(path, "context", context)
    sizes = [mapping.get(name) for name in ("before", "after", "step")]
    whole = all(isinstance(n, list) and all(type(i) is int for i in n) for n in sizes)
    if not whole or len({len(cast("list[int]", n)) for n in sizes}) != 1:
        raise _damaged(path, "context", "must list the voxels before, after and step of each axis")
    return mapping


def _mapping(path: Path, name: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, Mapping) or not _is_plain(value):
        raise _damaged(path, name, "must be plain values by name")
    return cast("Mapping[str, object]", value)


def _is_plain(value: object) -> bool:
    """Whether a value is what JSON holds, or a tuple of that."""
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _is_text(value: object) -> bool:
    """Whether a value is one line that a terminal shows as it is."""
    return isinstance(value, str) and value.isprintable() and 0 < len(value) <= 1000


def _shown(value: object) -> str:
    """Return a value of a file that may hold anything, in a few characters of one line.

    >>> _shown("vgg"), _shown(2), _shown([1])
    ("'vgg'", '2', 'list')
    """
    return repr(value)[:40] if isinstance(value, int | str) else type(value).__name__


def _damaged(path: Path, name: str, rule: str) -> BadRequest:
    return BadRequest(f"model (={path}) is no checkpoint of tilepipe: its {name} {rule}")
