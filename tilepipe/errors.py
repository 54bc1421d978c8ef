"""What can go wrong in a way that the user can mend."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


class BadRequest(ValueError):
    """The request cannot be met; nothing was written. The command line exits with 2.

    The message is one line: the argument with its value, the rule, the other value, the remedy.
    """


class TileError(RuntimeError):
    """One tile failed; the rest goes on. The message names the tile's voxels and the cause."""


def counted(number: int, noun: str) -> str:
    """Return a number of things in words.

    >>> counted(1, "channel"), counted(3, "channel")
    ('1 channel', '3 channels')
    """
    return f"{number:,} {noun}" + "s" * (number != 1)


def comma(sizes: Iterable[int]) -> str:
    """Return sizes as they are given on the command line, and shown in messages.

    >>> comma((64, 128))
    '64,128'
    """
    return ",".join(map(str, sizes))
