"""The command train: its options, its call, its words."""

from __future__ import annotations

import json
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tilepipe.commands.exits import Command, refusing
from tilepipe.commands.progress import Pace
from tilepipe.commands.types import Arguments, Bytes, Channels, Names, PerLevel, Place, Sizes
from tilepipe.errors import BadRequest
from tilepipe.host.allocator import keep_memory
from tilepipe.text import comma, counted, describe_bytes, table
from tilepipe.training.recipe import CHOICES as RECIPES
from tilepipe.training.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.training.experiment import Experiment
    from tilepipe.training.meter import TrainReport


def _asked(
    name: str, text: str, *, kind: click.ParamType[object] | type | None = None, many: bool = False
) -> Callable[[Command], Command]:
    """Return the option for a field of the recipe, with its default."""
    default = next(f.default for f in fields(Recipe) if f.name == name)
    flag = "--" + name.replace("_", "-")
    shown = default not in (None, ()) and not isinstance(default, bool)
    if isinstance(default, bool):
        return click.option(f"{flag}/--no-{flag[2:]}", default=default, help=text)
    if kind is None:
        kind = click.Choice(RECIPES[name]) if name in RECIPES else type(default)
    return click.option(
        flag, type=kind, default=default, multiple=many, show_default=shown, help=text
    )


