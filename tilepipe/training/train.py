"""The story of ``tilepipe train``: prepare, then step after step: patches, loss, log, validation.

Beside the checkpoint ``unet.pt`` lies ``unet.pt.training``: the last checkpoint and the state to
go on from, the log, pictures, and the held-out images.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed, seeded
from tilepipe.runs.lease import Claim, Owner
from tilepipe.storage.contents import FILES
from tilepipe.storage.objects import local_path
from tilepipe.training.dataset import open_material
from tilepipe.training.experiment import cores, prepare
from tilepipe.training.interrupt import stopping
from tilepipe.training.learner import Learner, check_recipe, check_sources, rate
from tilepipe.training.loader import Loader
from tilepipe.training.log import Progress, TrainLog, check_tensorboard
from tilepipe.training.preview import write_preview
from tilepipe.training.ranks import is_first, joined

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from tilepipe.training.dataset import Scan
    from tilepipe.training.experiment import Study
    from tilepipe.training.interrupt import Stop
    from tilepipe.training.ranks import Team
    from tilepipe.training.recipe import Recipe
    from tilepipe.training.validate import Score

logger = logging.getLogger(__name__)

TOLD = 10
"""Steps between two rows of the log."""
VALIDATIONS = 20
"""Validations of a training that does not say how many."""
LEFT = (
    *("log.csv", "state.pt", "last.pt", "tensorboard", "held-out-*.zarr", "objects-*.zarr"),
    *("counts.npy", "grey-*.json"),
    *("objects-*.partial", "state.pt.*.partial", "last.pt.*.partial"),
)
"""What a training leaves in its folder."""
SUFFIX, MARK = ".training", ".tilepipe-training"
"""How the folder's name ends that a training chooses; a file in it, whatever it is called."""


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
    prepared: Callable[[Study], None] | None = None,
    scanned: Scan | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> Progress:
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
        _check_place(output, folder, recipe, resume=resume, overwrite=overwrite)
        if preview is not None and not (preview.suffix == ".png" and preview.parent.is_dir()):
            raise BadRequest(f"preview (={preview}) must be a .png in a folder that exists")
    material = open_material(pairs, apart, recipe, masks=masks)
    if resume:
        check_sources(folder / "state.pt", material.sources)
    with _told_in_a_line(), joined(recipe.device) as team, _owned(folder, team):
        if not team.first:
            team.wait()  # for what the first one leaves in the folder
        elif not resume:
            _begin(folder)
        study = prepare(material, recipe, folder, resume=resume, first=team.first, scanned=scanned)
        if team.first:
            team.wait()
        learner = Learner(study, team)
        if resume:
            learner.load(folder / "state.pt")
        if prepared is not None and team.first:
            prepared(study)
        board = TrainLog(folder, learner.state.step, write=team.first, tensorboard=tensorboard)
        ahead = Loader(study.patches, team, batch=recipe.batch, workers=recipe.loaders)
        with stopping() as stop, closing(board) as log, closing(ahead) as loader:
            return _loop(study, learner, loader, log, stop, team, output, preview, progress)


def _loop(
    study: Study,
    learner: Learner,
    loader: Loader,
    log: TrainLog,
    stop: Stop,
    team: Team,
    output: Path,
    preview: Path | None,
    progress: Callable[[Progress], None] | None,
) -> Progress:
    recipe, state, folder = study.recipe, learner.state, study.folder
    batches = loader.batches(state.step * recipe.accumulate)
    per_step = recipe.batch * recipe.accumulate * team.ranks
    begun, earlier, begun_step = time.perf_counter(), state.seconds, state.step
    done, lr, report = _done(recipe, state.step, earlier), 0.0, None
    losses: list[torch.Tensor] = []
    read_before = study.cache.bytes_read
    told, told_at, waited = state.step, begun, 0.0

    def validation() -> Score | None:
        """Save the last checkpoint, validate it, and keep it where it is the best."""
        if not team.first:
            return None
        measured: dict[str, object] = {"step": state.step, "seconds": round(state.seconds)}
        study.save(folder / "last.pt", learner.kept, measured)
        score = study.validate(folder / "last.pt") if study.held_out else None
        if score is None or state.best is None or score.good > state.best:
            state.best, state.worse = (score.good if score else None), 0
            if score is not None:
                measured |= {"held_out": asdict(score)}
            study.save(output, learner.kept, measured)
        else:
            state.worse += 1
        if preview is not None:
            image, truth, weights = loader.batch(0)
            write_preview(
                preview,
                image.numpy(), truth.numpy(), weights.numpy(),
                learner.predict(image).numpy(), study.frame,
            )  # fmt: skip
        learner.save(folder / "state.pt")
        return score

    def mean_loss() -> float:
        """Return the mean of the losses since the last report; one that is not finite ends it."""
        loss = float(torch.stack(losses).mean()) if losses else math.nan
        if losses and not math.isfinite(loss):
            raise BadRequest(
                f"the loss became {loss} at step {state.step}; take a smaller --lr than"
                f" {recipe.highest_lr:g}, or --clip, and look at the patches with --preview;"
                f" {output} is the best until then"
            )
        return loss

    def report_now(score: Score | None) -> Progress:
        nonlocal told, told_at, waited, losses
        now = time.perf_counter()
        state.seconds = earlier + now - begun
        loss = mean_loss()
        made = Progress(
            step=state.step,
            done=done,
            seconds=state.seconds,
            loss=loss,
            lr=lr,
            patches_per_second=(state.step - told) * per_step / max(now - told_at, 1e-9)
            if losses
            else math.nan,
            waited=(loader.waited - waited) / max(now - told_at, 1e-9) if losses else math.nan,
            bytes_per_patch=(study.cache.bytes_read - read_before)
            / max(1, (state.step - begun_step) * per_step / team.ranks),
            best=state.best,
            score=score,
        )
        told, told_at, waited, losses = state.step, now, loader.waited, []
        log.write(made)
        if progress is not None and team.first:
            progress(made)
        return made

    if state.step == 0:
        report = report_now(validation())  # what cannot work is known before the first step
        told_at = time.perf_counter()
    learner.use_threads(cores(recipe))
    while done < 1 and not (recipe.patience and team.agree(state.worse)[0] >= recipe.patience):
        lr = rate(recipe, _done(recipe, state.step + 1, state.seconds))
        losses.append(learner.step(batches, lr))
        state.seconds = earlier + time.perf_counter() - begun
        before = done
        done, asked = team.agree(_done(recipe, state.step, state.seconds), stop.asked)
        due = (
            state.step % recipe.validate_every == 0
            if recipe.validate_every
            else int(done * VALIDATIONS) > int(before * VALIDATIONS)
        )
        if due or done >= 1:
            report_now(None)
            report = report_now(validation())
            learner.use_threads(cores(recipe))
            told_at = time.perf_counter()
        elif state.step % TOLD == 0:
            report = report_now(None)
        if asked:
            mean_loss()  # what is not finite is not saved
            if team.first:
                learner.save(folder / "state.pt")
            raise KeyboardInterrupt("interrupted; run the same command with --resume to go on")
    return report or report_now(None)


