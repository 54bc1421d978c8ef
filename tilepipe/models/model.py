"""Model files: checkpoints, exported programs, TorchScript and plain state dicts, never unpickled.

Shapes are ``batch, channels, (z,) y, x``; the network is in evaluation mode, on the CPU, as saved.
"""

from __future__ import annotations

import copy
import hashlib
import logging
import math
import uuid
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from tilepipe.errors import BadRequest
from tilepipe.graph.graph import register_tensors
from tilepipe.host.process import borrowed
from tilepipe.models.cost import Cost, measure_cost
from tilepipe.models.heads import Head, tensors_of
from tilepipe.models.intake import SINGLE, find_input
from tilepipe.models.loading import NetworkCode, _load_script, check_magic, read_model
from tilepipe.storage.objects import local_path
from tilepipe.text import first_line

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tilepipe.geometry import Shape

log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Model:
    """A network ready to run, with what its file says of it."""

    path: str
    kind: str
    """"checkpoint", "exported program", "TorchScript" or "state dict"."""
    module: nn.Module
    digest: str
    """sha256 of everything that decides the weights and the architecture."""
    axes: int
    """Spatial axes of the input: 2 or 3."""
    channels: int
    """Channels of the input."""
    head: int = 0
    """Which of the outputs is taken."""
    outputs: int = 0
    """Tensors that the network returns; 0 until an input was accepted."""
    fixed: Shape | None = None
    """The only input size that an exported program of fixed size takes."""
    normalize: str | None = None
    labels: tuple[str, ...] = ()
    """Names of the output's channels; empty where the file does not say them."""
    answer: str = "classes"
    """``classes``, or ``values``: what the network was trained to give."""
    provenance: Mapping[str, object] = field(default_factory=dict)
    trained: Mapping[str, object] | None = None
    """Context of training, as the file says; tiling reads the network's own instead."""
    accepted_side: int = 0
    """A side of an input that was accepted; 0 until one was."""
    _meta: nn.Module | None = None
    _on_cpu: bool = False

    @property
    def exportable(self) -> bool:
        """Whether `torch.export` can be tried; TorchScript is probed instead."""
        return self.kind != "TorchScript"

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sides of inputs that a network which takes a single size may have been built for."""
        return (self.accepted_side,) if self.accepted_side else SINGLE

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(tensor.numel() for tensor in self.module.parameters())

    def on_meta(self, dtype: torch.dtype | None = None) -> nn.Module:
        """Return a copy of the network without memory, in a type if not its own."""
        if dtype is not None and dtype != self.dtype:
            return copy.deepcopy(self.on_meta()).to(dtype)
        if self._meta is None:
            if self.kind == "TorchScript":
                self._meta = Head(_load_script(self.path, "meta").eval(), self.head)
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # of torch about parts of its own programs
                    self._meta = copy.deepcopy(self.module).to("meta")
        return self._meta

    def in_double(self) -> nn.Module:
        """Return a copy of the network in double precision."""
        if self.kind == "TorchScript":
            return Head(_load_script(self.path, "cpu").eval().double(), self.head)
        return copy.deepcopy(self.module).double()

    def output_shape(self, shape: Shape) -> Shape | None:
        """Return the spatial output shape for a spatial input ``shape``; None if it is refused."""
        try:
            return self._try(shape)[2:]
        except Exception:  # whatever the network's own code raises
            return None

    def classes(self, shape: Shape) -> int:
        """Return the channels of the output for a spatial input ``shape`` that is accepted."""
        return self._try(shape)[1]

    def refusal(self, shape: Shape, dtype: torch.dtype | None = None) -> str:
        """Return why the network does not take this spatial input ``shape``, or a type."""
        try:
            self._try(shape, dtype)
        except Exception as error:
            return first_line(error)
        return ""

    def _try(self, shape: Shape, dtype: torch.dtype | None = None) -> Shape:
        device, kind = "cpu" if self._on_cpu else "meta", dtype or self.dtype
        image = torch.zeros((1, self.channels, *shape), device=device, dtype=kind)
        try:
            with torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                chosen = cast("Head", self.module if self._on_cpu else self.on_meta(dtype))
                outputs = tensors_of(chosen.network(image))
        except (NotImplementedError, RuntimeError) as error:
            looks = isinstance(error, NotImplementedError) or "meta tensor" in str(error)
            if self._on_cpu or self.exportable or not looks:
                raise
            self._on_cpu = True  # a script that looks at values does not run on shapes alone
            return self._try(shape)
        self.outputs = len(outputs)
        return tuple(outputs[self.head].shape)

    def cost(self, shape: Shape) -> Cost:
        """Return the multiply-adds and the memory of one pass over a spatial input ``shape``.

        Of a script that does not run on shapes alone it is an estimate from a smaller input.
        """
        if self._on_cpu:
            small = next(s for n in range(64, 2048) if self.output_shape(s := (n,) * self.axes))
            image = torch.zeros((1, self.channels, *small), dtype=self.dtype)
            cost, times = measure_cost(self.module, image), math.prod(shape) / math.prod(small)
            return Cost(int(cost.multiply_adds * times), int(cost.peak * times))
        image = torch.empty((1, self.channels, *shape), device="meta", dtype=self.dtype)
        return measure_cost(self.on_meta(), image)

    @property
    def script(self) -> torch.jit.ScriptModule | None:
        """The network where it is TorchScript, else None."""
        network = cast("Head", self.module).network
        return network if isinstance(network, torch.jit.ScriptModule) else None

    @property
    def dtype(self) -> torch.dtype:
        """The type of the network's weights."""
        kinds = (p.dtype for p in self.module.parameters() if p.is_floating_point())
        return next(kinds, torch.float32)


