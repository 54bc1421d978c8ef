"""The command train: its options, its call, its words."""

from __future__ import annotations

import json
import os
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click_option_group import optgroup

from tilepipe.commands.exits import Command, end_process, refusing
from tilepipe.commands.progress import LineTimer
from tilepipe.commands.types import Arguments, Bytes, Channels, Names, PerLevel, Place, VoxelSizes
from tilepipe.errors import BadRequest
from tilepipe.host.allocator import keep_memory
from tilepipe.text import comma, counted, describe_bytes, table
from tilepipe.training.recipe import CHOICES as RECIPES
from tilepipe.training.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.training.experiment import Experiment
    from tilepipe.training.meter import TrainReport


_METAVARS: dict[object, str] = {int: "N", float: "X"}


def _option(
    name: str,
    text: str,
    *,
    kind: click.ParamType[object] | type | None = None,
    metavar: str | None = None,
    many: bool = False,
) -> Callable[[Command], Command]:
    """Return the option for a field of the recipe, with its default."""
    default = next(f.default for f in fields(Recipe) if f.name == name)
    flag = "--" + name.replace("_", "-")
    if isinstance(default, bool):
        flags = f"{flag}/--no-{flag[2:]}"
        return optgroup.option(flags, default=default, show_default=True, help=text)
    if kind is None:
        kind = click.Choice(RECIPES[name]) if name in RECIPES else type(default)
    return optgroup.option(
        flag,
        type=kind,
        metavar=metavar or _METAVARS.get(kind),
        default=default,
        multiple=many,
        show_default=default not in (None, ()) and not isinstance(kind, Bytes),
        help=text,
    )


def _configure(ctx: click.Context, param: click.Parameter, path: str | None) -> None:
    """Take the defaults of a command from a TOML file; options of the command line come first."""
    if path is None:
        return
    try:
        settings = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise click.UsageError(f"config (={path}) cannot be read: {error}", ctx) from None
    known = {option.name: option for option in ctx.command.params}
    names = {name: name.replace("-", "_") for name in settings}
    if unknown := [name for name in settings if names[name] not in known]:
        raise click.UsageError(f"config (={path}) holds {unknown[0]}, which is no option", ctx)
    ctx.default_map = {names[name]: _spelled(value) for name, value in settings.items()}


def _spelled(value: object) -> object:
    """Return a value as the command line spells it, lists of sizes and tables too."""
    if isinstance(value, list):
        nested = any(isinstance(item, list) for item in value)
        text = all(isinstance(item, str) for item in value)
        return value if text else (";" if nested else ",").join(map(str, map(_spelled, value)))
    return json.dumps(value) if isinstance(value, dict) else value


