"""The story of ``tilepipe train``: prepare, then step after step: patches, loss, log, validation.

Beside the checkpoint ``unet.pt`` lies ``unet.pt.training``: the last checkpoint and the state to
go on from, the log, pictures, and the held-out images.
"""

from __future__ import annotations

import logging
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed, seeded
from tilepipe.storage.objects import local_path
from tilepipe.training.dataset import open_dataset
from tilepipe.training.experiment import cores, prepare
from tilepipe.training.folder import MARK, SUFFIX, begin, check_places, owned
from tilepipe.training.interrupt import stopping
from tilepipe.training.learner import Learner, check_sources, rate
from tilepipe.training.loader import Loader
from tilepipe.training.log import TrainLog, check_tensorboard
from tilepipe.training.meter import Meter
from tilepipe.training.preview import write_preview
from tilepipe.training.ranks import is_first, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tilepipe.training.experiment import Experiment
    from tilepipe.training.interrupt import Stop
    from tilepipe.training.meter import TrainReport
    from tilepipe.training.preparation import Scan
    from tilepipe.training.recipe import Recipe
    from tilepipe.training.validate import Score

logger = logging.getLogger(__name__)

LOG_EVERY = 10
"""Steps between two rows of the log."""
VALIDATIONS = 20
"""Validations of a training that does not say how many."""


@borrowed()
@seeded()
def train(
    pairs: Sequence[tuple[str, str]],
    *,
    output: str | Path,
    recipe: Recipe,
    apart: Sequence[tuple[str, str]] = (),
    masks: Sequence[str] = (),
    resume: bool = False,
    overwrite: bool = False,
    folder: str | Path | None = None,
    preview: str | Path | None = None,
    tensorboard: bool = False,
    prepared: Callable[[Experiment], None] | None = None,
    scanned: Scan | None = None,
    progress: Callable[[TrainReport], None] | None = None,
) -> TrainReport:
    """Train a network on pairs of image and labels, and keep the best checkpoint.

    An interrupt saves the state after the step that is being taken, and raises KeyboardInterrupt.

    Args:
        pairs: The paths of images, each with the path of its labels. Labels have the image's shape
            without channels; their axes are ``z y x`` or ``y x``.
        output: Where the checkpoint is written that is best on what is held out.
        recipe: What is trained, and how. Sizes of patches are voxels along the network's axes.
        apart: Pairs that are held out as a whole.
        masks: The paths of masks, one for each pair, which are 0 where its labels say nothing.
        resume: Whether an earlier run of the same recipe goes on. On a CPU it comes to the very
            weights of an unbroken run, if the steps decide its end and not the minutes.
        overwrite: Whether an earlier training at ``output`` is removed first.
        folder: Where the state, the table and the last checkpoint are kept; by default
            ``OUTPUT.training``.
        preview: The path of a picture (``.png``) of patches, truth, weights and answers, which is
            written anew at every validation.
        tensorboard: Whether the table is written for TensorBoard, too.
        prepared: Is called with what will be done, before the first step.
        scanned: Is called with what is being read before the training, and how far that is.
        progress: Is called with how the training goes.

    Returns:
        How the training went when it ended: steps, losses, and the score of the best checkpoint.

    Raises:
        BadRequest: What is asked for cannot work, which is found before the first step; or the loss
            is no longer finite, or storage or memory fails.
    """
    output = local_path(output, "output")
    folder = Path(f"{output}{SUFFIX}" if folder is None else folder)
    preview = None if preview is None else Path(preview)
    if tensorboard:
        check_tensorboard()
    if (
        resume
        and (folder / MARK).is_file()
        and not any(path.exists() for path in (output, folder / "state.pt"))
    ):
        logger.info("the training was stopped before there was a state: it begins anew")
        resume = False
    if is_first():
        check_places(output, folder, recipe, resume=resume, overwrite=overwrite)
        if preview is not None and not (preview.suffix == ".png" and preview.parent.is_dir()):
            raise BadRequest(f"preview (={preview}) must be a .png in a folder that exists")
    dataset = open_dataset(pairs, apart, recipe, masks=masks)
    if resume:
        check_sources(folder / "state.pt", dataset.sources)
    with _failures_in_a_line(), joined(recipe.device) as team, owned(folder, team):
        if not team.first:
            team.wait()  # for what the first one leaves in the folder
        elif not resume:
            begin(folder)
        experiment = prepare(
            dataset, recipe, folder, resume=resume, first=team.first, scanned=scanned
        )
        if team.first:
            team.wait()
        learner = Learner(experiment, team)
        if resume:
            learner.load(folder / "state.pt")
        if prepared is not None and team.first:
            prepared(experiment)
        log = TrainLog(
            folder, learner.state.step, write=team.first, tensorboard=tensorboard, progress=progress
        )
        loader = Loader(experiment.patches, team, batch=recipe.batch, workers=recipe.loaders)
        with stopping() as stop, closing(log), closing(loader):
            return _loop(learner, loader, log, stop, output, preview)


