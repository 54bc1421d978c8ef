"""The commands segment and plan: their options, their calls, their words."""

from __future__ import annotations

import json
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

import click
from click_option_group import optgroup

from tilepipe.commands.exits import Command, refusing
from tilepipe.commands.progress import SegmentProgress
from tilepipe.commands.types import Arguments, ArrayTaskType, Bytes, Channels, Place, VoxelSizes
from tilepipe.engines.jobs import Jobs, parse_jobs, read_jobs
from tilepipe.host.allocator import keep_memory
from tilepipe.options import CHOICES, ENGINES, Options
from tilepipe.text import comma, counted, describe_bytes, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from tilepipe.geometry import Context
    from tilepipe.models.spec import Profile
    from tilepipe.planning.plan import Plan
    from tilepipe.segmentation.report import Report


def _choice(name: str, text: str) -> Callable[[Command], Command]:
    choices = CHOICES[name]
    return optgroup.option(
        "--" + name.replace("_", "-"),
        type=click.Choice(choices),
        default=choices[0],
        show_default=True,
        help=text,
    )


_OPTIONS = (
    click.argument("source", type=Place()),
    click.option(
        "--model", required=True, type=Place(), metavar="FILE",
        help="The network: a checkpoint, an exported program (.pt2), TorchScript or a state dict.",
    ),
    click.option(
        "-o", "--output", type=Place(), metavar="TARGET",
        help="The OME-Zarr to write. It lies beside SOURCE where this is not given.",
    ),
    optgroup.group("What is read"),
    optgroup.option(
        "--axes", metavar="ZYX", help="The axes of SOURCE, where the file does not say them."
    ),
    optgroup.option(
        "--level", type=int, default=0, metavar="N", show_default=True,
        help="The level of a pyramid; 0 is the finest.",
    ),
    optgroup.option(
        "--series", type=int, metavar="N",
        help="Which image is read of a file that holds several; 0 is the first.",
    ),
    optgroup.option(
        "--channels", type=Channels(),
        help="Which channels of SOURCE are read, by number or name, in this order. [all]",
    ),
    optgroup.option(
        "--normalize", metavar="HOW",
        help="How grey values are normalised, over the whole volume: none, scale:A,B,"
        " percentile:LO,HI or zscore. [the model's]",
    ),
    optgroup.group("The network"),
    optgroup.option(
        "--network", metavar="REF",
        help="The code that builds the network of a state dict: module:factory or file.py:factory.",
    ),
    optgroup.option(
        "--network-args", type=Arguments(), help="The arguments of that factory, as JSON."
    ),
    optgroup.option(
        "--head", type=int, default=0, metavar="N", show_default=True,
        help="Which output is taken of a network that has several.",
    ),
    _choice("activation", "What tilepipe applies to the network's output; none where the network"
            " gives probabilities itself."),
    optgroup.group("What is written"),
    _choice("write", "What is written for each voxel."),
    optgroup.option(
        "--threshold", type=float, metavar="X",
        help="The probability above which a voxel is foreground. [0.5]",
    ),
    optgroup.option("--chunks", type=VoxelSizes(), help="The voxels of a chunk of the output."),
    optgroup.option(
        "--shards", type=VoxelSizes(), help="The voxels of a shard of the output, in whole chunks."
    ),
    _choice("ome_version", "The version of OME-Zarr: 0.5 is Zarr v3, 0.4 is Zarr v2."),
    optgroup.option(
        "--durable/--fast", default=True, show_default=True,
        help="Whether a tile counts as done only when the disk has it, or once it is written.",
    ),
    optgroup.group("How it is computed"),
    _choice("boundary", "What lies beyond the border: the mirrored volume, or the network's own"
            " padding."),
    optgroup.option(
        "--inexact", is_flag=True,
        help="Accept differences at the seams where no tiling of this network is exact.",
    ),
    optgroup.option(
        "--tile", type=VoxelSizes(), help="The voxels of a tile. [chosen by the memory]"
    ),
    optgroup.option(
        "--memory", type=Bytes(),
        help="The memory that each worker may use. [4GB, or less if there is less]",
    ),
    _choice("strategy", "How a tile is computed: swept slab by slab along one axis (sweep), at once"
            " (direct), or whichever costs less (auto)."),
    optgroup.option(
        "--threads", type=int, metavar="N", help="The compute threads of each worker."
    ),
    optgroup.option(
        "--device", default="auto", metavar="NAME", show_default=True,
        help="The device: auto, cpu, cuda or cuda:N.",
    ),
    _choice("precision", "The precision of the network's arithmetic."),
    optgroup.group("Where it runs"),
    optgroup.option(
        "--engine", type=click.Choice(ENGINES), default="auto", show_default=True,
        help="What runs the tiles.",
    ),
    optgroup.option(
        "--scheduler", metavar="ADDRESS", help="The address of a Dask cluster that already runs."
    ),
    optgroup.option(
        "--workers", type=int, metavar="N",
        help="The number of worker processes. [1, or one for each GPU]",
    ),
    optgroup.option(
        "--task", type=ArrayTaskType(),
        help="Compute only the tiles of task I of N, as in a job array.",
    ),
    optgroup.group("SLURM", help="With --engine slurm, every worker is a job."),
    optgroup.option(
        "--cluster", type=Place(), metavar="FILE",
        help="A TOML file that holds the options of this group.",
    ),
    optgroup.option(
        "--jobs", metavar="N|MIN:MAX", help="The number of jobs, or its bounds. [1]"
    ),
    optgroup.option("--partition", metavar="NAME", help="The partition in which jobs run."),
    optgroup.option("--account", metavar="NAME", help="The account that pays for them."),
    optgroup.option("--walltime", metavar="HH:MM:SS", help="The time limit of a job. [00:30:00]"),
    optgroup.option("--job-memory", type=Bytes(), help="The memory of a job. [8GB]"),
    optgroup.option("--cores", type=int, metavar="N", help="The cores of a job. [4]"),
    optgroup.option("--gpus", type=int, metavar="N", help="The GPUs of a job, 0 or 1. [0]"),
    optgroup.option(
        "--interface", metavar="NAME",
        help="The network interface that workers connect to. [the one that leads to the nodes]",
    ),
    optgroup.option(
        "--directive", metavar="TEXT", multiple=True,
        help="A further option of sbatch; may be given several times.",
    ),
    optgroup.option("--tls", is_flag=True, help="Encrypt what workers and scheduler exchange."),
)  # fmt: skip


