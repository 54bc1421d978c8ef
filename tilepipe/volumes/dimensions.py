"""What the dimensions of a stored array are: the letters of its axes, and channels by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest
from tilepipe.volumes.ome import AXES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tilepipe.geometry import Shape
    from tilepipe.storage.location import Place

_ASSUMED = {2: "yx", 3: "zyx", 4: "czyx", 5: "tczyx"}
_ORDERS = ("yx", "zyx", "tyx", "tzyx")


def name_axes(
    axes: str | None, stated: tuple[str | None, ...] | None, shape: Shape, path: Place
) -> tuple[tuple[str | None, ...], bool]:
    """Return the axis of each dimension (None: dropped), and whether they were assumed."""
    letters: tuple[str | None, ...]
    if axes is not None:
        letters = tuple(axes.lower())
    elif stated is not None:
        letters = tuple(
            None if letter == "t" and length == 1 else letter
            for letter, length in zip(stated, shape, strict=False)
        )
    elif len(shape) in _ASSUMED:
        letters = tuple(_ASSUMED[len(shape)])
    else:
        raise BadRequest(f"source (={path}) of shape {shape} must have 2 to 5 dimensions")
    axes_text = axes if axes is not None else "".join(letter or "t" for letter in letters)
    named = [letter for letter in letters if letter is not None]
    if len(letters) != len(shape) or (stated is not None and len(stated) != len(shape)):
        raise BadRequest(
            f"axes (={axes_text}) must name the {len(shape)} dimensions of {path}, shape {shape}"
        )
    if len(set(named)) != len(named) or not all(letter in tuple(AXES) for letter in named):
        raise BadRequest(
            f"axes (={axes_text}) must be letters of {AXES}, each once; name them anew"
        )
    if not {"y", "x"} <= set(named):
        raise BadRequest(f"axes (={axes_text}) must contain y and x; name them with axes")
    if "".join(named).replace("c", "") not in _ORDERS:
        raise BadRequest(f"axes (={axes_text}) must end in (z)yx; transpose the array")
    return letters, axes is None and stated is None


def pick_channels(
    requested: Sequence[int | str], count: int, names: Sequence[str], path: Place
) -> tuple[int, ...]:
    """Return the numbers of channels that are asked for by number or name, in that order.

    A number that is no channel's may be the name of one, such as a wavelength. Raises BadRequest
    for a channel that is not there, listing those that are, and for a name that two have.
    """
    if not requested:
        raise BadRequest("channels must name at least one, by number or name, as in 0,2")
    names = tuple(names) if len(names) == count else ()
    picked = []
    for channel in requested:
        if isinstance(channel, int) and 0 <= channel < count:
            picked.append(channel)
            continue
        places = [number for number, name in enumerate(names) if name == str(channel)]
        if len(places) == 1:
            picked += places
            continue
        choices = f"0 to {count - 1}" if count > 1 else "0"
        if any(names):
            choices += ", " + ", ".join(name or "(no name)" for name in names)
        if places:
            numbers = " and ".join(map(str, places))
            raise BadRequest(
                f"channels (={channel}) is the name of channels {numbers} of {path}; give a number"
            )
        raise BadRequest(f"channels (={channel}) must be of {choices}: the channels of {path}")
    return tuple(picked)