def _loop(
    learner: Learner,
    loader: Loader,
    log: TrainLog,
    stop: Stop,
    output: Path,
    preview: Path | None,
) -> TrainReport:
    """Take step after step until the training is done; log and validate now and then."""
    recipe, state, team = learner.experiment.recipe, learner.state, learner.team
    batches = loader.batches(state.step * recipe.accumulate)
    meter, report = Meter(learner, loader), None
    done = _share_done(recipe, state.step, state.seconds)
    if state.step == 0:  # what cannot work is known before the first step
        report = log.write(meter.report(done, _validate(learner, loader, output, preview)))
    learner.use_threads(cores(recipe))
    while done < 1 and not _is_out_of_patience(learner):
        lr = rate(recipe, _share_done(recipe, state.step + 1, state.seconds))
        meter.add(learner.step(batches, lr), lr)
        before, share = done, _share_done(recipe, state.step, state.seconds)
        done, interrupted = team.agree(share, stop.requested)
        due = _is_validation_due(recipe, state.step, before, done)
        if due or state.step % LOG_EVERY == 0:
            report = log.write(meter.report(done))
        if due:
            report = log.write(meter.report(done, _validate(learner, loader, output, preview)))
        if interrupted:
            meter.mean_loss()  # a loss that is not finite is not saved
            if team.first:
                learner.save(learner.experiment.folder / "state.pt")
            raise KeyboardInterrupt("interrupted; run the same command with --resume to go on")
    return report or log.write(meter.report(done))


def _validate(learner: Learner, loader: Loader, output: Path, preview: Path | None) -> Score | None:
    """Save the last checkpoint, score it on what is held out, and keep it where it is the best.

    The first process does it alone. Returns None where nothing is held out.
    """
    if not learner.team.first:
        return None
    experiment, state = learner.experiment, learner.state
    last = experiment.folder / "last.pt"
    measured: dict[str, object] = {"step": state.step, "seconds": round(state.seconds)}
    experiment.save(last, learner.trained, measured)
    score = experiment.validate(last) if experiment.held_out else None
    if score is None or state.best is None or score.good > state.best:
        state.best, state.worse = (score.good if score else None), 0
        if score is not None:
            measured |= {"held_out": asdict(score)}
        experiment.save(output, learner.trained, measured)
    else:
        state.worse += 1
    if preview is not None:
        image, truth, weights = loader.batch(0)
        answer = learner.predict(image).numpy()
        parts = (image.numpy(), truth.numpy(), weights.numpy(), answer)
        write_preview(preview, *parts, experiment.frame)
    learner.save(experiment.folder / "state.pt")
    learner.use_threads(cores(experiment.recipe))  # a validation takes as many as it likes
    return score


def _share_done(recipe: Recipe, step: int, seconds: float) -> float:
    """Return the share of a training that is done, 0 to 1."""
    by_steps = step / recipe.steps if recipe.steps else 0.0
    by_time = seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def _is_validation_due(recipe: Recipe, step: int, before: float, done: float) -> bool:
    """Return whether a step ends with a validation, which took a training from share to share."""
    if recipe.validate_every and done < 1:
        return step % recipe.validate_every == 0
    return done >= 1 or int(done * VALIDATIONS) > int(before * VALIDATIONS)


def _is_out_of_patience(learner: Learner) -> bool:
    """Return whether too many validations in a row were no better; all processes agree."""
    patience = learner.experiment.recipe.patience
    return patience is not None and learner.team.agree(learner.state.worse)[0] >= patience


@contextmanager
def _failures_in_a_line() -> Iterator[None]:
    """Turn failures of storage, and memory that does not suffice, into what a user can mend."""
    try:
        yield
    except OSError as error:
        raise BadRequest(f"the training cannot go on: {error}") from error
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not short and "can't allocate memory" not in str(error):
            raise
        raise BadRequest(
            "memory does not suffice; take a smaller --batch (and --accumulate more), --patch,"
            " --base or --depth, or --precision bfloat16"
        ) from error
