"""What the commands take: sizes, amounts of memory, and the options of each."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from tilepipe.engines.jobs import Jobs, parse_jobs, read_jobs
from tilepipe.errors import BadRequest
from tilepipe.options import CHOICES, ENGINES, Options, Shard
from tilepipe.training.recipe import CHOICES as RECIPES
from tilepipe.training.recipe import Recipe

if TYPE_CHECKING:
    from tilepipe.geometry import Shape

Command = TypeVar("Command", bound=Callable[..., None])


class Sizes(click.ParamType["Shape"]):
    """Voxels along each of the volume's axes."""

    name = "Z,Y,X"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shape:
        """Return the sizes as a tuple."""
        try:
            return tuple(int(part) for part in str(value).strip("()").split(","))
        except ValueError:
            self.fail(f"{value!r} must be whole numbers with commas, as in 64,128,128", param, ctx)


class Numbers(click.ParamType[tuple[int, ...]]):
    """Values of labels."""

    name = "N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Return the values as a tuple."""
        try:
            return tuple(int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} must be whole numbers with commas, as in 1,2", param, ctx)


class Channels(click.ParamType[tuple[int | str, ...]]):
    """Channels by number or by name."""

    name = "N,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int | str, ...]:
        """Return numbers, and names of what is no number."""
        parts = value if isinstance(value, tuple | list) else str(value).split(",")
        named = [str(part).strip() for part in parts]
        if "" in named:
            self.fail(f"{value!r} must be numbers or names with commas, as in 0,2", param, ctx)
        return tuple(int(part) if part.isdecimal() else part for part in named)


class Names(click.ParamType[tuple[str, ...]]):
    """Names of classes."""

    name = "NAME,..."

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return the names as a tuple."""
        return tuple(str(value).split(",")) if isinstance(value, str) else tuple(value)  # type: ignore[arg-type]


class Bytes(click.ParamType[int]):
    """An amount of memory."""

    name = "SIZE"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Return the number of bytes."""
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?", str(value).strip())
        if match is None:
            self.fail(f"{value!r} must be an amount such as 512MB or 4GB", param, ctx)
        number, unit, binary = match.groups()
        return int(float(number) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))


class Part(click.ParamType["Shard"]):
    """One task of an array."""

    name = "I/N"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> Shard:
        """Return which task of how many."""
        match = re.fullmatch(r"(\d+)/(\d+)", str(value).strip())
        if match is None:
            self.fail(f"{value!r} must be a task and their number, as in 3/8", param, ctx)
        try:
            return Shard(int(match[1]), int(match[2]))
        except BadRequest as error:
            self.fail(str(error), param, ctx)


class Arguments(click.ParamType[dict[str, object]]):
    """A JSON object."""

    name = "JSON"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> dict[str, object]:
        """Return the object as a dict."""
        try:
            found = json.loads(str(value))
        except json.JSONDecodeError as error:
            self.fail(f"{value!r} is no JSON: {error}", param, ctx)
        if not isinstance(found, dict):
            self.fail(f'{value!r} must be a JSON object, as in {{"base": 16}}', param, ctx)
        return found


def _choice(name: str, text: str) -> Callable[[Command], Command]:
    choices = CHOICES[name]
    return click.option(
        "--" + name.replace("_", "-"),
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help=text,
    )


