"""A picture of patches, weights and answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from tilepipe.training.targets import IGNORE
from tilepipe.volumes.overlay import stretch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from tilepipe.training.patches import Frame


COLOURS = np.array(
    [(30, 30, 40), (70, 200, 120), (230, 120, 60), (90, 140, 255), (220, 80, 200), (240, 220, 90)],
    np.uint8,
)
"""The colours of the classes; further classes take them again from the first."""

SHOWN = 6
"""Patches in a picture, at most."""


def write_preview(
    path: Path,
    image: NDArray[np.float32],
    truth: NDArray[np.generic],
    weights: NDArray[np.float32],
    answer: NDArray[np.float32],
    frame: Frame,
) -> None:
    """Write a PNG with a row for each patch: what is read, the truth, the weights, the answer.

    ``image`` is ``(B, C, *read)``; the others have the answer's size, ``truth`` ``(B, *S)`` of
    classes or ``(B, K, *S)`` of values, ``answer`` ``(B, K, *S)``. Of volumes the middle plane is
    shown. What the network reads beyond its answer is drawn darker.
    """
    import imagecodecs

    rows = []
    for number in range(min(SHOWN, len(image))):
        seen = _plane(image[number][:3], frame.before, frame.answer)
        classes = truth.ndim == image.ndim - 1
        rows.append(
            np.concatenate(
                [
                    _context(seen, frame),
                    *(
                        _padded(part, seen.shape[:2])
                        for part in (
                            _classes(_plane(truth[number])) if classes else _grey(truth[number]),
                            _heat(_plane(weights[number])),
                            _answer(answer[number]) if classes else _grey(answer[number]),
                        )
                    ),
                ],
                axis=1,
            )
        )
    path.write_bytes(imagecodecs.png_encode(np.ascontiguousarray(np.concatenate(rows))))


def _plane(
    array: NDArray[np.generic], before: tuple[int, ...] = (), answer: tuple[int, ...] = ()
) -> NDArray[np.generic]:
    """Return the plane in the middle of the answer; of an image its channels are the last axis."""
    flat = array
    spatial = len(answer) or array.ndim
    if spatial == 3:
        middle = before[0] + answer[0] // 2 if answer else array.shape[-3] // 2
        flat = array[..., middle, :, :]
    return np.moveaxis(flat, 0, -1) if answer else flat


def _context(seen: NDArray[np.generic], frame: Frame) -> NDArray[np.uint8]:
    """Return the image in colours, darker where nothing is answered for."""
    grey = stretch(seen)
    if grey.shape[-1] != 3:
        grey = np.repeat(grey[..., :1], 3, axis=-1)
    dark = (grey * 0.5).astype(np.uint8)
    (y, x), (height, width) = frame.before[-2:], frame.answer[-2:]
    inner = (slice(y, y + height), slice(x, x + width))
    dark[inner] = grey[inner]
    return dark


def _padded(picture: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Return a picture in the middle of a black one."""
    canvas = np.zeros((*shape, 3), np.uint8)
    top, left = ((a - b) // 2 for a, b in zip(shape, picture.shape, strict=False))
    canvas[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return canvas


def _classes(truth: NDArray[np.generic]) -> NDArray[np.uint8]:
    painted: NDArray[np.uint8] = COLOURS[truth.astype(np.int64) % len(COLOURS)]
    painted[truth == IGNORE] = 128
    return painted


def _answer(answer: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return the class that is answered for each voxel."""
    classes = answer.argmax(axis=0) if len(answer) > 1 else (answer[0] > 0).astype(np.int64)
    return _classes(_plane(classes))


def _heat(weights: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return weights from black to yellow, by their root."""
    share = np.sqrt(weights.astype(np.float64) / max(float(weights.max()), 1e-12))
    painted = np.stack([255 * share, 200 * share**2, 60 * share], axis=-1)
    return painted.astype(np.uint8)


def _grey(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the first channel of values."""
    plane = np.nan_to_num(_plane(values[0]))
    return np.repeat(stretch(plane)[..., None], 3, axis=-1)
