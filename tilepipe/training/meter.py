"""How a training goes: what is measured from one report to the next, and the reports."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest

if TYPE_CHECKING:
    from torch import Tensor

    from tilepipe.training.learner import Learner
    from tilepipe.training.loader import Loader
    from tilepipe.training.validate import Score


@dataclass(frozen=True, slots=True)
class TrainReport:
    """How a training goes."""

    step: int
    """Steps taken, in this run and in those before it."""
    done: float
    """Share of the steps, or of the minutes, whichever is nearer its end."""
    seconds: float
    """Seconds that this run and those before it took."""
    loss: float
    """Mean loss of the steps since the last report; nan where there were none."""
    lr: float
    """Learning rate of the last step."""
    patches_per_second: float
    """Patches of all processes since the last report; nan where there were no steps."""
    waited: float
    """Share of the time since the last report in which the loop waited for patches."""
    bytes_per_patch: float
    """Bytes decoded from storage in this run, for each of its patches."""
    best: float | None
    """The best of `Score.good` so far."""
    score: Score | None = None
    """The score of a validation, where this reports one."""

    @property
    def left(self) -> float:
        """Seconds until the end, if the training goes on as fast as until now."""
        return self.seconds * (1 - self.done) / max(self.done, 1e-9)


class Meter:
    """Measures a training from one report to the next: its rate, its waiting, its mean loss."""

    def __init__(self, learner: Learner, loader: Loader) -> None:
        self._experiment, self._state, self._loader = learner.experiment, learner.state, loader
        recipe = self._experiment.recipe
        self._patches_per_step = recipe.batch * recipe.accumulate
        self._ranks = learner.team.ranks
        self._begun = time.perf_counter() - self._state.seconds
        """When the training would have begun, had it never been interrupted."""
        self._first_step, self._first_bytes = self._state.step, self._experiment.cache.bytes_read
        self._lr = 0.0
        self._losses: list[Tensor] = []
        self._restart(time.perf_counter())

    def add(self, loss: Tensor, lr: float) -> None:
        """Count a step that was taken with the learning rate ``lr``; the loss stays where it is."""
        self._losses.append(loss)
        self._lr = lr
        self._state.seconds = time.perf_counter() - self._begun

    def mean_loss(self) -> float:
        """Return the mean of the losses since the last report; nan where there are none.

        Raises BadRequest for a loss that is not finite, which ends a training.
        """
        loss = float(torch.stack(self._losses).mean()) if self._losses else math.nan
        if self._losses and not math.isfinite(loss):
            raise BadRequest(
                f"the loss became {loss} at step {self._state.step}; take a smaller --lr than"
                f" {self._experiment.recipe.highest_lr:g}, or --clip, and look at the patches with"
                " --preview; the output is the best checkpoint until then"
            )
        return loss

    def report(self, done: float, score: Score | None = None) -> TrainReport:
        """Return how the training went since the last report, and begin to measure anew.

        ``done`` is the share of the training that is done, ``score`` that of a validation.
        """
        now, state = time.perf_counter(), self._state
        state.seconds = now - self._begun
        loss = self.mean_loss()
        span = max(now - self._since, 1e-9) if self._losses else math.nan
        patches = (state.step - self._last_step) * self._patches_per_step * self._ranks
        decoded = self._experiment.cache.bytes_read - self._first_bytes
        report = TrainReport(
            step=state.step,
            done=done,
            seconds=state.seconds,
            loss=loss,
            lr=self._lr,
            patches_per_second=patches / span,
            waited=(self._loader.waited - self._last_waited) / span,
            bytes_per_patch=decoded
            / max(1, (state.step - self._first_step) * self._patches_per_step),
            best=state.best,
            score=score,
        )
        self._restart(now)
        return report

    def _restart(self, now: float) -> None:
        """Measure from now on, and from the next step."""
        self._since, self._last_step = now, self._state.step
        self._last_waited = self._loader.waited
        self._losses.clear()
