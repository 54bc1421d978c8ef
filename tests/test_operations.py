"""The table of operations is whole, and no other file says what an operation is."""

from __future__ import annotations

import ast
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tilepipe
from tilepipe.geometry import Region
from tilepipe.graph import readers, values
from tilepipe.graph.evaluator import RegionEvaluator
from tilepipe.graph.graph import export
from tilepipe.graph.operations import TABLE, kind_of, name_of
from tilepipe.graph.readings import Attending, OperationKind, Padding, Windowing
from tilepipe.graph.sweep import Sweep

ROOT = Path(tilepipe.__file__).parent
NAMES = {name for kind in TABLE for name in kind.names.split()}
FAMILIES = {"adaptive", "attention", "avg", "conv", "dropout", "interpolate", "linear", "log",
            "nearest", "norm", "pad", "pool", "reflect", "replicat", "shuffle", "transpose",
            "upsample"}  # fmt: skip
"""Parts of names by which families of operations could be told."""
OTHERS = {("predictor.py", "applied.name == 'sigmoid'")}
"""What is compared with the same words and is no operation: an activation, by its name."""


def _comparisons(path: Path) -> set[tuple[str, str]]:
    """Return the comparisons of names with words of the table in a file."""
    compared = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Compare):
            operands = [node.left, *node.comparators]
        elif isinstance(node, ast.Match):
            operands = [node.subject, *(case.pattern for case in node.cases)]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr not in ("startswith", "endswith", "find", "count", "get"):
                continue
            operands = [node.func.value, *node.args]
            if node.func.attr == "get" and not isinstance(node.func.value, ast.Dict):
                continue  # an argument of an operation, by its name
        else:
            continue
        words = {
            word
            for operand in operands
            for part in ast.walk(operand)
            if isinstance(part, ast.Constant) and isinstance(part.value, str)
            for word in part.value.split()
        }
        names = [o for o in operands if not isinstance(o, ast.Constant)]
        texts = " ".join(ast.unparse(o) for o in names)
        about = any(word in texts for word in ("name", "target", "func", "operation"))
        if about and words & (NAMES | FAMILIES):
            compared.add((path.name, ast.unparse(node)))
    return compared


def test_no_other_file_compares_the_names_of_operations() -> None:
    files = [p for p in ROOT.rglob("*.py") if p != ROOT / "graph" / "operations.py"]
    compared = set().union(*(_comparisons(path) for path in files))
    assert compared == OTHERS


@pytest.mark.parametrize(
    "line",
    ["'conv' in name", "item.operation.name == 'cat'", "call.name in ('add', 'sub')",
     "name.startswith('softmax')", "'convolution' in str(func)", "' relu ' in f' {name} '",
     "{'relu': 0}.get(call.name)"],
)  # fmt: skip
def test_a_comparison_of_names_is_seen(line: str, tmp_path: Path) -> None:
    (tmp_path / "file.py").write_text(f"seen = {line}\n")
    assert _comparisons(tmp_path / "file.py")


@pytest.mark.parametrize("kind", TABLE, ids=lambda kind: kind.names.split()[0])
def test_every_row_is_complete(kind: OperationKind) -> None:
    assert kind.names == " ".join(kind.names.split()) != ""
    assert all(callable(function) for function in (kind.reads, kind.values, kind.multiply_adds))
    assert all(function is None or callable(function) for function in (kind.computes, kind.into))
    assert kind.window is Windowing.NONE or (kind.last and kind.computes is not None)
    assert (kind.window is Windowing.CONVOLUTION) >= kind.transposed
    assert (kind.reads is readers.read_interpolation) == bool(kind.mode) == (kind.beside > 0)
    assert (kind.reads is readers.read_pad) == (kind.padding is not Padding.NONE)
    assert (kind.reads is readers.read_slice) == kind.crops
    assert (kind.reads is readers.read_cat) == kind.joins
    assert (kind.reads is readers.read_attention) == (kind.attends is Attending.ALWAYS)
    # What is called itself must give each row from the same row, or along the last dimensions.
    special = kind.window is not Windowing.NONE or kind.mode or kind.crops or kind.joins
    assert kind.chains == (kind.computes is None)
    assert not (special and kind.chains)
    assert kind.axes == 0  # which the name says


def test_every_name_stands_in_one_row_and_is_one_of_torch() -> None:
    counted = Counter(name for kind in TABLE for name in kind.names.split())
    assert max(counted.values()) == 1
    real = {name for name in counted if name == "getitem" or hasattr(torch.ops.aten, name)}
    assert real == set(counted)
    for name in counted:
        kind = next(kind for kind in TABLE if name in kind.names.split())
        same = [f.name for f in fields(OperationKind) if f.name != "axes"]
        assert all(getattr(kind_of(name), field) == getattr(kind, field) for field in same)


@pytest.mark.parametrize(
    ("name", "axes"),
    [("conv3d", 3), ("max_pool2d_with_indices", 2), ("upsample_linear1d", 1), ("convolution", 0)],
)
def test_the_axes_are_those_in_the_name(name: str, axes: int) -> None:
    assert kind_of(name).axes == axes


def test_what_is_not_in_the_table_is_refused_and_ends_the_walk_of_values() -> None:
    kind = kind_of("fft_rfft")
    assert kind.reads is readers.refuse
    assert kind.values is values.unknown
    assert name_of(torch.ops.aten.relu_.default) == "relu"


class Spelled(nn.Module):
    """Operations under their rarer names: `concat` along both kinds of axes, and `_convolution`."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 2, 3, 3))

    def forward(self, image: Tensor) -> Tensor:
        x = torch.concat([image, image * 2], 1)
        x = torch._convolution(
            x, self.weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
            False, False, False, False,
        )  # fmt: skip
        x = torch.concat([x[:, :, :17], x[:, :, 17:] + 1], 2)
        return F.relu(x)


@pytest.mark.parametrize("box", [Region((0, 0), (48, 40)), Region((5, 7), (30, 21)),
                                 Region((20, 0), (44, 40))])  # fmt: skip
def test_other_names_of_an_operation_are_computed_as_it_is(box: Region) -> None:
    torch.manual_seed(0)
    network, image = Spelled().double().eval(), torch.randn(1, 1, 48, 40, dtype=torch.float64)
    graph = export(Spelled().double().eval().to("meta"), (1, 1, 48, 40))
    whole, evaluator = network(image), RegionEvaluator(graph, network)

    def read(rows: Region) -> Tensor:
        return image[(slice(None), slice(None), *rows.within((0, 0)))]

    expected = whole[(slice(None), slice(None), *box.within((0, 0)))]
    with torch.no_grad():
        torch.testing.assert_close(evaluator(box, read), expected)
        for axis in (0, 1):
            slabs = [slab.clone() for _, slab in Sweep(evaluator, box, axis).run(7, read)]
            torch.testing.assert_close(torch.cat(slabs, 2 + axis), expected)