def _request(command: Command) -> Command:
    """Give a command the argument and the options of a segmentation."""
    for decorate in reversed(_OPTIONS):
        command = decorate(command)
    return command


def _options(values: dict[str, object]) -> Options:
    """Take the options of a segmentation out of a command's values."""
    return Options(**{f.name: values.pop(f.name) for f in fields(Options)})  # type: ignore[arg-type]


def _jobs(values: dict[str, object]) -> Jobs | None:
    """Take the jobs of a segmentation out of a command's values; None where it needs none."""
    path = values.pop("cluster")
    settings = {name: values.pop(name) for name in ("partition", "account", "walltime", "cores")}
    settings |= {name: values.pop(name) for name in ("gpus", "interface", "tls")}
    settings |= {"memory": values.pop("job_memory"), "directives": values.pop("directive")}
    jobs = values.pop("jobs")
    settings["jobs"] = None if jobs is None else parse_jobs(jobs)
    if values["engine"] != "slurm" and not path and not any(settings.values()):
        return None
    return read_jobs(str(path) if path else None, settings)


@click.command()
@_request
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@refusing
def segment(source: str, model: str, output: str | None, **values: object) -> None:
    """Segment an image or a volume with a network, into an OME-Zarr.

    SOURCE is a Zarr, an OME-Zarr or a TIFF. A run that was stopped goes on when the same command is
    given again. The exit code is 1 if some tiles failed.
    """
    from tilepipe.segmentation import segment as story

    def planned(plan: Plan) -> None:
        if plan.sizes.device == "cpu":
            keep_memory()
        click.echo(describe_plan(plan))

    options, jobs, progress = _options(values), _jobs(values), SegmentProgress()
    report = story.segment(
        source,
        model=model,
        output=output,
        options=options,
        jobs=jobs,
        planned=planned,
        scanned=progress.scan,
        progress=progress,
        **values,  # type: ignore[arg-type]
    )
    progress.end()
    click.echo(describe_report(report))
    if report.failures:
        sys.exit(1)


