"""What the commands take: sizes, amounts of memory, and the options of each."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING

import click

from tilepipe.errors import BadRequest
from tilepipe.runs.array import ArrayTask

if TYPE_CHECKING:
    from tilepipe.geometry import Shape


class Place(click.Path):
    """A file, a folder, or the address of one in an object store; the shell completes paths."""

    name = "path"


class VoxelSizes(click.ParamType["Shape"]):
    """Voxels along each of the volume's axes."""

    name = "Z,Y,X"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shape:
        """Return the sizes as a tuple."""
        try:
            return tuple(int(part) for part in str(value).strip("()").split(","))
        except ValueError:
            self.fail(f"{value!r} must be whole numbers with commas, as in 64,128,128", param, ctx)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Values of labels."""

    name = "N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the values as a tuple."""
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be whole numbers with commas, as in 1,2", param, ctx)


class Channels(click.ParamType[tuple[int | str, ...]]):
    """Channels by number or by name."""

    name = "N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | str, ...]:
        """Return numbers, and names of what is no number."""
        parts = value if isinstance(value, tuple | list) else str(value).split(",")
        named = [str(part).strip() for part in parts]
        if "" in named:
            self.fail(f"{value!r} must be numbers or names with commas, as in 0,2", param, ctx)
        return tuple(int(part) if part.isdecimal() else part for part in named)


class Names(click.ParamType[tuple[str, ...]]):
    """Names of classes."""

    name = "NAME,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the names as a tuple."""
        return tuple(str(value).split(",")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]


class Bytes(click.ParamType[int]):
    """An amount of memory."""

    name = "SIZE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", str(value).strip())
        if match is None:
            self.fail(f"{value!r} must be an amount such as 512MB or 4GB", param, ctx)
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


class ArrayTaskType(click.ParamType["ArrayTask"]):
    """One task of an array."""

    name = "I/N"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> ArrayTask:
        """Return which task of how many."""
        match = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} must be a task and their number, as in 3/8", param, ctx)
        try:
            return ArrayTask(int(match[1]), int(match[2]))
        except BadRequest as error:
            self.fail(str(error), param, ctx)


class Arguments(click.ParamType[dict[str, object]]):
    """A JSON object."""

    name = "JSON"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object]:
        """Return the object as a dict."""
        try:
            arguments = json.loads(str(value))
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(arguments, dict):
            self.fail(f'{value!r} must be a JSON object, as in {{"base": 16}}', param, ctx)
        return arguments


class PerLevel(click.ParamType["list[int | Shape]"]):
    """Sizes for each level of a U-Net."""

    name = "SIZES"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int | Shape]:
        """Return one number, or one for each axis, for each level."""
        try:
            levels = [tuple(map(int, part.split(","))) for part in str(value).split(";")]
        except ValueError:
            self.fail(f"{value!r} must be sizes by level, as in '1,2,2;1,2,2;2'", param, ctx)
        return [level[0] if len(level) == 1 else level for level in levels]
