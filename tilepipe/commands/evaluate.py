"""The command evaluate: its options, its call, its words."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from tilepipe.commands.exits import refusing
from tilepipe.commands.progress import SegmentProgress
from tilepipe.commands.types import Numbers, Place
from tilepipe.options import COMPONENTS, KINDS
from tilepipe.text import counted, table

if TYPE_CHECKING:
    from tilepipe.evaluation.scores import Agreement, PartitionScores, Scores

_MASK = {0: "no object", 1: "object"}


@click.command()
@click.argument("prediction", type=Place())
@click.argument("labels", type=Place())
@click.option(
    "--kind",
    type=click.Choice(KINDS),
    default=KINDS[0],
    show_default=True,
    help="What the values are: classes, a mask, numbers of objects, or a mask of cell interiors.",
)
@click.option("--instances", "kind", flag_value="instances", help="Short for --kind instances.")
@click.option("--membrane", "kind", flag_value="membrane", help="Short for --kind membrane.")
@click.option("--axes", metavar="ZYX", help="The axes of a file that does not say them.")
@click.option(
    "--series", type=int, metavar="N", help="Which image is read of a file that holds several."
)
@click.option(
    "--region", metavar="START:STOP,...", help="The part of the labels to compare, as 20:24,:,:."
)
@click.option(
    "--threshold",
    type=float,
    metavar="X",
    help="The probability above which a voxel is foreground.",
)
@click.option(
    "--channel", type=int, metavar="N", help="Which channel of PREDICTION, counted from 0."
)
@click.option(
    "--objects", type=Numbers(), help="Which values of PREDICTION are objects. [all but 0]"
)
@click.option(
    "--label-objects", type=Numbers(), help="Which values of LABELS are objects. [all but 0]"
)
@click.option("--ignore", type=int, metavar="N", help="Leave out voxels with this label.")
@click.option(
    "--components",
    type=click.Choice(COMPONENTS),
    help="Whether objects lie within each plane or within the volume. [plane for membrane, volume"
    " for instances]",
)
@click.option("--warping", is_flag=True, help="Compute the warping error of masks, too; slower.")
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
@refusing
def evaluate(prediction: str, labels: str, as_json: bool, **values: object) -> None:
    """Compare a segmentation with its labels, block by block.

    What the scores mean is in docs/scores.md.
    """
    from tilepipe.evaluation import evaluate as story

    stage = SegmentProgress().stage
    scores = story.evaluate(prediction, labels, progress=stage, **values)  # type: ignore[arg-type]
    click.echo(json.dumps(scores.asdict(), indent=1) if as_json else describe_scores(scores))


def describe_scores(scores: Scores) -> str:
    """Return how well a prediction agrees with the labels."""
    within = f", objects of each {scores.components}" if scores.components else ""
    rows = [
        ("prediction", scores.prediction),
        ("labels", scores.labels),
        ("compared", f"{scores.region}, {counted(scores.voxels, 'voxel')}"),
        ("kind", scores.kind + within),
    ]
    if scores.pixels is not None:
        rows.append(("pixel error", f"{scores.pixels.pixel_error:.6f}"))
    if scores.warping_error is not None:
        rows.append(("warping error", f"{scores.warping_error:.6f}"))
    if scores.pixels is not None:
        for each in scores.pixels.classes:
            name = f"class {each.label}" if scores.kind == "classes" else _MASK[each.label]
            measures = f"Dice {each.dice:.4f}, IoU {each.iou:.4f}"
            rows.append((name, f"{measures}; {counted(each.true, 'voxel')} in labels"))
    if scores.partition is not None:
        rows += _partition(scores.partition)
    if scores.thinned is not None:
        rows.append(("", "after thinning the borders between predicted objects:"))
        rows += _partition(scores.thinned)
    if scores.objects is not None:
        objects, matches = scores.objects, scores.objects.matches
        hits = ", ".join(f"{m.precision:.3f} at {m.threshold:g}" for m in matches[::5])
        rows += [
            ("objects", f"{objects.predicted:,} predicted, {objects.true:,} true"),
            ("precision", f"{objects.average_precision:.4f} on average; {hits}"),
        ]
    return table(rows)


def _partition(scores: PartitionScores) -> list[tuple[str, str]]:
    def describe(agreement: Agreement) -> str:
        split, merge = agreement.split, agreement.merge
        return f"{agreement.score:.6f} (split {split:.6f}, merge {merge:.6f})"

    planes = f", mean of {counted(scores.planes, 'plane')}" if scores.planes > 1 else ""
    return [
        ("V-Rand", describe(scores.v_rand) + planes),
        ("V-Info", describe(scores.v_info) + planes),
        ("Rand error", f"{scores.rand_error:.6f}"),
        ("VOI", f"split {scores.voi_split:.4f}, merge {scores.voi_merge:.4f} bits{planes}"),
    ]
