"""What a training leaves for people to look at: a table, TensorBoard's events, and pictures."""

from __future__ import annotations

import csv
import math
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

    from tilepipe.training.validate import Score

    pass

COLUMNS = (
    "step", "seconds", "loss", "lr", "patches_per_second", "waited", "bytes_per_patch",
    "error", "mean_dice", "mean_iou", "best",
)  # fmt: skip


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


@dataclass(frozen=True, slots=True)
class Progress:
    """How a training goes."""

    step: int
    done: float
    """Share of the steps, or of the minutes, whichever is nearer its end."""
    seconds: float
    """Of this run and of those before it."""
    loss: float
    """Mean since the last report."""
    lr: float
    patches_per_second: float
    waited: float
    """Share of the time in which the loop waited for patches."""
    bytes_per_patch: float
    """Bytes decoded from storage in this run, for each of its patches."""
    best: float | None
    """The best of `Score.good` so far."""
    score: Score | None = None
    """Of a validation, where this reports one."""

    @property
    def left(self) -> float:
        """Seconds until the end, as it goes."""
        return self.seconds * (1 - self.done) / max(self.done, 1e-9)
