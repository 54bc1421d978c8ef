"""What the values that a network gives mean: probabilities, or logits that are yet to be activated.

Bounds are carried from the operations near the output to the output itself. Whatever the image,
a sigmoid gives 0 to 1, and so does ``1 / (1 + exp(-y))``; a crop, a clone or ``* 1.0`` keep that,
``* 255`` does not. A softmax gives channels that add up to 1, too. Nothing is taken from names or
from what a network gives for some image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tilepipe.graph.ranges import UNKNOWN, Range
from tilepipe.graph.readings import Call

if TYPE_CHECKING:
    from tilepipe.graph.channels import Axis

DEPTH = 100
"""Operations in a row, without weights between them, after which nothing is said."""


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a network gives, whatever the image."""

    activation: str = ""
    """"sigmoid" or "softmax" where it gives probabilities, else an empty string."""
    apart: bool = False
    """Whether each of several channels is a probability of its own: classes may overlap."""
    low: float | None = None
    """No value is below this; None where there is no bound."""
    high: float | None = None
    weighted: bool = False
    """Whether the graph is known back to operations with weights, which may give any value."""
    logarithm: bool = False
    """Whether it gives the logarithm of a probability, which is none and no logit either."""
    mixed: bool = False
    """Whether some channels are probabilities, and others are not known to be."""

    @property
    def strange(self) -> str:
        """Return what it gives, in words, where that is neither logits nor probabilities."""
        if self.logarithm:
            return "logarithms of probabilities"
        if self.mixed:
            return "probabilities in some channels and other values in others"
        if self.activation or self.low is None or self.high is None or self.low < 0:
            return ""
        return f"values of {self.low:g} to {self.high:g}"


def read_meaning(output: Call, axes: int) -> Meaning:
    """Return what the output of a network of so many spatial axes means."""
    result = _Walk().range_of(output, (1, axes + 2))
    if result.log:
        return Meaning(weighted=True, logarithm=result.log == "apart")
    single = output.shape is not None and output.shape[1] == 1
    if result.is_probability and result.adds_up and not single:
        return Meaning("softmax", low=0.0, high=1.0)
    low, high = (edge if math.isfinite(edge) else None for edge in (result.low, result.high))
    name = ("softmax" if result.softmax else "sigmoid") if result.is_probability else ""
    return Meaning(
        name, apart=bool(name), low=low, high=high, weighted=result.known, mixed=result.mixed
    )


class _Walk:
    """A walk from the output towards the image that ends at weights and activations."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[int, Axis], Range] = {}
        self._depth = 0

    def range_of(self, value: object, axis: Axis) -> Range:
        """Return the range of a value; ``axis`` says where the channels of the output lie."""
        if isinstance(value, bool | int | float):
            return Range(float(value), float(value))
        if not isinstance(value, Call) or self._depth > DEPTH:
            return UNKNOWN
        if value.values:
            return Range(min(value.values), max(value.values))
        key = id(value), axis
        if key not in self._ranges:
            self._depth += 1
            self._ranges[key] = value.kind.values(self.range_of, value, axis)
            self._depth -= 1
        return self._ranges[key]
