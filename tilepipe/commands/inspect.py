"""The story of ``tilepipe inspect``: what a file is, in words and as plain values."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, cast

from tilepipe.commands.words import describe_live, describe_model, describe_volume
from tilepipe.errors import BadRequest
from tilepipe.host.process import borrowed
from tilepipe.runs.ledger import Ledger, folder_of
from tilepipe.runs.log import read_progress
from tilepipe.storage.location import locate
from tilepipe.volumes.output import read_attributes
from tilepipe.volumes.source import source_notices
from tilepipe.volumes.volume import open_volume

if TYPE_CHECKING:
    from collections.abc import Mapping

MODELS = (".pt", ".pth", ".pt2", ".ckpt", ".ts")
"""Names of model files; everything else is looked at as a volume first."""


@borrowed()
def inspect(
    path: str | Path,
    *,
    network: str | None = None,
    network_args: Mapping[str, object] | None = None,
    head: int = 0,
    axes: str | None = None,
    series: int | None = None,
) -> tuple[dict[str, object], str]:
    """Return a model, a volume or an output as plain values and as text."""
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
    volume = open_volume(path, axes=axes, series=series)
    notices = source_notices(volume)
    values: dict[str, object] = {
        "volume": volume.path, "kind": volume.kind, "axes": volume.axes,
        "axes_assumed": volume.axes_assumed, "shape": volume.shape, "channels": volume.channels,
        "dtype": str(volume.dtype), "chunks": volume.chunks, "shards": volume.shards,
        "scale": volume.scale, "units": volume.units, "translation": volume.translation,
        "channel_names": volume.channel_names, "nbytes": volume.nbytes, "notices": notices,
    }  # fmt: skip
    made, text = _output(str(path))
    return {**values, **made}, "\n".join(filter(None, [describe_volume(volume, notices), text]))


def _output(path: str) -> tuple[dict[str, object], str]:
    """Describe how far an output of ours is, and with what it was made."""
    try:
        attributes = read_attributes(path)
    except BadRequest:
        return {}, ""
    ledger = Ledger.open(path, write=False)
    if "plan" not in attributes:
        return {"made_with": attributes}, ""
    plan = cast("Mapping[str, Mapping[str, object]]", attributes["plan"])
    lines = [f"made from      {plan['source']['path']}", f"with           {plan['model']['path']}"]
    values: dict[str, object] = {"made_with": attributes}
    if ledger is not None:
        with ledger:
            failed = ledger.failures
            lines.append(f"tiles          {ledger.done} of {ledger.tiles} done")
            lines += [f"failed         tile {failure.index}, {failure.cause}" for failure in failed]
            values |= {"tiles": ledger.tiles, "done": ledger.done}
            values["failures"] = [asdict(failure) for failure in failed]
            progress = read_progress(folder_of(path))
            shape = cast("list[int]", plan["source"]["shape"])
            lines.append(
                describe_live(
                    progress,
                    done=ledger.done,
                    tiles=ledger.tiles,
                    voxels=math.prod(shape) / max(ledger.tiles, 1),
                )
            )
            values |= {"tiles_per_second": progress.rate, "retries": progress.retries}
            values["workers"] = {name: asdict(share) for name, share in progress.workers.items()}
    return values, "\n".join(filter(None, lines))