_OPTIONS = (
    click.argument(
        "volumes", nargs=-1, required=True, type=Place(), metavar="IMAGE LABELS [IMAGE LABELS]..."
    ),
    click.option(
        "-o", "--output", required=True, type=Place(), metavar="FILE",
        help="The checkpoint to write, a .pt: the network that was best on what is held out.",
    ),
    click.option(
        "--config", type=Place(), metavar="FILE.toml", is_eager=True, expose_value=False,
        callback=_configure,
        help="A TOML file of options by their names; options of the command line come first.",
    ),
    optgroup.group("What is learned from"),
    _option("train_region", "The slices of each volume that are learned from, as 0:20,:,:; may be"
            " given several times. [all that is not held out]",
            kind=str, metavar="START:STOP,...", many=True),
    optgroup.option(
        "--mask", "masks", multiple=True, type=Place(),
        help="A volume that is 0 where the labels say nothing; give one for each pair.",
    ),
    _option("axes", "The axes of the images, where their files do not say them.",
            kind=str, metavar="ZYX"),
    _option("level", "The level of a pyramid; 0 is the finest."),
    _option("series", "Which image is read of files that hold several; 0 is the first.", kind=int),
    _option("channels", "Which channels of the images are read, by number or name, in this order."
            " [all]", kind=Channels()),
    _option("normalize", "How grey values are normalised, over each whole volume: none, scale:A,B,"
            " percentile:LO,HI or zscore.", metavar="HOW"),
    optgroup.group("What is learned"),
    _option("target", "What the labels become: their own classes, objects against the background,"
            " the borders of numbered objects, or grey values."),
    _option("classes", "The number of output channels; 1 learns two classes with one sigmoid."
            " [as many as the target has]", kind=int),
    _option("names", "What the output channels are called, as ocean,land.", kind=Names()),
    _option("ignore", "Voxels with this label are not learned from.", kind=int),
    optgroup.group("The network", help="A U-Net, or with --network one of your own."),
    _option("ndim", "The spatial axes of the network, 2 or 3. [the volume's]", kind=int),
    _option("base", "The number of channels of the first level; each level has twice as many as the"
            " one before."),
    _option("depth", "The number of levels; from one level to the next the resolution is halved."),
    _option("padding", "Whether convolutions use only voxels of the image (valid), or pad it with"
            " zeros to keep its size (same)."),
    _option("batch_norm", "Whether every convolution is followed by batch normalisation."),
    _option("attention", "Whether the skip connections pass through attention gates."),
    _option("residual", "Whether the levels are residual blocks."),
    _option("dropout", "The share of channels that are dropped at the end of the contracting"
            " path."),
    _option("kernels", "The sizes of the kernels, level by level, as '1,3,3;3;3'. [3]",
            kind=PerLevel()),
    _option("pools", "The sizes of the pooling between the levels, as '1,2,2;2'. [2]",
            kind=PerLevel()),
    _option("network", "The code that builds a network of your own: module:factory or"
            " file.py:factory.", kind=str, metavar="REF"),
    _option("network_args", "The arguments of that factory, as JSON.", kind=Arguments()),
    optgroup.group("Patches and augmentation"),
    _option("patch", "The voxels of a patch that the loss sees; the network reads its context"
            " round them. [256,256 or 48,48,48]", kind=VoxelSizes()),
    _option("balance", "Whether patches lie round every class equally often, and not as often as"
            " it occurs."),
    _option("augment", "Whether patches are deformed and their grey values are changed at all."),
    _option("rotate", "Whether patches are turned by any angle, by quarter turns, or not."),
    _option("flip", "Whether patches are mirrored, each axis in half of them."),
    _option("scale", "The share by which patches are made larger or smaller at most."),
    _option("elastic", "The standard deviation of random displacements, in voxels. [10 for a patch"
            " of 388, as in the paper]", kind=float),
    _option("in_plane", "Whether patches are deformed along y and x alone, and neighbours along z"
            " do not count for membranes and borders."),
    _option("grey", "The share by which contrast, brightness and gamma are changed at most."),
    _option("noise", "The largest standard deviation of the noise that is added, as a share of that"
            " of the patch."),
    optgroup.group("The loss"),
    _option("loss", "What the training makes small. [cross-entropy; l2 for values]",
            kind=click.Choice(RECIPES["loss"])),
    _option("class_weights", "Whether classes weigh as much more as they are rarer."),
    _option("weight_map", "Whether voxels between close objects weigh more, as in the paper."),
    _option("w0", "The weight of such a voxel where objects touch."),
    _option("sigma", "How far apart objects may be for that, in voxels: the weight falls as a"
            " Gaussian with this deviation."),
    optgroup.group("The optimisation"),
    _option("steps", "The number of steps after which the training ends.", kind=int),
    _option("minutes", "The minutes after which the training ends, if the steps do not end it"
            " before.", kind=float),
    _option("batch", "The number of patches in a batch."),
    _option("accumulate", "The number of batches whose gradients are added up for one step."),
    _option("optimizer", "The optimizer: AdamW, or SGD with the momentum of the paper, 0.99."),
    _option("lr", "The highest learning rate. [1e-3 for adamw, 1e-2 for sgd]", kind=float),
    _option("schedule", "Whether the learning rate falls as a cosine after it has risen, or stays"
            " constant."),
    _option("warmup", "The share of the training in which the learning rate rises to its highest."),
    _option("weight_decay", "How strongly the optimizer draws the weights towards 0."),
    _option("clip", "The largest norm of the gradient; a larger one is scaled down. 0 sets no"
            " limit."),
    _option("average", "The share of the old in a running mean of the weights, such as 0.999; the"
            " mean is what is saved. 0 saves the last weights."),
    _option("seed", "The number that all random numbers are drawn from; the same seed draws the"
            " same patches."),
    optgroup.group("Validation"),
    _option("val_region", "The slices of each volume that are held out, as 20:24,:,:; may be given"
            " several times. The word none holds nothing out. [the last eighth]",
            kind=str, metavar="START:STOP,...", many=True),
    optgroup.option(
        "--validate-on", "apart", nargs=2, multiple=True, type=Place(), metavar="IMAGE LABELS",
        help="A pair of volumes that is held out whole; may be given several times.",
    ),
    _option("validate_every", "The number of steps between two validations. [a twentieth of the"
            " training]", kind=int),
    _option("patience", "The training ends after this many validations without a better one.",
            kind=int),
    optgroup.group("Where it runs"),
    _option("device", "The device: auto, cpu, cuda or cuda:N.", metavar="NAME"),
    _option("precision", "The precision of the network's arithmetic."),
    _option("compile", "Whether the network is compiled first, which takes half a minute and a C++"
            " compiler."),
    _option("threads", "The number of threads that compute on a CPU. [all cores]", kind=int),
    _option("loaders", "The number of threads that make patches."),
    _option("cache", "The memory in which decoded chunks of the volumes are kept. [1GB]",
            kind=Bytes()),
    optgroup.group("What it leaves"),
    optgroup.option(
        "--log", "folder", type=Place(), metavar="FOLDER",
        help="The folder for the log, the state to go on from and the last checkpoint."
        " [OUTPUT.training]",
    ),
    optgroup.option("--resume", is_flag=True, help="Go on where an earlier run ended."),
    optgroup.option(
        "--overwrite", is_flag=True, help="Replace an earlier training and begin anew."
    ),
    optgroup.option(
        "--preview", type=Place(), metavar="FILE.png",
        help="Write a picture of patches, their weights and the network's answers at every"
        " validation.",
    ),
    optgroup.option("--tensorboard", is_flag=True, help="Write a log for TensorBoard, too."),
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

    IMAGE and LABELS are Zarr, OME-Zarr or TIFF; LABELS has the voxels of its IMAGE. The best
    checkpoint is all that `tilepipe segment` needs. What belongs to the training lies beside it, in
    FILE.training. A training that was interrupted goes on with --resume.
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
    if "WORLD_SIZE" in os.environ:  # torchrun would take what follows for a failure
        end_process()


class TrainProgress:
    """A line for every validation, and now and then."""

    def __init__(self) -> None:
        self._timer = LineTimer()

    def __call__(self, report: TrainReport) -> None:
        """Show how a training goes."""
        if self._timer.is_due(5.0) or report.score is not None:
            click.echo(describe_progress(report), err=True)

    def scan(self, what: str, done: int, total: int) -> None:
        """Show how far something is read before the training."""
        if self._timer.is_due():
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
        text = f"Dice {dice}; error {score.error:.4f}" if dice else f"error {score.error:.5g}"
        return f"{begin}: held out: {text}"
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
