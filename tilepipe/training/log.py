"""What a training tells of itself: a table, events for TensorBoard, and calls of the caller's."""

from __future__ import annotations

import csv
import math
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch.utils.tensorboard import SummaryWriter

    from tilepipe.training.meter import TrainReport

COLUMNS = (
    "step", "seconds", "loss", "lr", "patches_per_second", "waited", "bytes_per_patch",
    "error", "mean_dice", "mean_iou", "best",
)  # fmt: skip


class TrainLog:
    """Tells every report: a row of ``log.csv``, TensorBoard's events, and a call of ``progress``.

    Rows of an earlier run are kept, but for those of steps that are taken again. Of several
    processes only the first writes (``write``) and tells.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        *,
        write: bool,
        tensorboard: bool,
        progress: Callable[[TrainReport], None] | None,
    ) -> None:
        self._board: SummaryWriter | None = None
        self._progress = progress
        self._path = folder / "log.csv" if write else None
        if self._path is None:
            return
        rows = []
        if step and self._path.exists():
            with self._path.open(newline="") as file:
                rows = [row for row in csv.DictReader(file) if _is_before(row, step)]
        self._file = self._path.open("w", newline="")
        self._rows = csv.DictWriter(self._file, COLUMNS)
        self._rows.writeheader()
        self._rows.writerows(rows)
        self._file.flush()
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(folder / "tensorboard", purge_step=step)

    def write(self, report: TrainReport) -> TrainReport:
        """Tell a report, and return it."""
        if self._path is None:
            return report
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
        if self._progress is not None:
            self._progress(report)
        return report

    def close(self) -> None:
        """Close the files."""
        if self._path is not None:
            self._file.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard() -> None:
    """Refuse to write a log for TensorBoard where TensorBoard is not installed."""
    if find_spec("tensorboard") is None:
        raise BadRequest(
            "tensorboard is not installed; pip install 'tilepipe[tensorboard]', or leave it out"
        )


def _is_before(row: dict[str, str], step: int) -> bool:
    """Return whether a row is whole and of a step that is not taken again."""
    return None not in row.values() and row["step"].isdigit() and int(row["step"]) <= step


def _short(value: float | None) -> str:
    return "" if value is None or value != value else f"{value:.7g}"
