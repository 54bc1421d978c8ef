"""Plans, models, volumes and outputs in words, for people; JSON is for programs."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from tilepipe.errors import comma, counted
from tilepipe.planning.tiling import describe_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tilepipe.evaluation.evaluate import Scores
    from tilepipe.evaluation.scores import Agreement, PartitionScores
    from tilepipe.geometry import Context
    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.planning.plan import Plan
    from tilepipe.runs.log import Progress
    from tilepipe.segmentation.segment import Report
    from tilepipe.training.experiment import Study
    from tilepipe.training.train import Progress as Training
    from tilepipe.volumes.volume import Volume

WORKERS = 20
"""Workers that are shown one by one."""


def describe_plan(plan: Plan) -> str:
    """Return what will be done and what it costs, a line for each matter."""
    source, sizes, costs, context = plan.source, plan.sizes, plan.costs, plan.context
    grid = " x ".join(map(str, plan.grid.counts))
    chunks = comma(sizes.chunks) + (f" in shards of {comma(sizes.shards)}" if sizes.shards else "")
    asked = plan.options.channels
    picked = "" if asked is None else f": {', '.join(map(str, asked))}"
    amplified = costs.read_bytes / max(source.nbytes, 1)
    rows = [
        ("source", f"{source.path} ({source.kind}, {source.dtype})"),
        ("axes", f"{source.axes} = {comma(source.shape)}{_channels(source.channels)}{picked}"),
        ("model", f"{plan.model.path} ({plan.model.kind}, {plan.model.parameters:,} weights)"),
        ("grey values", plan.normalize),
        ("activation", _activation(plan)),
        ("context", _context(plan.profile, plan.context)),
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
    return _table(rows) + "".join(f"\nnote: {notice}" for notice in plan.notices)


def describe_model(model: Model, profile: Profile) -> str:
    """Return what tiling needs to know of a model."""
    context = profile.context
    how = "read from the graph" if profile.method == "graph" else "measured by probing"
    sizes = [
        f"{n}" if profile.fixed else f"{n} + {s}k" if s > 1 else f"{n} and more"
        for n, s in zip(profile.smallest, context.step, strict=True)
    ]
    rows = [
        ("model", f"{model.path} ({model.kind})"),
        ("weights", f"{model.parameters:,}"),
        (
            "input",
            f"{profile.axes}D, {counted(profile.channels, 'channel')}, sizes {', '.join(sizes)}",
        ),
        (
            "output",
            f"{counted(profile.classes, 'channel')}{_ends(profile)},"
            f" {comma(profile.shrink)} smaller"
            + (f"; number {model.head} of {model.outputs}" if model.outputs > 1 else ""),
        ),
        ("context", f"{_context(profile)} ({how})"),
        ("step", comma(context.step)),
        ("grey values", model.normalize or "not said"),
        ("labels", ", ".join(model.labels) or "not said"),
        ("exact tiling", "yes" if profile.exact else "no"),
    ]
    if model.kind == "checkpoint":
        rows.append(("trained for", model.answer + _trained(model)))
    rows += [("no context", why) for why in profile.troubles]
    rows += [
        ("off lattice", why + (": exact as regions" if profile.exact else ""))
        for why in profile.off_lattice
    ]
    if profile.autocast:
        rows.append(("autocast", f"{profile.autocast}: run in windows, as the network says"))
    return _table(rows)


def _context(profile: Profile, context: Context | None = None) -> str:
    """Return the context in words; ``context`` is along the volume's axes, if it has others."""
    chosen = context or profile.context
    sizes = f"{comma(chosen.before)} before, {comma(chosen.after)} after"
    return f"the whole image; windows overlap by {sizes}" if profile.troubles else sizes