def _configure(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Take the defaults of a command from a TOML file; what is said on the line comes first."""
    if path is None:
        return
    try:
        said = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise click.UsageError(f"config (={path}) cannot be read: {error}", ctx) from None
    known = {option.name: option for option in ctx.command.params}
    names = {name: name.replace("-", "_") for name in said}
    if unknown := [name for name in said if names[name] not in known]:
        raise click.UsageError(f"config (={path}) holds {unknown[0]}, which is no option", ctx)
    ctx.default_map = {names[name]: _spelled(value) for name, value in said.items()}


def _spelled(value: object) -> object:
    """Return a value as the command line spells it, lists of sizes and tables too."""
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        text = all(isinstance(item, str) for item in value)
        return value if text else (";" if nested else ",").join(map(str, map(_spelled, value)))
    return json.dumps(value) if isinstance(value, dict) else value


_OPTIONS = (
    click.argument("volumes", nargs=-1, required=True, metavar="IMAGE LABELS [IMAGE LABELS]..."),
    click.option("-o", "--output", required=True, metavar="FILE", help="The checkpoint, a .pt."),
    click.option(
        "--validate-on", "apart", nargs=2, multiple=True, metavar="IMAGE LABELS",
        help="Volumes that are held out whole.",
    ),
    click.option(
        "--mask", "masks", multiple=True, metavar="PATH",
        help="A volume that is 0 where the labels say nothing; one for each pair.",
    ),
    click.option(
        "--config", metavar="FILE.toml", is_eager=True, expose_value=False, callback=_configure,
        help="Options from a file; those given here come first.",
    ),
    _asked("target", "What is learned from the labels."),
    _asked("classes", "Output channels; 1 for one sigmoid. [the target's]", kind=int),
    _asked("names", "What the channels are called, as ocean,land.", kind=Names()),
    _asked("ignore", "The label that says nothing.", kind=int),
    _asked("train_region", "Slices to learn from, as 0:20,:,:.", kind=str, many=True),
    _asked(
        "val_region", "Slices to hold out, or none. [the last eighth]",
        kind=str, many=True,
    ),
    _asked("axes", "Axes of the images, where they do not say them.", kind=str),
    _asked("level", "Of a pyramid; 0 is finest."),
    _asked("series", "Which of several images, where a file holds them; 0 is first.", kind=int),
    _asked("channels", "Of the images, in this order. [all]", kind=Channels()),
    _asked("normalize", "none, scale:A,B, percentile:LO,HI or zscore, over each whole volume."),
    _asked("ndim", "Axes of the network, 2 or 3. [the volume's]", kind=int),
    _asked("base", "Channels of the first level."),
    _asked("depth", "Levels."),
    _asked("padding", "Of the convolutions."),
    _asked("batch_norm", "Normalise by batch after each convolution."),
    _asked("attention", "Attention gates at the skips."),
    _asked("residual", "Residual blocks."),
    _asked("dropout", "At the end of the contracting path."),
    _asked("kernels", "Of each level, as '1,3,3;3;3'. [3]", kind=PerLevel()),
    _asked("pools", "Between the levels, as '1,2,2;2'. [2]", kind=PerLevel()),
    _asked("network", "One's own: module:factory or file.py:factory.", kind=str),
    _asked("network_args", "Arguments of the factory.", kind=Arguments()),
    _asked("patch", "Voxels of a patch that the loss sees. [256,256 or 48,48,48]", kind=Sizes()),
    _asked("balance", "Sample every class equally often."),
    _asked("cache", "Decoded chunks that are kept.", kind=Bytes()),
    _asked("augment", "Deform patches and change their grey values."),
    _asked("elastic", "Random displacements, in voxels. [10 for 388, as the paper]", kind=float),
    _asked("rotate", "Turn patches."),
    _asked("flip", "Flip patches."),
    _asked("scale", "Zoom patches, by up to this share."),
    _asked("grey", "Change contrast, brightness and gamma, by up to this share."),
    _asked("noise", "Noise, in normalised grey values."),
    _asked("in_plane", "Deform, and look for neighbours, along y and x alone."),
    _asked("loss", "[cross-entropy; l2 for values]", kind=click.Choice(RECIPES["loss"])),
    _asked("class_weights", "Weigh classes by the inverse of their frequency."),
    _asked("weight_map", "Weigh the voxels between close objects, as the paper."),
    _asked("w0", "Weight where they touch."),
    _asked("sigma", "How fast it falls, in voxels."),
    _asked("steps", "Length of the training.", kind=int),
    _asked("minutes", "Length of the training; the first of the two ends it.", kind=float),
    _asked("batch", "Patches of a batch."),
    _asked("accumulate", "Batches of a step."),
    _asked("optimizer", ""),
    _asked("lr", "Highest learning rate. [1e-3; 1e-2 for sgd]", kind=float),
    _asked("weight_decay", ""),
    _asked("schedule", "Of the learning rate."),
    _asked("warmup", "Share of the training in which it rises."),
    _asked("clip", "Largest norm of the gradient; 0 for none."),
    _asked("average", "Running mean of the weights, as 0.999; 0 for none."),
    _asked("precision", "Of the network's arithmetic."),
    _asked("compile", "Compile the network."),
    _asked("seed", ""),
    _asked("validate_every", "Steps. [a twentieth of the training]", kind=int),
    _asked("patience", "End after so many validations without a better one.", kind=int),
    _asked("device", "auto, cpu, cuda or cuda:N."),
    _asked("threads", "Compute threads.", kind=int),
    _asked("loaders", "Threads that make patches."),
)  # fmt: skip


def _request(command: Command) -> Command:
    """Give a command the arguments and the options of a training."""
    for decorate in reversed(_OPTIONS):
        command = decorate(command)
    return command


def _recipe(values: dict[str, object]) -> Recipe:
    """Take the recipe of a training out of a command's values."""
    return Recipe(**{f.name: values.pop(f.name) for f in fields(Recipe)})  # type: ignore[arg-type]


def paired(volumes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return pairs of image and labels."""
    if len(volumes) % 2:
        raise BadRequest(
            f"volumes (={' '.join(volumes)}) must be pairs, each image before its labels"
        )
    return list(zip(volumes[::2], volumes[1::2], strict=True))


@click.command()
@_request
@click.option("--resume", is_flag=True, help="Go on where an earlier run ended.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier training.")
@click.option(
    "--preview", type=Place(), metavar="FILE.png",
    help="Write a picture of patches, weights and answers.",
)  # fmt: skip
@click.option(
    "--log", "folder", type=Place(), metavar="FOLDER",
    help="The folder for the log and the state. [OUTPUT.training]",
)  # fmt: skip
@click.option("--tensorboard", is_flag=True, help="Also write a log for TensorBoard.")
@refusing
def train(
    volumes: tuple[str, ...],
    output: str,
    apart: tuple[tuple[str, str], ...],
    masks: tuple[str, ...],
    resume: bool,
    overwrite: bool,
    preview: str | None,
    folder: str | None,
    tensorboard: bool,
    **values: object,
) -> None:
    """Train a network on patches of images and their labels.

    IMAGE and LABELS are Zarr, OME-Zarr or TIFF. The best checkpoint is all that `tilepipe segment`
    needs. What belongs to the training lies beside it, in FILE.training; a training that was
    interrupted goes on with --resume.
    """
    from tilepipe.models.device import find_device
    from tilepipe.training import train as story

    if find_device(str(values["device"])) == "cpu":
        keep_memory()
    progress = TrainProgress()
    report = story.train(
        paired(volumes),
        output=output,
        recipe=_recipe(values),
        apart=apart,
        masks=masks,
        resume=resume,
        overwrite=overwrite,
        folder=folder,
        preview=preview,
        tensorboard=tensorboard,
        prepared=lambda experiment: click.echo(describe_experiment(experiment)),
        scanned=progress.scan,
        progress=progress,
    )
    click.echo(describe_training(report, output))


class TrainProgress:
    """A line for every validation, and now and then."""

    def __init__(self) -> None:
        self._pace = Pace()

    def __call__(self, report: TrainReport) -> None:
        """Show how a training goes."""
        if self._pace.is_due(5.0) or report.score is not None:
            click.echo(describe_progress(report), err=True)

    def scan(self, what: str, done: int, total: int) -> None:
        """Show how far something is read before the training."""
        if self._pace.is_due():
            click.echo(f"{what}: {done / total:.0%} read", err=True)


def describe_experiment(experiment: Experiment) -> str:
    """Return what a training will do."""
    recipe, profile, frame = experiment.recipe, experiment.profile, experiment.frame
    parameters = sum(p.numel() for p in experiment.network.parameters())
    total = max(1, sum(experiment.counts))
    classes = [f"{n / total:.1%}" for n in experiment.counts]
    ends = ((recipe.steps, "steps"), (recipe.minutes, "minutes"))
    length = " or ".join(f"{count:g} {unit}" for count, unit in ends if count)
    return table(
        [
            ("network", f"{profile.axes}D, {parameters / 1e6:.3g} million weights,"
             f" {counted(profile.channels, 'channel')} in, {', '.join(experiment.labels)} out"),
            ("patches", f"{comma(frame.answer)} voxels, of which the network reads"
             f" {comma(frame.read.shape)}; {recipe.batch * recipe.accumulate} a step"),
            ("labels", f"{recipe.target}: {sum(experiment.counts) / 1e6:.3g} million voxels"
             + (f", classes {', '.join(classes)}" if len(classes) > 1 else "")),
            ("held out", f"{experiment.held_out_voxels / 1e6:.3g} million voxels"),
            ("training", f"{length}, {recipe.optimizer}, learning rate {recipe.highest_lr:g},"
             f" loss {recipe.loss_name}"),
            ("folder", str(experiment.folder)),
        ]
    ) + "".join(f"\nnote: {notice}" for notice in experiment.notices)  # fmt: skip


def describe_progress(report: TrainReport) -> str:
    """Return how a training goes, in a line."""
    begin = f"step {report.step} ({report.done:.0%})"
    if report.score is not None:
        score = report.score
        dice = ", ".join(f"{value:.4f}" for value in score.dice)
        said = f"Dice {dice}; error {score.error:.4f}" if dice else f"error {score.error:.5g}"
        return f"{begin}: held out: {said}"
    return (
        f"{begin}: loss {report.loss:.4f}, {report.patches_per_second:.3g} patches/s,"
        f" {report.waited:.0%} waiting for them, about {report.left:.0f} s left"
    )


def describe_training(report: TrainReport, output: str) -> str:
    """Return how a training went."""
    best = "" if report.best is None else f", best held-out score {report.best:.4f}"
    return (
        f"{report.step} steps in {report.seconds:.0f} s{best},"
        f" {describe_bytes(report.bytes_per_patch)} decoded for each patch: {output}"
    )