@click.command()
@_request
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
@refusing
def plan(source: str, model: str, output: str | None, as_json: bool, **values: object) -> None:
    """Show what a segmentation would do and what it would cost.

    It takes the options of segment, reads SOURCE and the model, and writes nothing.
    """
    from tilepipe.segmentation.segment import plan_segment

    options, jobs = _options(values), _jobs(values)
    plan = plan_segment(source, model=model, output=output, options=options, jobs=jobs, **values)  # type: ignore[arg-type]
    facts, text = plan.asdict(), describe_plan(plan)
    if jobs is not None:
        from tilepipe.segmentation.slurm import describe, describe_jobs

        facts["slurm"] = describe(plan, jobs)
        text += "\n" + describe_jobs(plan, jobs)
    click.echo(json.dumps(facts, indent=1) if as_json else text)


def describe_plan(plan: Plan) -> str:
    """Return what will be done and what it costs, a line for each matter."""
    source, sizes, costs, context = plan.source, plan.sizes, plan.costs, plan.context
    grid = " x ".join(map(str, plan.grid.counts))
    chunks = comma(sizes.chunks) + (f" in shards of {comma(sizes.shards)}" if sizes.shards else "")
    channels = plan.options.channels
    picked = "" if channels is None else f": {', '.join(map(str, channels))}"
    amplified = costs.read_bytes / max(source.nbytes, 1)
    rows = [
        ("source", f"{source.path} ({source.kind}, {source.dtype})"),
        (
            "axes",
            f"{source.axes} = {comma(source.shape)}{channels_in_words(source.channels)}{picked}",
        ),
        ("model", f"{plan.model.path} ({plan.model.kind}, {plan.model.parameters:,} weights)"),
        ("grey values", plan.normalize),
        ("activation", _activation(plan)),
        ("context", context_in_words(plan.profile, plan.context)),
        ("step", comma(context.step)),
        ("boundary", plan.options.boundary),
        ("tile", f"{comma(sizes.tile)}, {costs.tiles} of them ({grid})"),
        ("window", f"gives {comma(sizes.window)}; {counted(costs.calls, 'call')} of the network"),
        ("strategy", _strategy(plan)),
        (
            "compute",
            f"{sizes.device}, {plan.options.precision},"
            f" {counted(sizes.threads, 'thread')} per worker",
        ),
        ("memory", f"{describe_bytes(costs.memory)} per worker, expected"),
        (
            "multiply-adds",
            f"{costs.multiply_adds:.4g}, {_compared(costs.recompute)} one whole pass",
        ),
        ("reads", f"{describe_bytes(costs.read_bytes)}, {amplified:.2f} times the source"),
        (
            "writes",
            f"{describe_bytes(costs.write_bytes)} before compression,"
            f" {counted(costs.files, 'file')}",
        ),
        ("target", f"{plan.target} ({plan.options.write}, {plan.answer.dtype}, chunks {chunks})"),
    ]
    return table(rows) + "".join(f"\nnote: {notice}" for notice in plan.notices)


def context_in_words(profile: Profile, context: Context | None = None) -> str:
    """Return the context in words; ``context`` is along the volume's axes, if it has others."""
    chosen = context or profile.context
    sizes = f"{comma(chosen.before)} before, {comma(chosen.after)} after"
    return f"the whole image; windows overlap by {sizes}" if profile.troubles else sizes