@borrowed()
def load_model(
    path: str | Path,
    *,
    network: str | None = None,
    network_args: Mapping[str, object] | None = None,
    head: int = 0,
    folder: str | Path | None = None,
    channels: int | None = None,
) -> Model:
    """Load a model file: a checkpoint, an exported program, TorchScript, or a state dict.

    No code is imported that ``network`` does not name.

    Args:
        path: The file: a checkpoint of tilepipe, a program of ``torch.export`` (``.pt2``),
            TorchScript, or a state dict.
        network: ``package.module:factory`` or ``file.py:factory`` that builds the architecture of a
            state dict, or of a checkpoint of one's own network.
        network_args: The arguments of that factory; by default those that a checkpoint has saved.
        head: Which of several outputs is the answer, counted from 0.
        folder: Where the file of ``network``, or a package that is not installed, is looked for; by
            default the working directory.
        channels: The channels of the volume, which are tried first where the weights leave open how
            many the network reads.

    Returns:
        The network on the CPU in evaluation mode. It takes ``(n, channels, *axes)`` and answers
        ``(n, classes, *axes)``, with axes ``(z) y x``.

    Raises:
        BadRequest: The file is none of these, is damaged, or does not fit the network; said in one
            line.
    """
    if not isinstance(path, str | Path):
        raise BadRequest(
            f"model (={type(path).__name__}) must be a file, since every worker loads it: save"
            " network.state_dict() and give its factory, or export the network to a .pt2"
        )
    path = local_path(path, "model")
    if not path.is_file():
        entry = "a folder" if path.is_dir() else "nothing"
        raise BadRequest(f"model (={path}) must be a file; there is {entry}")
    if not path.stat().st_size:
        raise BadRequest(f"model (={path}) is empty")
    _check_head(head)
    content = path.read_bytes()
    check_magic(path, content)
    code = NetworkCode(network, network_args, Path(folder or Path.cwd()))
    try:
        contents = read_model(path, content, code)
        digest = hashlib.sha256(content)
        if contents.has_own_code:
            digest.update(code.identity())
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"model (={path}) cannot be read: {first_line(error)}") from error
    if network is not None and not contents.has_own_code:
        raise BadRequest(
            f"network (={network}) is for state dicts and checkpoints of one's own network; {path}"
            f" is neither ({contents.kind}): leave it out"
        )
    digest.update(f"head {head}".encode())
    if contents.kind != "exported program":  # which is in the mode that it was exported in
        contents.module.eval()
    module = Head(contents.module, head)
    if contents.kind != "TorchScript":
        register_tensors(module)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    model = Model(str(path), contents.kind, module, digest.hexdigest(), 0, 0, head)
    if (checkpoint := contents.checkpoint) is not None:
        model.normalize, model.labels = checkpoint.normalize, checkpoint.labels
        model.answer = checkpoint.answer
        model.provenance, model.trained = checkpoint.provenance, checkpoint.context
    find_input(model, contents.shape, channels)
    return model


def wrap(module: nn.Module, *, head: int = 0, channels: int | None = None) -> Model:
    """Return a model of a network that is already in memory, in evaluation mode."""
    _check_head(head)
    register_tensors(module)
    # Code is not seen, so that a network is like no other, whatever weights they share.
    digest = hashlib.sha256(f"head {head} {uuid.uuid4()}".encode())
    model = Model("network", "module", Head(module.eval(), head), digest.hexdigest(), 0, 0, head)
    find_input(model, None, channels)
    return model


def _check_head(head: int) -> None:
    if head < 0:
        raise BadRequest(f"head (={head}) must not be negative")
