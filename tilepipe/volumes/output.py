"""An output, which is an OME-Zarr group with one array: where it lies, how it begins, what it says.

`Output.at` looks once at what the user named, links and all; every function that reads or writes an
output takes that value.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast
from uuid import uuid4

import numpy as np
import zarr

from tilepipe.errors import BadRequest
from tilepipe.storage.contents import check_ours, check_ways, clear, look
from tilepipe.storage.guarded import GuardedStore, NoGuard
from tilepipe.storage.location import check_writable, locate
from tilepipe.storage.names import LEDGER, LOCK, LedgerFiles
from tilepipe.storage.objects import ObjectKey, explain, plain_errors
from tilepipe.volumes.ome import image_attributes, is_array, parse_multiscale, read_node
from tilepipe.volumes.output_array import OutputArray, check_sizes, create_group, per_axis

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from contextlib import AbstractContextManager

    from numpy.typing import DTypeLike
    from zarr.core.common import JSON

    from tilepipe.storage.contents import Holding
    from tilepipe.storage.guarded import Guard
    from tilepipe.storage.location import Place
    from tilepipe.volumes.ome import ZarrNode

OURS = "tilepipe"
"""The group attribute under which our own attributes lie; it marks an output as ours."""


@dataclass(frozen=True, slots=True)
class Output:
    """Where the answer of a run lies, or will lie, with its ledger; nothing need be there yet."""

    name: str
    """The path or the address as it was named; messages show it."""
    place: Place
    """The same place with links resolved."""

    @classmethod
    def at(cls, path: str | Path) -> Output:
        """Return the output that a path or an address names; BadRequest for what is neither."""
        return cls(str(path), locate(path, "output"))

    def __str__(self) -> str:
        return self.name

    @property
    def ledger(self) -> LedgerFiles:
        """Return where the files of its ledger lie."""
        return LedgerFiles(self.place / LEDGER)

    def check_apart(self, source_path: str | Path, *, touch: bool = True) -> None:
        """Check that the output can be created here without touching the source.

        Raises BadRequest for an existing file, a folder that is missing or cannot be written, and a
        place equal to, inside or containing the source or inside another array. What else may lie
        here is for `create` to judge. Leaves nothing behind; writes nothing to a bucket unless
        ``touch``.
        """
        place, source = self.place, locate(source_path, "source")
        if place == source or _is_same_file(place, source):
            raise BadRequest(f"output (={self}) must not be the source (={source_path})")
        if source in place.parents:
            raise BadRequest(f"output (={self}) must not lie inside the source (={source_path})")
        if place in source.parents:
            raise BadRequest(f"output (={self}) must not contain the source (={source_path})")
        if isinstance(place, Path) and place.exists() and not place.is_dir():
            raise BadRequest(f"output (={self}) is an existing file; name another path")
        self._check_parent()
        check_ways(place)
        if touch or isinstance(place, Path):
            self._check_writable()
        for folder in place.parents:
            if is_array(folder):
                raise BadRequest(f"output (={self}) must not lie inside the array {folder}")

    def check_free(self, *, overwrite: bool) -> None:
        """Raise BadRequest unless the place is free, or has an output to be overwritten.

        It is free where there is nothing, or a folder that holds nothing but leases.
        """
        self._look_free(overwrite=overwrite)

    def _look_free(self, *, overwrite: bool) -> Holding:
        """Return what lies here; raises as `check_free` does."""
        self._check_parent()
        holding = look(self.place)
        if holding == "a file":
            raise BadRequest(f"output (={self}) is an existing file; name another path")
        if holding != "more":
            return holding
        if not (self._is_ours() or self.ledger.plan.is_file()):
            raise BadRequest(
                f"output (={self}) exists and is no output of tilepipe, so it is never removed; "
                "name another path"
            )
        if not overwrite:
            raise BadRequest(f"output (={self}) exists; overwrite it or name another path")
        check_ours(self.place)
        return holding

    def create(
        self,
        *,
        axes: str,
        shape: Sequence[int],
        dtype: DTypeLike,
        chunks: Sequence[int],
        shards: Sequence[int] | None,
        scale: Sequence[float],
        units: Sequence[str | None],
        attributes: Mapping[str, object],
        translation: Sequence[float] | None = None,
        ome_version: Literal["0.4", "0.5"] = "0.5",
        overwrite: bool = False,
    ) -> None:
        """Create an OME-Zarr group whose array ``0`` is all zeros.

        ``axes`` are ``zyx`` and the like, with ``c`` in front for channels; ``shape`` is per axis
        of ``axes``. ``chunks``, ``shards``, ``scale``, ``units`` and ``translation``, where it
        lies, may leave out the channel axis: then a chunk holds one channel, a shard all of them.
        ``attributes`` are JSON, kept for us.

        ``overwrite`` removes an earlier output of ours; nothing else is ever removed. Raises
        BadRequest where something else lies here, or the sizes do not fit.
        """
        kind = np.dtype(dtype).newbyteorder("=")
        if kind != np.float32 and kind.kind != "u":
            raise BadRequest(f"dtype (={kind}) of an output must be float32 or an unsigned integer")
        if ome_version not in ("0.4", "0.5"):
            raise BadRequest(f"ome_version (={ome_version}) must be 0.4 or 0.5")
        if ome_version == "0.4" and shards is not None:
            raise BadRequest(
                f"shards (={tuple(shards)}) need Zarr v3; leave them out or take ome_version 0.5"
            )
        whole = tuple(int(n) for n in shape)
        chunk = per_axis("chunks", tuple(chunks), 1, axes)
        shard = None if shards is None else per_axis("shards", tuple(shards), whole[0], axes)
        check_sizes(axes, whole, chunk, shard, kind.itemsize)
        described = image_attributes(
            axes=axes,
            scale=per_axis("scale", tuple(float(n) for n in scale), 1.0, axes),
            units=per_axis("units", tuple(units), None, axes),
            name=self.place.stem,
            version=ome_version,
            translation=()
            if translation is None
            else per_axis("translation", tuple(float(n) for n in translation), 0.0, axes),
        )
        described[OURS] = dict(attributes)
        try:
            if self._look_free(overwrite=overwrite) == "more":
                clear(self.place)
            with _plain_errors(self.place):
                create_group(self.place, axes, whole, kind, chunk, shard, described)
        except OSError as error:
            raise BadRequest(f"output (={self}) cannot be created: {error}") from error

    def open(self, *, guard: Guard | None = None, durable: bool = True) -> OutputArray:
        """Open an output that `create` has created, for writing; BadRequest for anything else.

        ``guard`` is asked before each object that is written; without one there must be nobody
        else who writes there. What is ``durable`` outlives a power failure as soon as it is
        written.
        """
        node = self._node()
        image = parse_multiscale(node.attributes)
        if image is None or image.axes is None:
            raise self._foreign()
        if read_node(self.place / "0") is None:
            raise BadRequest(f"output (={self}) has lost its array 0")
        try:
            store = GuardedStore.of(self.place / "0", guard or NoGuard(), durable=durable)
            array = zarr.open_array(store, mode="r+", zarr_format=node.zarr_format)
        except Exception as error:
            cause = f"{type(error).__name__}: {explain(error)}"[:200]
            raise BadRequest(
                f"output (={self}) has an array 0 that cannot be opened: {cause}"
            ) from error
        axes = "".join(image.axes)
        first = 1 if axes.startswith("c") else 0
        return OutputArray(
            path=str(self.place),
            axes=axes[first:],
            shape=array.shape[first:],
            channels=array.shape[0] if first else None,
            dtype=array.dtype,
            chunks=array.chunks[first:],
            shards=None if array.shards is None else array.shards[first:],
            _array=array,
            _store=store,
            _guard=guard or NoGuard(),
        )

    def read_attributes(self) -> dict[str, object]:
        """Return our own attributes; BadRequest where there is no output of ours.

        They are read anew at each call, since another run may have changed them.
        """
        return _ours(self._node())

    def update_attributes(
        self, attributes: Mapping[str, object], *, guard: Guard | None = None
    ) -> None:
        """Set our own attributes; those not named are kept. There may be one writer at a time.

        ``guard`` is asked before they are written; without one it must be sure that we own the
        output.
        """
        node = self._node()
        with _plain_errors(self.place):
            store = GuardedStore.of(self.place, guard or NoGuard())
            group = zarr.open_group(
                store, mode="r+", zarr_format=node.zarr_format, use_consolidated=False
            )
            group.attrs[OURS] = cast("dict[str, JSON]", {**_ours(node), **attributes})
            store.sync()

    def _node(self) -> ZarrNode:
        """Return the metadata of our group; BadRequest where there is none."""
        try:
            node = read_node(self.place)
        except (BadRequest, OSError):
            node = None
        if node is None or node.kind != "group" or not isinstance(node.attributes.get(OURS), dict):
            raise self._foreign()
        return node

    def _is_ours(self) -> bool:
        try:
            self._node()
        except BadRequest:
            return False
        return True

    def _foreign(self) -> BadRequest:
        return BadRequest(f"output (={self}) is no output of tilepipe")

    def _check_writable(self) -> None:
        if isinstance(self.place, Path):
            folder: Place = self.place if self.place.exists() else self.place.parent
        elif not self.place.path:
            raise BadRequest(f"output (={self}) must be a path in a bucket, not all of it")
        else:
            folder = self.ledger.folder  # where what is there for a moment disturbs nobody
        try:
            check_writable(folder, f"{LOCK}.{uuid4().hex}")
        except OSError as error:
            raise BadRequest(f"output (={self}) needs {folder} to be writable: {error}") from error

    def _check_parent(self) -> None:
        if isinstance(self.place, Path) and not (parent := self.place.parent).is_dir():
            is_file = "is a file" if parent.exists() else "does not exist; create it first"
            raise BadRequest(f"output (={self}) needs the folder {parent}, which {is_file}")


def _ours(node: ZarrNode) -> dict[str, object]:
    return cast("dict[str, object]", node.attributes[OURS])


def _is_same_file(place: Place, other: Place) -> bool:
    if isinstance(place, Path) and isinstance(other, Path):
        return place.exists() and other.exists() and place.samefile(other)
    return False


def _plain_errors(place: Place) -> AbstractContextManager[None]:
    """Raise as an OSError what zarr hands on from a store."""
    return plain_errors(place) if isinstance(place, ObjectKey) else nullcontext()
