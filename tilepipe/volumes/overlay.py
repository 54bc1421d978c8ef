"""Pictures that show what was found, and one number that says how well."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Image = NDArray[Any]

FOUND = (70, 230, 120)
"""Green: the prediction, where there is no truth or the truth agrees."""
WRONG = (255, 80, 60)
"""Red: predicted, but not in the truth."""
MISSED = (80, 140, 255)
"""Blue: in the truth, but not predicted."""
GAP = 8
"""White columns between the image and the overlay."""


def write_overlay(
    path: str | Path, image: Image, labels: Image, truth: Image | None = None
) -> None:
    """Write a PNG: the grey image on the left, the same with the prediction on the right.

    ``image``, ``labels`` and ``truth`` have one shape, ``y x``; of ``z y x`` the middle plane is
    shown. Labels are 0 for the background, else a class or the number of an instance; each is
    tinted and outlined. With the truth, what it lacks is red and what it has more is blue.
    BadRequest where the shapes differ. The picture is as large as the image: crop it first.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     write_overlay(f"{folder}/a.png", np.eye(5), np.eye(5, dtype=int))
    """
    import imagecodecs

    for name, other in (("labels", labels), ("truth", truth)):
        if other is not None and other.shape != image.shape:
            raise BadRequest(f"{name} (={other.shape}) must have the image's shape {image.shape}")
    if image.ndim not in (2, 3) or image.size == 0:
        raise BadRequest(f"image (={image.shape}) must have axes y,x or z,y,x; give one channel")
    if image.ndim == 3:
        middle = image.shape[0] // 2
        image, labels = image[middle], labels[middle]
        truth = None if truth is None else truth[middle]
    grey = np.repeat(stretch(image)[:, :, None], 3, axis=2)
    gap = np.full((len(grey), GAP, 3), 255, np.uint8)
    picture = np.concatenate((grey, gap, paint(grey, labels, truth)), axis=1)
    Path(path).write_bytes(imagecodecs.png_encode(picture))


def dice(prediction: Image, truth: Image) -> float:
    """Return the Dice coefficient of two masks, 0 to 1; two empty masks agree.

    >>> dice(np.array([True, True, False]), np.array([True, False, False]))
    0.6666666666666666
    >>> dice(np.zeros(3, bool), np.zeros(3, bool))
    1.0
    """
    prediction, truth = prediction.astype(bool), truth.astype(bool)
    both = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / both if both else 1.0


def stretch(image: Image) -> NDArray[np.uint8]:
    """Return the image as grey values, its 0.5 % darkest black and its 0.2 % brightest white.

    What is not finite does not count, and NaN is black.

    >>> stretch(np.array([[0.0, 5.0, 10.0]]))[0].tolist()
    [0, 127, 255]
    """
    wide = image.astype(np.float64)
    finite = wide[np.isfinite(wide)]
    low, high = np.percentile(finite, (0.5, 99.8)) if finite.size else (0.0, 1.0)
    if finite.size and not high > low:  # nearly all is background
        low, high = finite.min(), finite.max()
    span = high / 2 - low / 2  # halves: their differences cannot overflow
    if not span > 0:
        return np.zeros(image.shape, np.uint8)
    shares = np.nan_to_num(np.clip((wide / 2 - low / 2) / span, 0, 1))
    grey: NDArray[np.uint8] = (shares * 255).astype(np.uint8)
    return grey


def paint(grey: NDArray[np.uint8], labels: Image, truth: Image | None) -> NDArray[np.uint8]:
    """Return the picture ``y x rgb`` with labels tinted and outlined, errors in their colours."""
    labelled = labels != 0
    true = labelled if truth is None else truth != 0
    picture = grey.astype(np.float32)
    for mask, colour, strength in (
        (labelled & true, FOUND, 0.25),
        (labelled & ~true, WRONG, 0.75),
        (true & ~labelled, MISSED, 0.75),
        (outline(labels) & true, FOUND, 0.9),
    ):
        picture[mask] += strength * (np.array(colour, np.float32) - picture[mask])
    return picture.astype(np.uint8)


def outline(labels: Image) -> NDArray[np.bool_]:
    """Return the labelled voxels of which one of the four neighbours has another label.

    >>> outline(np.array([[0, 1, 1, 1, 2, 0]])).astype(int).tolist()
    [[0, 1, 0, 1, 1, 0]]
    """
    edge: NDArray[np.bool_] = np.zeros(labels.shape, bool)
    rows = labels[1:] != labels[:-1]
    columns = labels[:, 1:] != labels[:, :-1]
    edge[1:] |= rows
    edge[:-1] |= rows
    edge[:, 1:] |= columns
    edge[:, :-1] |= columns
    edge &= labels != 0
    return edge
