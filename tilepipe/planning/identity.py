"""What an output's bytes depend on, so that a run goes on only where they are the same.

All of a plan is in it but what is named in `APART`, each with its reason; so a new option, or a new
fact of a source, is part of it until somebody shows that no byte depends on it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, cast

from tilepipe import __version__
from tilepipe.errors import BadRequest
from tilepipe.text import comma

if TYPE_CHECKING:
    from collections.abc import Mapping

    from tilepipe.options import Options
    from tilepipe.planning.parts import Network, Source
    from tilepipe.planning.plan import Plan

ALGORITHM = 1
"""Which bytes the code gives for the same plan. It must be raised with every change after which any
byte of any output may be another, be it the last bit of a sum: to rules, kernels, the sweep, boxes,
mirroring, normalisation, statistics or activations. Outputs of another number are not gone on
with. What exact arithmetic shows of such a change, ``tests/test_identity.py`` finds."""

APART = {
    "target": "where the output lies is not in it",
    "normalization": "the ledger keeps it beside the identity, since it may need a pass first",
    "profile": "follows from the model, by the algorithm",
    "costs": "follow from the sizes",
    "why": "words",
    "notices": "words",
    "source.path": "`source.identity` holds it, links resolved",
    "source.kind": "words",
    "source.chunks": "how much is read at once, not what is read",
    "source.nbytes": "follows from shape, channels and type",
    "model.path": "the same file may lie elsewhere: `model.digest` is of its content",
    "model.kind": "words",
    "model.parameters": "follow from the model",
    "model.labels": "of the model's content",
    "options.activation": "`activation` is what it comes to, with what the network does itself",
    "options.axes": "`source.dimensions` says which axis is which, whoever said it",
    "options.series": "`source.identity` says which image it is",
    "options.network": "`model.digest` is of its code, which may lie elsewhere",
    "options.normalize": "`normalize` is what it comes to with the model's own",
    "options.tile": "`sizes` has what it comes to",
    "options.chunks": "`sizes` has what they come to",
    "options.shards": "`sizes` has what they come to",
    "options.threads": "`sizes` has what they come to",
    "options.durable": "when a tile counts as finished, not what it holds",
    "options.memory": "the sizes that were chosen from it are kept",
    "options.device": "`sizes` has its kind; which of several like ones does not matter",
    "options.strategy": "`strategy` and `sizes.sweep` are what it comes to",
}
"""What is left out of the identity, and why no byte depends on it."""
FOLLOWING = {
    "model.digest": ("options.head", "options.network_args"),
    "source.identity": ("options.level", "options.channels"),
    "limit": (),
    "activation.by": ("activation.name",),
    "activation.apart": ("activation.name",),
    "answer.stacked": ("activation.name", "activation.apart"),
    "answer.channels": (),
    "answer.dtype": (),
    "sizes.window": (),
    "sizes.sweep": (),
}
"""What differs because something else does: not named where that does, or (empty) anything."""
CALLED = {
    "model.digest": "model with its --network",
    "source.identity": "source",
    "source.dimensions": "axes",
    "activation.name": "activation",
    "activation.apart": "overlapping classes",
}
"""How what differs is called, where that is not its last name."""


def ground(options: Options, source: Source, model: Network, normalize: str) -> dict[str, object]:
    """Return the part of the identity that is known before sizes are chosen."""
    choices = asdict(options)
    choices["threshold"] = 0.5 if options.threshold is None else options.threshold
    choices["network_args"] = dict(options.network_args or {})
    parts = {"options": choices, "source": asdict(source), "model": asdict(model)}
    return _relevant({**parts, "normalize": normalize})


def identity(plan: Plan) -> dict[str, object]:
    """Return all that the result's bytes depend on, as plain values."""
    known = ground(plan.options, plan.source, plan.model, plan.normalize)
    return {"algorithm": ALGORITHM, **_relevant(asdict(plan)), **known}


def plain(value: object) -> object:
    """Return the value as JSON gives it back: tuples as lists."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def check_version(target: str, ledger: Mapping[str, object]) -> None:
    """Refuse to go on with an output that another algorithm began; of the ledger's plan."""
    earlier = ledger.get("identity")
    if isinstance(earlier, dict) and earlier.get("algorithm") == ALGORITHM:
        return
    plan = ledger.get("plan")
    version = plan.get("tilepipe", "?") if isinstance(plan, dict) else "?"
    raise BadRequest(
        f"output (={target}) was begun by tilepipe {version} of another algorithm than this"
        f" {__version__}, so its voxels may differ; go on with that version, name another output,"
        " or replace it with --overwrite"
    )


def check_same(target: str, earlier: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Refuse a request that would give other bytes than the run that has begun the output.

    Both are identities. ``earlier`` is empty where there was no run; ``current`` may be a part of
    an identity, and then that part is compared.
    """
    if not earlier:
        return
    old, new = _flat({name: earlier.get(name) for name in current}), _flat(current)
    if unlike := sorted(old.keys() ^ new.keys()):
        raise BadRequest(
            f"output (={target}) was begun by another version of tilepipe, for which"
            f" {CALLED.get(unlike[0], unlike[0].rpartition('.')[2])} was no part of the plan; go on"
            " with that version, name another output, or replace it with --overwrite"
        )
    changed = [name for name in new if json.dumps(old[name]) != json.dumps(new[name])]
    if causes := _causes(changed):
        differences = ", ".join(
            f"{CALLED.get(name, name.rpartition('.')[2])} {_shown(old[name])}, not"
            f" {_shown(new[name])}"
            for name in causes
        )
        raise BadRequest(
            f"output (={target}) was begun with another plan ({differences}); go on with the same"
            " options, name another output, or replace it with --overwrite"
        )


def _causes(changed: list[str]) -> list[str]:
    """Return what differs of itself; all of it where nothing does."""
    places = {"source.identity", "source.dimensions", "options.level"}
    facts = [name for name in changed if name.startswith("source.") and name not in places]
    hidden = [] if places.isdisjoint(changed) else facts
    causes = [name for name in changed if name not in hidden and not _follows(name, changed)]
    return causes or changed


def _follows(name: str, changed: list[str]) -> bool:
    causes = FOLLOWING.get(name)
    return causes is not None and (not causes or any(cause in changed for cause in causes))


def _shown(value: object) -> str:
    if isinstance(value, list):
        return comma(cast("list[int]", value))
    text = "none" if value is None else str(value)
    return text[:12] if len(text) == 64 else text[:200]


def _relevant(content: Mapping[str, object], above: str = "") -> dict[str, object]:
    """Return the content without the entries that `APART` names."""
    relevant = {}
    for name, value in content.items():
        if f"{above}{name}" not in APART:
            is_inner = isinstance(value, dict) and not above
            relevant[name] = (
                _relevant(cast("dict[str, object]", value), f"{name}.")
                if is_inner
                else plain(value)
            )
    return relevant


def _flat(content: Mapping[str, object]) -> dict[str, object]:
    """Return the content with names such as ``sizes.tile``, two levels deep."""
    flat: dict[str, object] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat
