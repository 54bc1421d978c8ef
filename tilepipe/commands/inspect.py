"""The command inspect: what a file is, in words and as plain values."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click

from tilepipe.commands.exits import refusing
from tilepipe.commands.segment import channels_in_words, context_in_words, describe_devices
from tilepipe.commands.types import Arguments, Place
from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed
from tilepipe.text import comma, counted, describe_bytes, duration, table

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from tilepipe.models.model import Model
    from tilepipe.models.spec import Profile
    from tilepipe.runs.log import LogSummary
    from tilepipe.volumes.volume import Volume

MODELS = (".pt", ".pth", ".pt2", ".ckpt", ".ts")
"""Names of model files; everything else is looked at as a volume first."""


@click.command()
@click.argument("file", type=Place())
@click.option(
    "--network",
    metavar="REF",
    help="The code that builds the network of a state dict: module:factory or file.py:factory.",
)
@click.option("--network-args", type=Arguments(), help="The arguments of that factory, as JSON.")
@click.option(
    "--head", type=int, default=0, metavar="N", help="Which output of a network that has several."
)
@click.option("--axes", metavar="ZYX", help="The axes of a volume that does not say them.")
@click.option(
    "--series", type=int, metavar="N", help="Which image is read of a file that holds several."
)
@click.option("--json", "as_json", is_flag=True, help="Write JSON, for programs.")
@refusing
def inspect(file: str, as_json: bool, **values: object) -> None:
    """Describe a model, a volume, or an output and how far it is."""
    facts, text = describe_file(file, **values)  # type: ignore[arg-type]
    click.echo(json.dumps(facts, indent=1) if as_json else text)


@borrowed()
def describe_file(
    path: str | Path,
    *,
    network: str | None = None,
    network_args: Mapping[str, object] | None = None,
    head: int = 0,
    axes: str | None = None,
    series: int | None = None,
) -> tuple[dict[str, object], str]:
    """Return a model, a volume or an output as plain values and as text."""
    from tilepipe.storage.location import locate

    place = locate(path, "file")
    if isinstance(place, Path) and not place.exists():
        raise BadRequest(f"file (={path}) must be a model, a volume or an output; there is none")
    if place.suffix in MODELS and isinstance(place, Path):
        from tilepipe.models.model import load_model
        from tilepipe.models.spec import find_profile

        model = load_model(path, network=network, network_args=network_args, head=head)
        profile = find_profile(model)
        facts = {"model": str(path), "kind": model.kind, "digest": model.digest,
                 "parameters": model.parameters, "normalize": model.normalize,
                 "head": model.head, "outputs": model.outputs,
                 "labels": list(model.labels), "answer": model.answer,
                 "activation": profile.meaning.activation,
                 "provenance": dict(model.provenance), "trained": model.trained}  # fmt: skip
        return {**facts, **asdict(profile)}, describe_model(model, profile)
    from tilepipe.volumes.source import source_notices
    from tilepipe.volumes.volume import open_volume

    volume = open_volume(path, axes=axes, series=series)
    notices = source_notices(volume)
    values: dict[str, object] = {
        "volume": volume.path, "kind": volume.kind, "axes": volume.axes,
        "axes_assumed": volume.axes_assumed, "shape": volume.shape, "channels": volume.channels,
        "dtype": str(volume.dtype), "chunks": volume.chunks, "shards": volume.shards,
        "scale": volume.scale, "units": volume.units, "translation": volume.translation,
        "channel_names": volume.channel_names, "nbytes": volume.nbytes, "notices": notices,
    }  # fmt: skip
    output_values, text = _output(str(path))
    return {**values, **output_values}, "\n".join(
        filter(None, [describe_volume(volume, notices), text])
    )


def _output(path: str) -> tuple[dict[str, object], str]:
    """Describe how far an output of ours is, and with what it was made."""
    from tilepipe.runs.ledger import Ledger
    from tilepipe.runs.log import read_logs
    from tilepipe.volumes.output import Output

    output = Output.at(path)
    try:
        attributes = output.read_attributes()
    except BadRequest:
        return {}, ""
    ledger = Ledger.open(output, write=False)
    if "plan" not in attributes:
        return {"made_with": attributes}, ""
    plan = cast("Mapping[str, Mapping[str, object]]", attributes["plan"])
    rows = [("made from", plan["source"]["path"]), ("with", plan["model"]["path"])]
    live = ""
    values: dict[str, object] = {"made_with": attributes}
    if ledger is not None:
        with ledger:
            failed = ledger.failures
            rows.append(("tiles", f"{ledger.done} of {ledger.tiles} done"))
            rows += [("failed", f"tile {failure.index}, {failure.cause}") for failure in failed]
            values |= {"tiles": ledger.tiles, "done": ledger.done}
            values["failures"] = [asdict(failure) for failure in failed]
            progress = read_logs(output.ledger)
            shape = cast("list[int]", plan["source"]["shape"])
            voxels = math.prod(shape) / max(ledger.tiles, 1)
            live = describe_live(progress, done=ledger.done, tiles=ledger.tiles, voxels=voxels)
            values |= {"tiles_per_second": progress.rate, "retries": progress.retries}
            values["workers"] = {name: asdict(share) for name, share in progress.workers.items()}
    named = [(name, str(value)) for name, value in rows]
    return values, "\n".join(filter(None, [table(named), live]))


WORKERS = 20
"""Workers that are shown one by one."""


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
        ("context", f"{context_in_words(profile)} ({how})"),
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
    return table(rows)


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
        (
            "axes",
            f"{volume.axes}{assumed} = {comma(volume.shape)}{channels_in_words(volume.channels)}",
        ),
        ("type", f"{volume.dtype}, {describe_bytes(volume.nbytes)}"),
        ("chunks", comma(volume.chunks) + shards),
        ("voxel", " x ".join(units)),
    ]
    if any(volume.translation):
        rows.append(("lies at", ", ".join(f"{place:g}" for place in volume.translation)))
    if volume.channel_names:
        rows.append(("channels", ", ".join(name or "?" for name in volume.channel_names)))
    return table(rows) + "".join(f"\nnote: {notice}" for notice in notices)


def describe_live(progress: LogSummary, *, done: int, tiles: int, voxels: float) -> str:
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
            f" the last {duration(ago)} ago",
        )
    ]
    if progress.rate and done < tiles:
        left = (tiles - done) / progress.rate
        rows.append(
            (
                "rate",
                f"{progress.rate:.3g} tiles/s, {progress.rate * voxels / 1e6:.3g} megavoxels/s;"
                f" about {duration(left)} left",
            )
        )
    devices = describe_devices(
        len(progress.workers),
        seconds=sum(share.seconds for share in shares),
        computing=sum(share.compute for share in shares),
        starved=sum(share.starved for share in shares),
        voxels=round(computed * voxels),
    )
    rows.append(("devices", devices))
    latest = sorted(progress.workers.items(), key=lambda item: -item[1].ended)
    for name, share in latest[:WORKERS]:
        rate = share.tiles * voxels / max(share.seconds, 1.0) / 1e6
        rows.append(
            (
                "worker",
                f"{name}: {counted(share.tiles, 'tile')}, {rate:.3g} megavoxels/s,"
                f" the last {duration(progress.now - share.ended)} ago",
            )
        )
    if len(latest) > WORKERS:
        rows.append(("", f"and {len(latest) - WORKERS} workers more: see --json"))
    return table(rows)


def _trained(model: Model) -> str:
    """Return the context that a model's file says it was trained with."""
    if model.trained is None:
        return ""
    sizes = (cast("list[int]", model.trained[name]) for name in ("before", "after", "step"))
    return ", with a context of {} before, {} after, step {}".format(*map(comma, sizes))


def _ends(profile: Profile) -> str:
    meaning = profile.meaning
    if not meaning.activation:
        return f" of {meaning.strange}" if meaning.strange else ""
    apart = ", each a probability of its own" if meaning.apart and profile.classes > 1 else ""
    return f" after a {meaning.activation}{apart}"