def describe_volume(volume: Volume, notices: Iterable[str] = ()) -> str:
    """Return shape, type and storage of a volume, and what there is to say of it besides."""
    units = [
        f"{size:g} {unit or ''}".strip()
        for size, unit in zip(volume.scale, volume.units, strict=True)
    ]
    assumed = " (assumed)" if volume.axes_assumed else ""
    shards = f" in shards of {comma(volume.shards)}" if volume.shards else ""
    rows = [
        ("volume", f"{volume.path} ({volume.kind})"),
        ("axes", f"{volume.axes}{assumed} = {comma(volume.shape)}{_channels(volume.channels)}"),
        ("type", f"{volume.dtype}, {describe_bytes(volume.nbytes)}"),
        ("chunks", comma(volume.chunks) + shards),
        ("voxel", " x ".join(units)),
    ]
    if any(volume.translation):
        rows.append(("lies at", ", ".join(f"{place:g}" for place in volume.translation)))
    if volume.channel_names:
        rows.append(("channels", ", ".join(name or "?" for name in volume.channel_names)))
    return _table(rows) + "".join(f"\nnote: {notice}" for notice in notices)


def describe_report(report: Report) -> str:
    """Return how a segmentation went."""
    shard = "" if report.shard is None else f"shard {report.shard}: "
    whole = [] if report.shard is None else [_whole(report)]
    if not report.done and not report.failures:
        nothing = f"all {report.tiles} tiles were done before; nothing was left to do"
        return "\n".join([shard + nothing, *whole])
    rate = report.voxels / max(report.seconds, 1e-9) / 1e6
    lines = [
        f"{shard}{report.before + report.done} of {report.tiles} tiles done"
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


def describe_live(progress: Progress, *, done: int, tiles: int, voxels: float) -> str:
    """Return how a run goes by its logs; a tile has so many ``voxels`` on average."""
    shares = progress.workers.values()
    if not progress.workers:
        return ""
    ago = progress.now - max(share.ended for share in shares)
    computed = sum(share.tiles for share in shares)
    rows = [
        (
            "computed",
            f"{counted(computed, 'tile')} in all runs, {progress.retries} tried again;"
            f" the last {_duration(ago)} ago",
        )
    ]
    if progress.rate and done < tiles:
        left = (tiles - done) / progress.rate
        rows.append(
            (
                "rate",
                f"{progress.rate:.3g} tiles/s, {progress.rate * voxels / 1e6:.3g} megavoxels/s;"
                f" about {_duration(left)} left",
            )
        )
    told = describe_devices(
        len(progress.workers),
        seconds=sum(share.seconds for share in shares),
        computing=sum(share.compute for share in shares),
        starved=sum(share.starved for share in shares),
        voxels=round(computed * voxels),
    )
    rows.append(("devices", told))
    latest = sorted(progress.workers.items(), key=lambda item: -item[1].ended)
    for name, share in latest[:WORKERS]:
        rate = share.tiles * voxels / max(share.seconds, 1.0) / 1e6
        rows.append(
            (
                "worker",
                f"{name}: {counted(share.tiles, 'tile')}, {rate:.3g} megavoxels/s,"
                f" the last {_duration(progress.now - share.ended)} ago",
            )
        )
    if len(latest) > WORKERS:
        rows.append(("", f"and {len(latest) - WORKERS} workers more: see --json"))
    return _table(rows)


def _duration(seconds: float) -> str:
    """Return a time as people say it.

    >>> _duration(42), _duration(125), _duration(7500), _duration(200_000)
    ('42 s', '2 min', '2.1 h', '2.3 days')
    """
    if seconds < 100:
        return f"{max(seconds, 0):.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _whole(report: Report) -> str:
    """Return how far the whole is that a shard belongs to."""
    if not report.unfinished:
        return "all shards are done: the output is whole"
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
        for found in scores.pixels.classes:
            name = f"class {found.label}" if scores.kind == "classes" else _MASK[found.label]
            measures = f"Dice {found.dice:.4f}, IoU {found.iou:.4f}"
            rows.append((name, f"{measures}; {counted(found.true, 'voxel')} in labels"))
    if scores.partition is not None:
        rows += _partition(scores.partition)
    if scores.thinned is not None:
        rows.append(("", "after thinning the borders between predicted objects:"))
        rows += _partition(scores.thinned)
    if scores.objects is not None:
        found_objects, matches = scores.objects, scores.objects.matches
        hits = ", ".join(f"{m.precision:.3f} at {m.threshold:g}" for m in matches[::5])
        rows += [
            ("objects", f"{found_objects.predicted:,} predicted, {found_objects.true:,} true"),
            ("precision", f"{found_objects.average_precision:.4f} on average; {hits}"),
        ]
    return _table(rows)


_MASK = {0: "no object", 1: "object"}


def _partition(scores: PartitionScores) -> list[tuple[str, str]]:
    def told(found: Agreement) -> str:
        return f"{found.score:.6f} (split {found.split:.6f}, merge {found.merge:.6f})"

    planes = f", mean of {counted(scores.planes, 'plane')}" if scores.planes > 1 else ""
    return [
        ("V-Rand", told(scores.v_rand) + planes),
        ("V-Info", told(scores.v_info) + planes),
        ("Rand error", f"{scores.rand_error:.6f}"),
        ("VOI", f"split {scores.voi_split:.4f}, merge {scores.voi_merge:.4f} bits{planes}"),
    ]


def _strategy(plan: Plan) -> str:
    sweep, why = plan.sizes.sweep, f"; {plan.why}" if plan.why else ""
    if sweep is None:
        return plan.strategy + why
    rows = plan.sizes.window[sweep]
    return f"sweep along {plan.source.axes[sweep]}, {counted(rows, 'row')} at a time{why}"


def _compared(share: float) -> str:
    return f"{abs(share):.1%} {'below' if share < 0 else 'above'}"


def _trained(model: Model) -> str:
    """Return the context that a model's file says it was trained with."""
    if model.trained is None:
        return ""
    sizes = (cast("list[int]", model.trained[name]) for name in ("before", "after", "step"))
    return ", with a context of {} before, {} after, step {}".format(*map(comma, sizes))


def _channels(count: int) -> str:
    return f", {count} channels" if count > 1 else ""


def _ends(profile: Profile) -> str:
    meaning = profile.meaning
    if not meaning.activation:
        return f" of {meaning.strange}" if meaning.strange else ""
    apart = ", each a probability of its own" if meaning.apart and profile.classes > 1 else ""
    return f" after a {meaning.activation}{apart}"


def _activation(plan: Plan) -> str:
    """Return what makes probabilities, and labels of them."""
    if plan.options.write in ("logits", "values"):
        return f"none: {plan.options.write} are written"
    found = str(plan.activation)
    if not plan.activation.name:
        found += ": the network's values are taken for probabilities"
    if plan.options.write == "labels" and plan.activation.apart:
        least = 0.5 if plan.options.threshold is None else plan.options.threshold
        found += f"; a mask for each of {plan.answer.channels} channels, above {least:g}"
    return found


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"{name:<14}{value}" for name, value in rows)