def describe_report(report: Report) -> str:
    """Return how a segmentation went."""
    task = "" if report.task is None else f"task {report.task}: "
    whole = [] if report.task is None else [_whole(report)]
    if not report.tiles:
        return "\n".join(
            [task + "no tile is left for this task: there are more tasks than tiles", *whole]
        )
    if not report.done and not report.failures:
        nothing = f"all {report.tiles} tiles were done before; nothing was left to do"
        return "\n".join([task + nothing, *whole])
    rate = report.voxels / max(report.seconds, 1e-9) / 1e6
    lines = [
        f"{task}{report.before + report.done} of {report.tiles} tiles done"
        + (f", {report.before} of them before" if report.before else "")
        + (f", {report.retries} tried again" if report.retries else "")
        + f"; {report.voxels / 1e6:.4g} megavoxels in {report.seconds:.1f} s ({rate:.3g} per s)",
        *whole,
    ]
    if report.done:
        busy = report.read_seconds, report.compute_seconds, report.write_seconds
        lines += [
            "seconds in tiles: {:.1f} reading, {:.1f} computing, {:.1f} writing".format(*busy),
            describe_devices(
                len(report.workers),
                seconds=report.device_seconds,
                computing=report.compute_seconds,
                starved=report.starved_seconds,
                voxels=report.voxels,
            ),
        ]
        share = report.done / report.tiles * report.plan.costs.multiply_adds
        rate = share / max(report.compute_seconds, 1e-9)
        lines.append(f"each worker computed {rate:.3g} multiply-adds/s")
    if report.job_seconds:
        hours, pace = report.job_seconds / 3600, report.voxels / report.job_seconds
        lines.append(f"jobs ran for {hours:.3g} hours in all, {pace:.4g} voxels/s of each")
    if report.nonfinite:
        lines.append(f"{report.nonfinite} values of the source are NaN or infinite: taken as 0")
    if report.narrowed:
        lines.append(
            f"memory ran short: {counted(report.narrowed, 'tile')} computed in smaller parts than"
            " planned, which agree with it within rounding; give less with --memory"
        )
    if report.failures:
        lines.append(
            f"{counted(len(report.failures), 'tile')} failed; run the same command to try again:"
        )
        lines += [f"  tile {failure.index}, {failure.cause}" for failure in report.failures[:20]]
        if len(report.failures) > 20:
            lines.append(f"  and {len(report.failures) - 20} more, in the output's ledger")
    return "\n".join(lines)


def _whole(report: Report) -> str:
    """Return how far the whole is that a task belongs to."""
    if not report.unfinished:
        return "all tasks are done: the output is whole"
    left = counted(report.unfinished, "tile")
    return f"{left} of the output not done yet; the last task, or a later call, ends it"


def describe_devices(
    workers: int, *, seconds: float, computing: float, starved: float, voxels: int
) -> str:
    """Return what the devices of some workers did in the seconds that they were held.

    >>> describe_devices(2, seconds=7200, computing=6480, starved=360, voxels=14_400_000_000)
    '2 device hours on 2 workers, 2 megavoxels/s each; 90% computing, 5% waiting for data'
    """
    held = max(seconds, computing, 1e-9)
    waiting = min(starved / held, 1 - computing / held)
    return (
        f"{held / 3600:.3g} device hours on {counted(workers, 'worker')},"
        f" {voxels / held / 1e6:.3g} megavoxels/s each; {computing / held:.0%} computing,"
        f" {waiting:.0%} waiting for data"
    )


def _strategy(plan: Plan) -> str:
    sweep, why = plan.sizes.sweep, f"; {plan.why}" if plan.why else ""
    if sweep is None:
        return plan.strategy + why
    rows = plan.sizes.window[sweep]
    return f"sweep along {plan.source.axes[sweep]}, {counted(rows, 'row')} at a time{why}"


def _compared(share: float) -> str:
    return f"{abs(share):.1%} {'below' if share < 0 else 'above'}"


def channels_in_words(count: int) -> str:
    """Return the number of channels in words; nothing for one."""
    return f", {count} channels" if count > 1 else ""


def _activation(plan: Plan) -> str:
    """Return what makes probabilities, and labels of them."""
    if plan.options.write in ("logits", "values"):
        return f"none: {plan.options.write} are written"
    text = str(plan.activation)
    if not plan.activation.name:
        text += ": the network's values are taken for probabilities"
    if plan.options.write == "labels" and plan.activation.apart:
        least = 0.5 if plan.options.threshold is None else plan.options.threshold
        text += f"; a mask for each of {plan.answer.channels} channels, above {least:g}"
    return text
