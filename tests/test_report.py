"""What the workflows end with."""

from __future__ import annotations

import numpy as np
import pytest

from workflows.report import one_of


@pytest.mark.parametrize("dtype", ["uint8", "int64", "uint64"])
@pytest.mark.parametrize(
    "labels", [(1,), (1, 7), (5, 2**60 + 1), (1, 2**63 + 5), (2**63 + 5,), (-1,)]
)
def test_labels_are_told_apart_to_the_last_bit(dtype: str, labels: tuple[int, ...]) -> None:
    limits = np.iinfo(dtype)
    numbers = [n + k for n in (0, 2, 2**60, 2**63) for k in range(8)]
    values = np.array([n for n in numbers if n <= limits.max], dtype)
    found = one_of(values, labels)
    assert found.dtype == bool
    assert found.tolist() == [value in labels for value in values.tolist()]
