"""What a training leaves for people to look at: a table, TensorBoard's events, and pictures."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

import numpy as np

from tilepipe.errors import BadRequest
from tilepipe.training.targets import IGNORE
from tilepipe.volumes.overlay import stretch

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray
    from torch.utils.tensorboard import SummaryWriter

    from tilepipe.training.patches import Frame
    from tilepipe.training.train import Progress

COLUMNS = (
    "step", "seconds", "loss", "lr", "patches_per_second", "waited", "bytes_per_patch",
    "error", "mean_dice", "mean_iou", "best",
)  # fmt: skip
COLOURS = np.array(
    [(30, 30, 40), (70, 200, 120), (230, 120, 60), (90, 140, 255), (220, 80, 200), (240, 220, 90)],
    np.uint8,
)
"""Of the classes, over and over."""
SHOWN = 6
"""Patches in a picture, at most."""


class TrainLog:
    """``log.csv``, a row now and then; rows of steps that are done anew are taken out."""

    def __init__(self, folder: Path, step: int, *, write: bool, tensorboard: bool) -> None:
        self._board: SummaryWriter | None = None
        self._path = folder / "log.csv" if write else None
        if self._path is None:
            return
        kept = []
        if step and self._path.exists():
            with self._path.open(newline="") as file:
                kept = [row for row in csv.DictReader(file) if _is_before(row, step)]
        self._file = self._path.open("w", newline="")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._rows.writeheader()
        self._rows.writerows(kept)
        self._file.flush()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(self, report: Progress) -> None:
        """Add a row."""
        if self._path is None:
            return
        row: dict[str, float | None] = {
            name: getattr(report, name) for name in COLUMNS if hasattr(report, name)
        }
        if report.score is not None:
            row |= {"error": report.score.error, "mean_iou": report.score.mean_iou}
            row["mean_dice"] = report.score.good if report.score.dice else math.nan
        self._rows.writerow({name: _short(value) for name, value in row.items()})
        self._file.flush()
        if self._board is not None:
            for name, value in row.items():
                if name != "step" and value is not None and value == value:
                    self._board.add_scalar(name, value, report.step)

    def close(self) -> None:
        """Close the files."""
        if self._path is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard() -> None:
    """Refuse to begin where TensorBoard is asked for and not there."""
    if find_spec("tensorboard") is None:
        raise BadRequest(
            "tensorboard is not installed; pip install 'tilepipe[tensorboard]', or leave it out"
        )


def _is_before(row: dict[str, str], step: int) -> bool:
    """Whether a row is whole and of a step that is not done anew."""
    return None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step


def _short(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.7g}"


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
    found = answer.argmax(axis=0) if len(answer) > 1 else (answer[0] > 0).astype(np.int64)
    return _classes(_plane(found))


def _heat(weights: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return weights from black to yellow, by their root."""
    share = np.sqrt(weights.astype(np.float64) / max(float(weights.max()), 1e-12))
    painted = np.stack([255 * share, 200 * share**2, 60 * share], axis=-1)
    return painted.astype(np.uint8)


def _grey(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Return the first channel of values."""
    plane = np.nan_to_num(_plane(values[0]))
    return np.repeat(stretch(plane)[..., None], 3, axis=-1)