_SEGMENT = (
    click.argument("source"),
    click.option("--model", required=True, metavar="FILE", help="The network."),
    click.option("-o", "--output", metavar="TARGET", help="An OME-Zarr; beside SOURCE by default."),
    _choice("write", "What is written for each voxel."),
    click.option("--threshold", type=float, metavar="X", help="Of labels by probability. [0.5]"),
    _choice("activation", "Applied to what the network gives; none: it gives probabilities."),
    click.option("--network", metavar="REF", help="module:factory or file.py:factory."),
    click.option("--network-args", type=Arguments(), help="Arguments of the factory."),
    click.option("--head", type=int, default=0, metavar="N", help="Which of several outputs."),
    click.option("--axes", metavar="ZYX", help="Axes of SOURCE, where it does not say them."),
    click.option("--level", type=int, default=0, metavar="N", help="Of a pyramid; 0 is finest."),
    click.option("--series", type=int, metavar="N", help="Which of several images; 0 is first."),
    click.option("--channels", type=Channels(), help="Of SOURCE, in this order. [all]"),
    click.option(
        "--normalize",
        metavar="HOW",
        help="none, scale:A,B, percentile:LO,HI or zscore, over the whole volume. [the model's]",
    ),
    _choice("boundary", "The volume mirrored at its border, or the network's own padding."),
    click.option("--tile", type=Sizes(), help="Voxels of a tile. [from the memory]"),
    click.option("--memory", type=Bytes(), help="Of each worker. [4GB, or less if there is less]"),
    _choice("strategy", "How a tile is computed."),
    click.option("--threads", type=int, metavar="N", help="Compute threads of each worker."),
    click.option("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N."),
    _choice("precision", "Of the network's arithmetic."),
    click.option("--chunks", type=Sizes(), help="Voxels of the target's chunks."),
    click.option("--shards", type=Sizes(), help="Voxels of its shards, in multiples of chunks."),
    _choice("ome_version", "Of the target: 0.5 is Zarr v3, 0.4 is Zarr v2."),
    click.option(
        "--durable/--fast", default=True,
        help="Whether a tile is finished only when the disk has it, or sooner. [durable]",
    ),
    click.option("--inexact", is_flag=True, help="Accept seams where no tiling is exact."),
    click.option("--engine", type=click.Choice(ENGINES), default="auto", show_default=True),
    click.option("--scheduler", metavar="ADDRESS", help="Of a Dask cluster that already runs."),
    click.option("--workers", type=int, metavar="N", help="Worker processes. [1, or one per GPU]"),
    click.option("--shard", type=Part(), help="Just this share, as task I of an array 1-N."),
    click.option("--cluster", metavar="FILE", help="SLURM: a TOML file that says what follows."),
    click.option("--jobs", metavar="N|MIN:MAX", help="SLURM: jobs of one worker each. [1]"),
    click.option("--partition", metavar="NAME", help="SLURM: where they run."),
    click.option("--account", metavar="NAME", help="SLURM: who pays."),
    click.option("--walltime", metavar="HH:MM:SS", help="SLURM: of a job. [00:30:00]"),
    click.option("--job-memory", type=Bytes(), help="SLURM: of a job. [8GB]"),
    click.option("--cores", type=int, metavar="N", help="SLURM: of a job. [4]"),
    click.option("--gpus", type=int, metavar="N", help="SLURM: of a job, 0 or 1. [0]"),
    click.option("--interface", metavar="NAME", help="SLURM: network. [towards the nodes]"),
    click.option("--directive", metavar="TEXT", multiple=True, help="SLURM: option of sbatch."),
    click.option("--tls", is_flag=True, help="SLURM: encrypt what the workers say."),
)  # fmt: skip


def segment_request(command: Command) -> Command:
    """Give a command the argument and the options of a segmentation."""
    for decorate in reversed(_SEGMENT):
        command = decorate(command)
    return command


def segment_options(values: dict[str, object]) -> Options:
    """Take the options of a segmentation out of a command's values."""
    return Options(**{f.name: values.pop(f.name) for f in fields(Options)})  # type: ignore[arg-type]


def segment_jobs(values: dict[str, object]) -> Jobs | None:
    """Take the jobs of a segmentation out of a command's values; None where it needs none."""
    path = values.pop("cluster")
    asked = {name: values.pop(name) for name in ("partition", "account", "walltime", "cores")}
    asked |= {name: values.pop(name) for name in ("gpus", "interface", "tls")}
    asked |= {"memory": values.pop("job_memory"), "directives": values.pop("directive")}
    jobs = values.pop("jobs")
    asked["jobs"] = None if jobs is None else parse_jobs(jobs)
    if values["engine"] != "slurm" and not path and not any(asked.values()):
        return None
    return read_jobs(str(path) if path else None, asked)


class PerLevel(click.ParamType["list[int | Shape]"]):
    """Sizes for each level of a U-Net."""

    name = "SIZES"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[int | Shape]:
        """Return one number, or one for each axis, for each level."""
        try:
            levels = [tuple(map(int, part.split(","))) for part in str(value).split(";")]
        except ValueError:
            self.fail(f"{value!r} must be sizes by level, as in '1,2,2;1,2,2;2'", param, ctx)
        return [level[0] if len(level) == 1 else level for level in levels]


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


_TRAIN = (
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


def train_request(command: Command) -> Command:
    """Give a command the arguments and the options of a training."""
    for decorate in reversed(_TRAIN):
        command = decorate(command)
    return command


def recipe_of(values: dict[str, object]) -> Recipe:
    """Take the recipe of a training out of a command's values."""
    return Recipe(**{f.name: values.pop(f.name) for f in fields(Recipe)})  # type: ignore[arg-type]


def paired(volumes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return pairs of image and labels."""
    if len(volumes) % 2:
        raise BadRequest(
            f"volumes (={' '.join(volumes)}) must be pairs, each image before its labels"
        )
    return list(zip(volumes[::2], volumes[1::2], strict=True))
