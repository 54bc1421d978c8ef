"""Archives of torch, read without running anything that they say.

`torch.load` can unpickle, and `torch.export.load` unpickles and evaluates parts of its archives.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
import zipfile
from typing import TYPE_CHECKING

import torch
from torch import fx

from tilepipe.errors import BadRequest
from tilepipe.models.vocabulary import is_allowed

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

_EXPRESSION = re.compile(r"[\w\s+\-*/%(),<>=!&|~.]*")
_CALLED = re.compile(
    r"Abs|Add|And|CeilDiv|CeilToInt|CleanDiv|Eq|Float|FloatTrueDiv|FloorDiv|FloorToInt|Ge|Gt|"
    r"IntTrueDiv|Integer|Le|Lt|Max|Min|Mod|ModularIndexing|Mul|Ne|Not|Or|Pow|PowByNatural|"
    r"PythonMod|Rational|RoundToInt|Symbol|ToFloat|TruncToInt|Where"
)


def load_tensors(path: Path, content: bytes) -> object:
    """Read what `torch.save` wrote, if it is tensors and plain values only."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such as of pickles, which are refused anyway
            return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"a pickled object ({named[1]})" if named else "no tensors that can be read"
        raise BadRequest(
            f"model (={path}) holds {what}; unpickling runs code, so save network.state_dict()"
            " instead and give its factory with --network"
        ) from None


def load_program(path: Path, content: bytes) -> tuple[nn.Module, tuple[int, ...]]:
    """Load a `torch.export` archive, and its input shape with 0 for each size that may change.

    `torch.export.load` unpickles and evaluates parts of its archives, so they are read first:
    tensors, the calls of `tilepipe.models.vocabulary` and arithmetic are all that they may hold.
    """
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        _check_members(path, archive.namelist())
        for name in archive.namelist():
            if name.lower().endswith(".json"):
                _check_program_json(path, json.loads(archive.read(name)))
            elif name.lower().endswith(".pt") and archive.getinfo(name).file_size:
                load_tensors(path, archive.read(name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.load(io.BytesIO(content))
    if autocast := _autocast_of(program.graph_module):
        raise BadRequest(
            f"model (={path}) was exported with torch.autocast ({autocast}) inside, which cannot"
            " be run on other sizes; export it without, and choose with --precision"
        )
    signature = program.graph_signature
    if len(signature.user_inputs) != 1:
        raise BadRequest(
            f"model (={path}) takes {len(signature.user_inputs)} inputs; one is needed"
        )
    inputs = {node.name: node for node in program.graph.nodes}
    shape = inputs[str(signature.user_inputs[0])].meta["val"].shape
    module = program.module()
    _drop_assertions(module)
    return module, tuple(n if isinstance(n, int) else 0 for n in shape)


def _drop_assertions(module: nn.Module) -> None:
    """Take out what says of a cast on which device it was traced: others are right as well."""
    assert isinstance(module, torch.fx.GraphModule)
    for node in list(module.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            module.graph.erase_node(node)
    module.recompile()


def _check_members(path: Path, names: list[str]) -> None:
    """Refuse compiled code, which loading would run, and members that may be read for others."""
    refused = ""
    if any("aotinductor" in name.lower() for name in names):
        refused = "compiled code"
    elif len({name.lower() for name in names}) < len(names):  # torch does not look at the case
        refused = "two members of one name"
    if refused:
        raise BadRequest(f"model (={path}) holds {refused}; it is not loaded")


def _autocast_of(module: nn.Module) -> str:
    """Return what `torch.autocast` is told inside a program, else an empty string."""
    for part in module.modules():
        for node in part.graph.nodes if isinstance(part, fx.GraphModule) else ():
            if node.target is torch.ops.higher_order.wrap_with_autocast and node.args[2]:
                return f"{node.args[0]}, {str(node.args[1]).removeprefix('torch.')}"
    return ""


def _check_program_json(path: Path, value: object) -> None:
    """Refuse pickles, calls that do more than compute, and expressions beyond arithmetic."""
    if isinstance(value, list):
        for item in value:
            _check_program_json(path, item)
        return
    if not isinstance(value, dict):
        return
    stored = str(value.get("path_name", ""))
    target, expression = value.get("target"), value.get("expr_str")
    refused = ""
    if value.get("use_pickle") or stored.startswith(("custom_obj", "opaque_obj")):
        refused = "a pickled tensor or object"
    elif isinstance(target, str) and "inputs" in value and not is_allowed(target):
        refused = f"a call of {target}"
    elif isinstance(operator := value.get("as_operator"), str) and not is_allowed(operator):
        refused = f"the function {operator}"
    elif isinstance(expression, str):
        # The name of a symbol, or a number that is not whole.
        expression = re.sub(r"'(\w+|[+-]?\d+\.\d*(e[+-]?\d+)?)'", "", expression)
        called = re.findall(r"([A-Za-z_]\w*)\s*\(", expression)
        if (
            "__" in expression
            or not _EXPRESSION.fullmatch(expression)
            or not all(map(_CALLED.fullmatch, called))
        ):
            refused = f"the expression {expression[:40]!r}"
    if refused:
        raise BadRequest(f"model (={path}) holds {refused}; it is not loaded")
    for item in value.values():
        _check_program_json(path, item)
