"""What a model file holds: one function for each kind of file."""

from __future__ import annotations

import io
import json
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tilepipe.errors import BadRequest
from tilepipe.models.archive import load_program, load_tensors
from tilepipe.models.checkpoint import Checkpoint, needs_code, read_checkpoint
from tilepipe.models.factory import build_network, digest_of, find_factory
from tilepipe.models.unet import UNet
from tilepipe.text import first_line

if TYPE_CHECKING:
    from pathlib import Path

    from tilepipe.geometry import Shape


@dataclass(frozen=True, slots=True)
class NetworkCode:
    """The user's code that builds a network, as it was named."""

    network: str | None
    arguments: Mapping[str, object] | None
    folder: Path

    def identity(self) -> bytes:
        """Return what of the code decides the answer: names, arguments, and the files it is in."""
        place, _, name = (self.network or "").rpartition(":")
        where = ".py" if place.endswith(".py") else place  # wherever the file lies
        arguments = json.dumps(self.arguments or {}, sort_keys=True)
        identity = f"{where}:{name} {arguments}".encode()
        if self.network:
            identity += digest_of(find_factory(self.network, self.folder)).encode()
        return identity


@dataclass(frozen=True, slots=True)
class ModelContents:
    """What a model file holds."""

    kind: str
    module: nn.Module
    shape: Shape | None = None
    """The one shape that an exported program takes, where it has one."""
    checkpoint: Checkpoint | None = None
    has_own_code: bool = False
    """Whether the user's code builds the network."""


def read_model(path: Path, content: bytes, code: NetworkCode) -> ModelContents:
    """Return what a file holds, by the kind that its names and its keys show."""
    names = _archive_names(content)
    if any(name.endswith("constants.pkl") for name in names) and any(
        "/code/" in name for name in names
    ):
        return ModelContents("TorchScript", _load_script(path, "cpu"))
    if any(re.search(r"(^|/)models/[^/]+\.json$|exported_program\.json$", n) for n in names):
        return ModelContents("exported program", *load_program(path, content))
    saved = load_tensors(path, content)
    if not isinstance(saved, Mapping):
        raise BadRequest(f"model (={path}) holds a {type(saved).__name__}, not weights")
    if "tilepipe" not in saved:
        module = _load_state_dict(path, saved, code.network, code.arguments or {}, code.folder)
        return ModelContents("state dict", module, has_own_code=True)
    checkpoint = read_checkpoint(path, saved)
    module = _load_checkpoint(path, checkpoint, code.network, code.arguments, code.folder)
    own = checkpoint.network is not None
    return ModelContents("checkpoint", module, checkpoint=checkpoint, has_own_code=own)


def check_magic(path: Path, content: bytes) -> None:
    """Refuse what no version of `torch.save` wrote: neither an archive nor a pickle."""
    if content[:1] == b"\x80" or (content[:2] == b"PK" and zipfile.is_zipfile(io.BytesIO(content))):
        return
    if content[:2] == b"PK":
        raise BadRequest(f"model (={path}) is an archive that is not whole; copy it again")
    raise BadRequest(
        f"model (={path}) must be a file of torch.save, torch.export.save or torch.jit.save;"
        f" it is none of them{': export the network to a .pt2' if path.suffix == '.onnx' else ''}"
    )


def _archive_names(content: bytes) -> list[str]:
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return archive.namelist()
    except zipfile.BadZipFile:
        return []


def _load_script(path: str | Path, device: str) -> nn.Module:
    with warnings.catch_warnings():  # torch.jit is deprecated; files of its kind live on
        warnings.simplefilter("ignore")
        return cast("nn.Module", torch.jit.load(str(path), map_location=device))


def _load_checkpoint(
    path: Path,
    checkpoint: Checkpoint,
    network: str | None,
    arguments: Mapping[str, object] | None,
    folder: Path,
) -> nn.Module:
    """Build the paper's network, or by the user's factory, never by what the file names."""
    module: nn.Module
    if checkpoint.network is None:
        try:
            with torch.device("meta"):  # a small file may not ask for all of the memory
                module = UNet(**checkpoint.arguments)  # type: ignore[arg-type]
        except (TypeError, RuntimeError) as error:
            raise BadRequest(
                f"model (={path}) has an architecture that this tilepipe cannot build:"
                f" {first_line(error)}; use the version that wrote it"
            ) from None
        _fill(path, module, checkpoint.weights, assign=True)
        return module.float()
    if network is None:
        raise needs_code(path, checkpoint)
    module = build_network(
        network, checkpoint.arguments if arguments is None else arguments, folder
    )
    _fill(path, module, checkpoint.weights)
    return module


def _load_state_dict(
    path: Path,
    saved: Mapping[str, object],
    network: str | None,
    arguments: Mapping[str, object],
    folder: Path,
) -> nn.Module:
    for key in ("state_dict", "model_state_dict", "model", "weights"):
        inner = saved.get(key)
        if isinstance(inner, Mapping):
            saved = cast("Mapping[str, object]", inner)
    weights = {k: v for k, v in saved.items() if isinstance(v, torch.Tensor)}
    if not weights:
        raise BadRequest(f"model (={path}) holds no weights")
    if network is None:
        raise BadRequest(
            f"model (={path}) is a state dict of {len(weights)} tensors without its architecture;"
            " give it with --network package.module:factory or file.py:factory"
        )
    torch.nn.modules.utils.consume_prefix_in_state_dict_if_present(weights, "module.")
    module = build_network(network, arguments, folder)
    _fill(path, module, weights)
    return module


def _fill(
    path: Path, module: nn.Module, weights: Mapping[str, torch.Tensor], *, assign: bool = False
) -> None:
    try:
        module.load_state_dict(dict(weights), assign=assign)
    except RuntimeError as error:
        lines = [" ".join(line.split()) for line in str(error).splitlines() if line.strip()]
        more = f", and {len(lines) - 2} more" if len(lines) > 2 else ""
        detail = lines[min(1, len(lines) - 1)].rstrip(". ")[:200]
        raise BadRequest(f"model (={path}) does not fit the network: {detail}{more}") from None
