"""Numbers, bytes and times in words."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable


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


def describe_bytes(count: float) -> str:
    """Return a number of bytes as people say it.

    >>> describe_bytes(1_500_000_000)
    '1.5 GB'
    """
    units = ["B", "kB", "MB", "GB", "TB", "PB"]
    place = min(int(math.log10(count)) // 3, len(units) - 1) if count >= 1 else 0
    return f"{count / 1000**place:.3g} {units[place]}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> duration(42), duration(125), duration(7500), duration(200_000)
    ('42 s', '2 min', '2.1 h', '2.3 days')
    """
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def table(rows: Iterable[tuple[str, str]]) -> str:
    """Return rows of a name and a value as lines, the values below one another."""
    return "\n".join(f"{name:<13} {value}" for name, value in rows)
