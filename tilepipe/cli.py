"""The commands. The only module that prints; everything heavy is imported when it is needed."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn, TypeVar

import click

from tilepipe import __version__
from tilepipe.commands.types import (
    Arguments,
    Numbers,
    paired,
    recipe_of,
    segment_jobs,
    segment_options,
    segment_request,
    train_request,
)
from tilepipe.errors import BadRequest, TileError
from tilepipe.host.allocator import keep_memory
from tilepipe.options import COMPONENTS, KINDS
from tilepipe.storage.objects import explain

if TYPE_CHECKING:
    from tilepipe.planning.plan import Plan
    from tilepipe.segmentation.segment import Report
    from tilepipe.training.train import Progress as Training

Command = TypeVar("Command", bound=Callable[..., None])

LINE_SECONDS = 30.0
"""How often progress is told where there is no terminal."""


def _refusing(command: Command) -> Command:
    """Turn what cannot be done into one line and an exit code."""

    @wraps(command)
    def run(*args: object, **values: object) -> None:
        try:
            command(*args, **values)
        except BadRequest as error:
            _end(str(error), 2)
        except TileError as error:
            _end(str(error), 1)
        except KeyboardInterrupt as error:
            _end(str(error) or "interrupted; run the same command again to go on", 130)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        except OSError as error:  # a full disk, a store out of reach
            _end(f"{explain(error)}; mend that and run the same command again", 1)

    return run  # type: ignore[return-value]


def _end(message: str, code: int) -> NoReturn:
    click.echo(f"tilepipe: {message}", err=True)
    sys.exit(code)


class _Commands(click.Group):
    """Commands whose refusals are a line, also where click is what refuses."""

    def invoke(self, ctx: click.Context) -> object:
        """Run the command."""
        with _speaking():
            return super().invoke(ctx)

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: object,
    ) -> click.Context:
        """Read what stands before the command."""
        with _speaking():
            return super().make_context(info_name, args, parent, **extra)


@contextmanager
def _speaking() -> Iterator[None]:
    try:
        yield
    except click.exceptions.NoArgsIsHelpError:
        raise
    except click.UsageError as error:
        help_of = f"; see {error.ctx.command_path} --help" if error.ctx else ""
        _end(error.format_message().rstrip(".") + help_of, 2)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Tell more.")
def main(verbose: bool) -> None:
    """Segment images too large for memory, exactly as one pass over the whole would."""
    # Threads of a kernel sleep while they wait for one another: on a shared machine, spinning
    # takes the cores from those that are waited for (measured: four times slower).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING, format="tilepipe: %(message)s"
    )
    for handler in logging.getLogger().handlers:  # what other libraries say is for their own users
        handler.addFilter(lambda record: record.name.split(".")[0] == "tilepipe")


@main.command()
@segment_request
@click.option("--overwrite", is_flag=True, help="Replace an earlier output.")
@_refusing
def segment(source: str, model: str, output: str | None, **values: object) -> None:
    """Segment SOURCE (Zarr, OME-Zarr, TIFF) with a network into an OME-Zarr.

    Run again after it was stopped, it goes on. Exit code 1: some tiles failed.
    """
    from tilepipe.commands.words import describe_plan, describe_report
    from tilepipe.segmentation.segment import segment as run

    def planned(plan: Plan) -> None:
        if plan.sizes.device == "cpu":
            keep_memory()
        click.echo(describe_plan(plan))

    options, jobs = segment_options(values), segment_jobs(values)
    shown = _Progress()
    report = run(
        source,
        model=model,
        output=output,
        options=options,
        jobs=jobs,
        planned=planned,
        scanned=shown.scan,
        progress=shown,
        **values,  # type: ignore[arg-type]
    )
    shown.end()
    click.echo(describe_report(report))
    if report.failures:
        sys.exit(1)


@main.command()
@segment_request
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_refusing
def plan(source: str, model: str, output: str | None, as_json: bool, **values: object) -> None:
    """Show what segmenting SOURCE would do and cost; touches nothing."""
    from tilepipe.commands.words import describe_plan
    from tilepipe.segmentation.segment import plan_segment

    options, jobs = segment_options(values), segment_jobs(values)
    made = plan_segment(source, model=model, output=output, options=options, jobs=jobs, **values)  # type: ignore[arg-type]
    found, text = made.asdict(), describe_plan(made)
    if jobs is not None:
        from tilepipe.segmentation.slurm import describe, describe_jobs

        found["slurm"] = describe(made, jobs)
        text += "\n" + describe_jobs(made, jobs)
    click.echo(json.dumps(found, indent=1) if as_json else text)


@main.command()
@train_request
@click.option("--resume", is_flag=True, help="Go on where an earlier run ended.")
@click.option("--overwrite", is_flag=True, help="Replace an earlier training.")
@click.option("--preview", metavar="FILE.png", help="A picture of patches, weights and answers.")
@click.option("--log", "folder", metavar="FOLDER", help="Log and state. [OUTPUT.training]")
@click.option("--tensorboard", is_flag=True, help="Also log for TensorBoard.")
@_refusing
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
    """Train a U-Net on patches of images and labels (Zarr, OME-Zarr, TIFF).

    The best checkpoint is all that `tilepipe segment` needs. What belongs to the training lies
    beside it, in FILE.training. Interrupted, it goes on with --resume.
    """
    from tilepipe.commands.words import describe_study, describe_training
    from tilepipe.models.predictor import find_device
    from tilepipe.training.train import train as run

    if find_device(str(values["device"])) == "cpu":
        keep_memory()
    shown = _Training()
    report = run(
        paired(volumes),
        output=output,
        recipe=recipe_of(values),
        apart=apart,
        masks=masks,
        resume=resume,
        overwrite=overwrite,
        folder=folder,
        preview=preview,
        tensorboard=tensorboard,
        prepared=lambda study: click.echo(describe_study(study)),
        scanned=shown.scan,
        progress=shown,
    )
    click.echo(describe_training(report, output))


@main.command()
@click.argument("file")
@click.option("--network", metavar="REF", help="module:factory or file.py:factory.")
@click.option("--network-args", type=Arguments(), help="Arguments of the factory.")
@click.option("--head", type=int, default=0, metavar="N", help="Which of several outputs.")
@click.option("--axes", metavar="ZYX", help="Axes of a volume that does not say them.")
@click.option("--series", type=int, metavar="N", help="Which of several images.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_refusing
def inspect(
    file: str,
    network: str | None,
    network_args: dict[str, object] | None,
    head: int,
    axes: str | None,
    series: int | None,
    as_json: bool,
) -> None:
    """Describe a model, a volume, or an output and how far it is."""
    from tilepipe.commands.inspect import inspect as describe

    found, text = describe(
        file, network=network, network_args=network_args, head=head, axes=axes, series=series
    )
    click.echo(json.dumps(found, indent=1) if as_json else text)


@main.command()
@click.argument("prediction")
@click.argument("labels")
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default=KINDS[0],
    show_default=True,
    help="What the values are: classes, a mask, numbers of objects, or a mask of cell interiors.",
)
@click.option("--instances", "kind", flag_value="instances", help="Short for --kind instances.")
@click.option("--membrane", "kind", flag_value="membrane", help="Short for --kind membrane.")
@click.option("--axes", metavar="ZYX", help="Axes of a file that does not say them.")
@click.option("--series", type=int, metavar="N", help="Of a file that holds several images.")
@click.option("--region", metavar="START:STOP,...", help="Of the labels, as in 20:24,:,:.")
@click.option("--threshold", type=float, metavar="X", help="Makes a mask of probabilities.")
@click.option("--channel", type=int, metavar="N", help="Of PREDICTION, counted from 0.")
@click.option("--objects", type=Numbers(), help="Values of PREDICTION that are objects. [not 0]")
@click.option("--label-objects", type=Numbers(), help="Values of LABELS that are. [not 0]")
@click.option("--ignore", type=int, metavar="N", help="Leave out voxels with this label.")
@click.option(
    "--components",
    type=click.Choice(COMPONENTS),
    help="Where objects lie. [plane for membrane, volume for instances]",
)
@click.option("--warping", is_flag=True, help="The warping error of masks as well; slower.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
@_refusing
def evaluate(prediction: str, labels: str, as_json: bool, **values: object) -> None:
    """Compare PREDICTION with LABELS, block by block: how good a segmentation is."""
    from tilepipe.commands.words import describe_scores
    from tilepipe.evaluation.evaluate import evaluate as run

    scores = run(prediction, labels, progress=_Progress().stage, **values)  # type: ignore[arg-type]
    click.echo(json.dumps(scores.asdict(), indent=1) if as_json else describe_scores(scores))


@main.command()
@click.option("--size", type=int, default=1024, show_default=True, help="Pixels of each side.")
@click.option("-o", "--output", default="demo", show_default=True, help="A folder for the results.")
@_refusing
def demo(size: int, output: str) -> None:
    """Make an image of nuclei, segment it in tiles and compare it with the truth."""
    from tilepipe.commands.demo import demo as run

    if "://" in output:
        raise BadRequest(f"output (={output}) must be a folder of this machine")
    keep_memory()
    shown = _Progress()
    for line in run(Path(output), size=size, progress=shown):
        shown.end()
        click.echo(line)


class _Progress:
    """A bar on a terminal; without one, a line now and then."""

    def __init__(self) -> None:
        self._bar: click._termui_impl.ProgressBar[int] | None = None
        self._told, self._shown, self._text = time.monotonic(), 0, ""

    def __call__(self, report: Report) -> None:
        """Show how far a segmentation is."""
        finished = report.done + len(report.failures)
        rate = report.voxels / max(report.seconds, 1e-9) / 1e6
        if sys.stderr.isatty():
            if self._bar is None:
                if report.dashboard:
                    click.echo(f"dashboard      {report.dashboard}", err=True)
                self._bar = click.progressbar(
                    length=report.tiles - report.before,
                    label="segmenting",
                    show_pos=True,
                    item_show_func=lambda _: self._text,
                    file=sys.stderr,
                )
                self._bar.__enter__()
            self._text = f"{rate:.3g} megavoxels/s" + (
                f", {len(report.failures)} failed" if report.failures else ""
            )
            self._bar.update(finished - self._shown, finished)
            self._shown = finished
        elif time.monotonic() - self._told > LINE_SECONDS:
            self._told = time.monotonic()
            left = report.seconds / finished * report.left
            click.echo(
                f"{report.before + finished} of {report.tiles} tiles"
                f"{f' ({len(report.failures)} failed)' * bool(report.failures)},"
                f" {rate:.3g} megavoxels/s,"
                f" about {left:.0f} s left",
                err=True,
            )

    def scan(self, done: int, blocks: int) -> None:
        """Show how far the volume has been read for its normalization."""
        self.stage("normalization", done, blocks)

    def stage(self, what: str, done: int, blocks: int) -> None:
        """Show how far a pass over the volume is."""
        if time.monotonic() - self._told > (1.0 if sys.stderr.isatty() else LINE_SECONDS):
            self._told = time.monotonic()
            click.echo(f"{what}: {done / blocks:.0%} of the volume read", err=True)

    def end(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None


class _Training:
    """A line for every validation, and now and then."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, report: Training) -> None:
        """Show how a training goes."""
        seconds = 5.0 if sys.stderr.isatty() else LINE_SECONDS
        if report.score is None and time.monotonic() - self._told < seconds:
            return
        from tilepipe.commands.words import describe_progress

        self._told = time.monotonic()
        click.echo(describe_progress(report), err=True)

    def scan(self, what: str, done: int, total: int) -> None:
        """Show how far something is read before the training."""
        if time.monotonic() - self._told > (1.0 if sys.stderr.isatty() else LINE_SECONDS):
            self._told = time.monotonic()
            click.echo(f"{what}: {done / total:.0%} read", err=True)


if __name__ == "__main__":
    main()