@contextmanager
def _told_in_a_line() -> Iterator[None]:
    """Turn faults of storage, and memory that does not suffice, into what a user can mend."""
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


def _done(recipe: Recipe, step: int, seconds: float) -> float:
    """Return the share of a training that is done, 0 to 1."""
    by_steps = step / recipe.steps if recipe.steps else 0.0
    by_time = seconds / (60 * recipe.minutes) if recipe.minutes else 0.0
    return min(1.0, max(by_steps, by_time))


def _check_place(
    output: Path, folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool
) -> None:
    if output.suffix not in (".pt", ".pth"):
        raise BadRequest(f"output (={output}) must be a file that ends in .pt")
    if not output.parent.is_dir():
        raise BadRequest(f"output (={output}) must lie in a folder that exists")
    if resume and overwrite:
        raise BadRequest("resume goes on and overwrite begins anew; give one of them")
    if output.is_dir() or (folder.exists() and not folder.is_dir()):
        raise BadRequest(f"{output} must be a file and {folder} a folder; name others")
    if resume:
        check_recipe(folder / "state.pt", recipe)
    elif not overwrite and (there := [p for p in (output, folder / "state.pt") if p.exists()]):
        raise BadRequest(
            f"output (={there[0]}) is there already; go on with --resume, or replace it with"
            " --overwrite"
        )
    _check_left(folder, resume=resume)


def _left(folder: Path) -> list[Path]:
    """Return what an earlier training has left in a folder, by its names."""
    return [place for name in LEFT for place in folder.glob(name)]


def _check_left(folder: Path, *, resume: bool) -> None:
    """Refuse a folder in which names of ours are something else: it would be lost."""
    left = _left(folder)
    if left and not resume and folder.suffix != SUFFIX and not (folder / MARK).is_file():
        raise BadRequest(
            f"log (={folder}) holds {left[0].name}, and no training of tilepipe made that folder;"
            " name another"
        )
    for place in left:
        inner = [place, *place.rglob("*")] if place.is_dir() else [place]
        for path in inner:
            name = str(path.relative_to(place))
            is_file = path.is_symlink() or not path.is_dir()
            if path.is_symlink() or (is_file and path != place and not _is_ours(name, place.name)):
                raise BadRequest(
                    f"log (={folder}) holds {path.relative_to(folder)}, which tilepipe did not"
                    " write and never removes; move it away or name another folder"
                )


def _is_ours(name: str, above: str) -> bool:
    """Whether a file is of an array, of an output, or of TensorBoard."""
    if above == "tensorboard":
        return name.startswith("events.out.tfevents.")
    return any(FILES.fullmatch(path) for path in (name, f"0/{name}"))


@contextmanager
def _owned(folder: Path, team: Team) -> Iterator[None]:
    """Keep other trainings out of a folder, by a claim of the first of the processes."""
    if not team.first:
        yield
        return
    new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    claim = Claim.take(folder / "lock")
    if isinstance(claim, Owner):
        raise BadRequest(
            f"log (={folder}) is being written by another training ({claim}); wait for it, or name"
            " another output"
        )
    try:
        with closing(claim):
            yield
    finally:
        if new and not (folder / "state.pt").exists():  # it ended before it could be gone on with
            _remove_left(folder)
            (folder / MARK).unlink(missing_ok=True)
            with suppress(OSError):  # somebody else has put something there
                folder.rmdir()


def _begin(folder: Path) -> None:
    """Remove what an earlier training left in a folder, and nothing else; mark it as a training's.

    The state goes last, without which nothing goes on.
    """
    _remove_left(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).touch()


def _remove_left(folder: Path) -> None:
    for place in sorted(_left(folder), key=lambda place: place.name == "state.pt"):
        if place.is_dir():
            shutil.rmtree(place)
        else:
            place.unlink()
