"""What is public is described: every argument, result, error and field, in sentences."""

from __future__ import annotations

import ast
import inspect
import re
from dataclasses import fields, is_dataclass

import pytest

import tilepipe as tp

PUBLIC = [getattr(tp, name) for name in tp.__all__ if name != "__version__"]
FUNCTIONS = [inspect.unwrap(value) for value in PUBLIC if inspect.isfunction(value)]
DATACLASSES = [value for value in PUBLIC if isinstance(value, type) and is_dataclass(value)]


def sections(function: object) -> dict[str, dict[str, str]]:
    """Return the entries of each section of a docstring in Google's style, with what they say."""
    found: dict[str, dict[str, str]] = {}
    section, name = "", ""
    for line in (inspect.getdoc(function) or "").splitlines():
        if head := re.fullmatch(r"(Args|Returns|Raises):", line):
            section = head[1]
            found[section] = {}
        elif section and (entry := re.fullmatch(r"    (\w+): (.+)", line)):
            name = entry[1]
            found[section][name] = entry[2]
        elif section and line.startswith("    "):
            name = name if section != "Returns" else ""
            found[section][name] = f"{found[section].get(name, '')} {line.strip()}".strip()
    return found


def test_there_are_the_twelve_functions() -> None:
    assert {function.__name__ for function in FUNCTIONS} == {
        "context", "evaluate", "grow_objects", "keep_memory", "label_components", "load_model",
        "open_volume", "plan", "save_checkpoint", "segment", "train", "write_synthetic",
    }  # fmt: skip


@pytest.mark.parametrize("function", [*FUNCTIONS, tp.UNet], ids=lambda function: function.__name__)
def test_arguments_results_and_errors_are_described(function: object) -> None:
    signature, described = inspect.signature(function), sections(function)  # type: ignore[arg-type]
    assert list(described.get("Args", {})) == list(signature.parameters)
    assert ("Returns" in described) == (signature.return_annotation != "None")
    assert ("Raises" in described) == (function is not inspect.unwrap(tp.keep_memory))
    for entries in described.values():
        for name, text in entries.items():
            assert text[0].isupper() or text.startswith("``"), (name, text)
            assert text.endswith("."), (name, text)
    for name in described.get("Raises", {}):
        assert hasattr(tp, name) or name in ("OSError", "KeyboardInterrupt"), name


@pytest.mark.parametrize("kind", DATACLASSES, ids=lambda kind: kind.__name__)
def test_fields_are_described(kind: type) -> None:
    """Each by a string below it."""
    [tree] = ast.parse(inspect.getsource(kind)).body
    assert isinstance(tree, ast.ClassDef)
    described = {}
    for line, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            text = below.value if isinstance(below, ast.Expr) else None
            described[line.target.id] = text.value if isinstance(text, ast.Constant) else None
    public = {field.name for field in fields(kind) if not field.name.startswith("_")}
    assert public <= described.keys()
    for name in sorted(public):
        text = described[name]
        assert isinstance(text, str), f"{kind.__name__}.{name} has no sentence"
        assert re.search(r"[.)\]]$", text.strip()), f"{kind.__name__}.{name}: {text}"