def describe_study(study: Study) -> str:
    """Return what a training will do."""
    recipe, frame = study.recipe, study.frame
    parameters = sum(p.numel() for p in study.network.parameters())
    total = max(1, sum(study.counts))
    classes = [f"{n / total:.1%}" for n in study.counts]
    ends = ((recipe.steps, "steps"), (recipe.minutes, "minutes"))
    length = " or ".join(f"{count:g} {unit}" for count, unit in ends if count)
    return _table(
        [
            ("network", f"{study.profile.axes}D, {parameters / 1e6:.3g} million weights,"
             f" {counted(study.profile.channels, 'channel')} in, {', '.join(study.labels)} out"),
            ("patches", f"{comma(frame.answer)} voxels, of which the network reads"
             f" {comma(frame.read.shape)}; {recipe.batch * recipe.accumulate} a step"),
            ("labels", f"{recipe.target}: {sum(study.counts) / 1e6:.3g} million voxels"
             + (f", classes {', '.join(classes)}" if len(classes) > 1 else "")),
            ("held out", f"{study.held_out_voxels / 1e6:.3g} million voxels"),
            ("training", f"{length}, {recipe.optimizer}, learning rate {recipe.highest_lr:g},"
             f" loss {recipe.loss_name}"),
            ("folder", str(study.folder)),
        ]
    ) + "".join(f"\nnote: {notice}" for notice in study.notices)  # fmt: skip


def describe_progress(report: Training) -> str:
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


def describe_training(report: Training, output: str) -> str:
    """Return how a training went."""
    best = "" if report.best is None else f", best held-out score {report.best:.4f}"
    return (
        f"{report.step} steps in {report.seconds:.0f} s{best},"
        f" {describe_bytes(report.bytes_per_patch)} decoded for each patch: {output}"
    )
