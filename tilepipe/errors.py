"""What can go wrong in a way that the user can mend."""

from __future__ import annotations


class BadRequest(ValueError):
    """The request cannot be met; nothing was written. The command line exits with 2.

    The message is one line: the argument with its value, the rule, the other value, the remedy.
    """


class TileError(RuntimeError):
    """One tile failed; the rest goes on. The message names the tile's voxels and the cause."""
