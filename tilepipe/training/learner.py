"""The network while it learns: weights, optimizer, and the state to go on from."""

from __future__ import annotations

import contextlib
import math
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from tilepipe.errors import BadRequest
from tilepipe.models.checkpoint import save_whole
from tilepipe.models.heads import tensors_of
from tilepipe.training.losses import LOSSES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor

    from tilepipe.training.experiment import Experiment
    from tilepipe.training.loader import PatchBatch
    from tilepipe.training.ranks import Team
    from tilepipe.training.recipe import Recipe

PRECISIONS = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
FREE = ("steps", "minutes", "patience", "loaders", "device")
"""Fields of the recipe that may change when a training goes on."""


@dataclass(slots=True)
class State:
    """How far a training is: all that is not in the weights and the optimizer."""

    step: int = 0
    seconds: float = 0.0
    best: float | None = None
    """The best of `Score.good` so far."""
    worse: int = 0
    """Validations since the best one."""


class Learner:
    """Takes the steps of a training; its random numbers follow from the seed and the step alone."""

    def __init__(self, experiment: Experiment, team: Team) -> None:
        recipe, device = experiment.recipe, team.device
        self.experiment, self.team = experiment, team
        self._recipe, self._device = recipe, device
        self.network = experiment.network.to(device).train()
        if experiment.profile.axes == 2:
            self.network = self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.state = State()
        self._averaged = (
            AveragedModel(
                self.network, multi_avg_fn=get_ema_multi_avg_fn(recipe.average), use_buffers=True
            )
            if recipe.average
            else None
        )
        self._optimizer = _optimizer(self.network, recipe)
        self._scaler = torch.amp.GradScaler(device.type, enabled=recipe.precision == "float16")
        self._run = self.network
        if team.ranks > 1:
            places = [device.index] if device.type == "cuda" else None
            self._run = nn.parallel.DistributedDataParallel(
                self.network, device_ids=places, find_unused_parameters=recipe.network is not None
            )
        if recipe.compile:
            self._run = cast("nn.Module", torch.compile(self._run))
        self._loss = LOSSES[recipe.loss_name]
        frame = experiment.frame
        inner = [slice(s, s + n) for s, n in zip(frame.skip, frame.answer, strict=True)]
        self._inner = (slice(None), slice(None), *inner)

    @property
    def trained(self) -> nn.Module:
        """The network whose weights are saved: the running mean where there is one."""
        return self.network if self._averaged is None else self._averaged.module

    def step(self, batches: Iterator[PatchBatch], lr: float) -> Tensor:
        """Learn from the next batches; return the loss, on the device."""
        recipe = self._recipe
        torch.manual_seed(
            (recipe.seed * 1_000_003 + self.state.step) * self.team.ranks + self.team.rank
        )
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self._device)
        for turn in range(recipe.accumulate):
            last = turn == recipe.accumulate - 1
            with contextlib.nullcontext() if last else self._unsynchronised():
                loss = self._forward(next(batches)) / recipe.accumulate
                self._scaler.scale(loss).backward()
            total += loss.detach()
        if recipe.clip:
            self._scaler.unscale_(self._optimizer)
            clip_grad_norm_(self.network.parameters(), recipe.clip)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._averaged is not None:
            self._averaged.update_parameters(self.network)
        self.state.step += 1
        return total

    def _forward(self, batch: PatchBatch) -> Tensor:
        image_BCS, truth_BS, weights_BS = (self._send(part) for part in batch)
        if self.experiment.profile.axes == 2:
            image_BCS = image_BCS.contiguous(memory_format=torch.channels_last)
        kind = PRECISIONS[self._recipe.precision]
        with torch.autocast(self._device.type, kind, enabled=kind != torch.float32):
            logits_BCS = tensors_of(self._run(image_BCS))[0]
        return self._loss(logits_BCS[self._inner], truth_BS, weights=weights_BS)

    def predict(self, image_BCS: Tensor) -> Tensor:
        """Return what the saved weights answer for a batch of patches, on the CPU."""
        trained = self.trained.eval()
        with torch.inference_mode():
            answer = tensors_of(trained(self._send(image_BCS)))[0][self._inner].float().cpu()
        self.network.train()
        return answer

    def use_threads(self, count: int) -> None:
        """Compute with ``count`` threads on a CPU from now on."""
        if self._device.type == "cpu":
            torch.set_num_threads(count)

    def _send(self, part: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return part
        return part.pin_memory().to(self._device, non_blocking=True)

    def _unsynchronised(self) -> contextlib.AbstractContextManager[object]:
        """Keep the processes from adding up gradients that are not complete."""
        run = self._run
        return run.no_sync() if hasattr(run, "no_sync") else contextlib.nullcontext()  # type: ignore[operator]

    def save(self, path: Path) -> None:
        """Write all that a training needs to go on; whole or not at all."""
        content = {
            "recipe": self._recipe.asdict(),
            "sources": list(self.experiment.sources),
            "state": asdict(self.state),
            "network": self.network.state_dict(),
            "averaged": None if self._averaged is None else self._averaged.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
        }
        save_whole(path, content)

    def load(self, path: Path) -> None:
        """Go on from a state that was saved."""
        saved = read_state(path)
        try:
            self.network.load_state_dict(saved["network"])
            if self._averaged is not None:
                self._averaged.load_state_dict(saved["averaged"])
            self._optimizer.load_state_dict(saved["optimizer"])
        except (RuntimeError, ValueError) as error:  # the code of one's own network has changed
            raise BadRequest(
                f"resume: {path} does not fit the network: {' '.join(str(error).split()):.200};"
                " begin anew with --overwrite"
            ) from error
        self._scaler.load_state_dict(saved["scaler"])
        self.state = State(**saved["state"])  # type: ignore[arg-type]


def read_state(path: Path) -> dict[str, dict[str, object]]:
    """Return what `Learner.save` wrote, without running anything it says."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise BadRequest(f"resume: {path} does not exist; begin without --resume") from None
    except Exception as error:  # whatever damage does
        raise BadRequest(f"resume: {path} cannot be read: {type(error).__name__}") from error
    parts = {"recipe", "sources", "state", "network", "averaged", "optimizer", "scaler"}
    if not isinstance(state, dict) or not parts <= state.keys():
        raise BadRequest(f"resume: {path} is no state of a training; begin anew with --overwrite")
    return cast("dict[str, dict[str, object]]", state)


def check_recipe(path: Path, recipe: Recipe) -> None:
    """Refuse to go on with another recipe than the one that a training began with."""
    earlier = read_state(path)["recipe"]
    for name, value in recipe.asdict().items():
        if name not in FREE and earlier.get(name) != value:
            raise BadRequest(
                f"{name} (={value}) must be {earlier.get(name)}, as this training began;"
                " or begin anew with --overwrite"
            )


def check_sources(path: Path, sources: Sequence[str]) -> None:
    """Refuse to go on with other volumes than those that a training began with."""
    earlier = cast("list[str]", read_state(path)["sources"])
    for source, before in zip_longest(sources, earlier, fillvalue="none"):
        if source != before:
            raise BadRequest(
                f"volumes (={source}) must be {before}, as this training began; or begin anew with"
                " --overwrite"
            )


def rate(recipe: Recipe, done: float) -> float:
    """Return the learning rate when a share of the training is done: up, then down as a cosine."""
    if done < recipe.warmup:
        return recipe.highest_lr * max(done, 1e-3) / recipe.warmup
    if recipe.schedule == "constant":
        return recipe.highest_lr
    after = (done - recipe.warmup) / (1 - recipe.warmup)
    return recipe.highest_lr * (1 + math.cos(math.pi * min(after, 1.0))) / 2


def _optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the optimizer: AdamW, or SGD with the paper's momentum."""
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(
            network.parameters(), lr=0.0, momentum=0.99, weight_decay=recipe.weight_decay
        )
    return torch.optim.AdamW(network.parameters(), lr=0.0, weight_decay=recipe.weight_decay)
