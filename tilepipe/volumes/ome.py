"""OME-Zarr image metadata and the JSON of Zarr nodes, as plain values; no array is opened here.

Reads OME 0.4 (Zarr v2) and 0.5 (Zarr v3), and the older 0.1 to 0.3 where they say the same.
Source: the NGFF specification, https://ngff.openmicroscopy.org.
"""

from __future__ import annotations

import json
import math
import operator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from tilepipe.errors import BadRequest
from tilepipe.storage.location import can_list, folders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from tilepipe.storage.location import Place

AXES = "tzyxc"
"""The axes a volume may have, one letter each."""
_TYPES = {"t": "time", "c": "channel"}
_NAMES = {"channel": "c", "time": "t", "s": "c"}


@dataclass(frozen=True, slots=True)
class ZarrNode:
    """The metadata of one Zarr array or group."""

    kind: Literal["array", "group"]
    """What the node is."""
    zarr_format: Literal[2, 3]
    """Version of the Zarr format."""
    metadata: dict[str, object]
    """What says how voxels are stored (``zarr.json`` without attributes, or ``.zarray``)."""
    attributes: dict[str, object]
    """The user's attributes."""


@dataclass(frozen=True, slots=True)
class Multiscale:
    """One image of an OME-Zarr group."""

    version: str
    """Version of the OME metadata; ``?`` where it is not said."""
    axes: tuple[str, ...] | None
    """One letter or name per dimension, ``c`` among them; None where the metadata has none."""
    units: tuple[str | None, ...] | None
    """Unit per dimension, None where unknown."""
    paths: tuple[str, ...]
    """The arrays, full resolution first, relative to the group."""
    scales: tuple[tuple[float, ...] | None, ...]
    """Per array, the size of a voxel per dimension, in ``units``; None where it is not said."""
    translations: tuple[tuple[float, ...] | None, ...] = ()
    """Per array, where its first voxel lies, in ``units``; None where it is not said."""
    channel_names: tuple[str, ...] = ()
    """What the channels are called, "" for one without a name; empty where nothing says it."""


def read_node(folder: Place) -> ZarrNode | None:
    """Return the metadata of the Zarr node in ``folder``; None where there is no node.

    Version 3 wins where both are there. Raises BadRequest for metadata that is not JSON.
    """
    metadata = _read_json(folder / "zarr.json")
    if metadata is not None:
        attributes = _mapping(metadata.pop("attributes", {}), folder / "zarr.json")
        metadata.pop("consolidated_metadata", None)
        kind = metadata.get("node_type")
        if kind == "array":
            return ZarrNode("array", 3, metadata, attributes)
        if kind == "group":
            return ZarrNode("group", 3, metadata, attributes)
        raise BadRequest(f"metadata (={folder / 'zarr.json'}) must say node_type array or group")
    array = _read_json(folder / ".zarray")
    if array is not None:
        return ZarrNode("array", 2, array, _read_json(folder / ".zattrs") or {})
    group = _read_json(folder / ".zgroup")
    if group is not None:
        return ZarrNode("group", 2, group, _read_json(folder / ".zattrs") or {})
    return None


def is_array(folder: Place) -> bool:
    """Return whether ``folder`` is a Zarr array; what cannot be read is none."""
    try:
        metadata = _read_json(folder / "zarr.json")
        if metadata is not None:
            return metadata.get("node_type") == "array"
        return _read_json(folder / ".zarray") is not None
    except (BadRequest, OSError):
        return False


def _read_json(path: Place) -> dict[str, object] | None:
    """Return a JSON object; None where there is no such file."""
    try:
        return _mapping(json.loads(path.read_bytes()), path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None
    except (ValueError, RecursionError) as error:
        if isinstance(error, BadRequest):
            raise
        raise BadRequest(f"metadata (={path}) must be JSON; it is corrupt: {error}") from error
    except OSError as error:
        raise BadRequest(f"metadata (={path}) cannot be read: {error}") from error


def _mapping(value: object, path: Place) -> dict[str, object]:
    if not isinstance(value, dict):
        raise BadRequest(f"metadata (={path}) must be a JSON object; it is corrupt")
    return value


def count_multiscales(attributes: Mapping[str, object]) -> int:
    """Return how many images a group's attributes hold."""
    images = _holder(attributes).get("multiscales", [])
    return len(images) if isinstance(images, list) else 0


def _holder(attributes: Mapping[str, object]) -> Mapping[str, object]:
    ome = attributes.get("ome")
    return ome if isinstance(ome, dict) else attributes


def parse_multiscale(attributes: Mapping[str, object], number: int = 0) -> Multiscale | None:
    """Return an image of a group's attributes, the first or another; None where there is none.

    Transformations of the dataset come before those of the whole multiscale. Raises ValueError
    for metadata that breaks the specification, saying what.
    """
    holder = _holder(attributes)
    if "multiscales" not in holder:
        return None
    images = holder["multiscales"]
    if not isinstance(images, list) or not images or not isinstance(images[number], dict):
        raise ValueError("multiscales must be a list of images")
    image = images[number]
    datasets = image.get("datasets")
    if not isinstance(datasets, list) or not datasets:
        raise ValueError("datasets must be a list of arrays")
    axes, units = _parse_axes(image.get("axes"))
    common = image.get("coordinateTransformations")
    paths, scales, translations = [], [], []
    for dataset in datasets:
        path = dataset.get("path") if isinstance(dataset, dict) else None
        if not isinstance(path, str):
            raise ValueError("each dataset must have a path")
        paths.append(_inside(path))
        own = dataset.get("coordinateTransformations")
        scale, translation = _parse_transformations((own, common), axes)
        scales.append(scale)
        translations.append(translation)
    return Multiscale(
        str(holder.get("version", image.get("version", "?"))),
        axes,
        units,
        tuple(paths),
        tuple(scales),
        tuple(translations),
        _parse_channels(holder.get("omero")),
    )


def _parse_channels(omero: object) -> tuple[str, ...]:
    channels = omero.get("channels") if isinstance(omero, dict) else None
    if not isinstance(channels, list):
        return ()
    return tuple(
        str(channel.get("label") or "") if isinstance(channel, dict) else "" for channel in channels
    )


def _parse_axes(
    value: object,
) -> tuple[tuple[str, ...] | None, tuple[str | None, ...] | None]:
    """Return names and units; version 0.3 has bare names, older ones nothing."""
    if value is None:
        return None, None
    if not isinstance(value, list):
        raise ValueError("axes must be a list")
    names, units = [], []
    for axis in value:
        entry = {"name": axis} if isinstance(axis, str) else axis
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
            raise ValueError("each axis must have a name")
        name, unit = entry["name"].lower(), entry.get("unit")
        kind = entry.get("type")
        if name not in AXES and isinstance(kind, str):
            name = _NAMES.get(kind, name)
        names.append(_NAMES.get(name, name))
        units.append(unit if isinstance(unit, str) else None)
    return tuple(names), tuple(units)


def _parse_transformations(
    lists: Sequence[object], axes: tuple[str, ...] | None
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    """Return scale and translation of transformations one after the other; None for none.

    A scale after a translation scales that, too.
    """
    scale: tuple[float, ...] | None = None
    translation: tuple[float, ...] | None = None
    for value in lists:
        if value is None:
            continue
        if not isinstance(value, list):
            raise ValueError("coordinateTransformations must be a list")
        for entry in value:
            if not isinstance(entry, dict):
                raise ValueError("each coordinate transformation must be an object")
            kind = entry.get("type")
            if kind == "identity":
                continue
            if kind not in ("scale", "translation") or entry.get(kind) is None:
                raise ValueError(
                    f"coordinate transformation (={json.dumps(entry)[:100]}) must be a scale or a"
                    " translation, in numbers"
                )
            numbers = _parse_numbers(kind, entry[kind], axes)
            if kind == "scale":
                scale = _combine(operator.mul, scale, numbers)
                if translation is not None:
                    translation = _combine(operator.mul, translation, numbers)
            else:
                translation = _combine(operator.add, translation, numbers)
    return scale, translation


def _parse_numbers(kind: str, value: object, axes: tuple[str, ...] | None) -> tuple[float, ...]:
    right = isinstance(value, list) and (axes is None or len(value) == len(axes))
    if right and isinstance(value, list):
        right = all(
            isinstance(n, (int, float)) and not isinstance(n, bool) and math.isfinite(n)
            for n in value
        ) and (kind == "translation" or all(n > 0 for n in value))
    if not right or not isinstance(value, list):
        sort = "positive number" if kind == "scale" else "number"
        raise ValueError(f"{kind} (={value}) must be one {sort} per axis")
    return tuple(float(n) for n in value)


def _combine(
    how: Callable[[float, float], float], first: tuple[float, ...] | None, second: tuple[float, ...]
) -> tuple[float, ...]:
    if first is None:
        return second
    if len(first) != len(second):
        raise ValueError("all scales and translations must have one number per axis")
    return tuple(map(how, first, second))


def _inside(path: str) -> str:
    """Return a dataset's path; raises ValueError for one that leaves the group's folder."""
    parts = path.replace("\\", "/").split("/")
    if path.startswith(("/", "\\")) or ".." in parts or ":" in path or "\0" in path:
        raise ValueError(f"dataset path (={path}) leaves the image's folder")
    return path


def parent_image(path: Place) -> tuple[Multiscale | None, int]:
    """Return the image of which the array ``path`` is a resolution, and which; else None."""
    try:
        node = read_node(path.parent)
        count = 0 if node is None else count_multiscales(node.attributes)
        for number in range(count):
            image = None if node is None else parse_multiscale(node.attributes, number)
            if image is not None and path.name in image.paths:
                return image, image.paths.index(path.name)
    except (OSError, ValueError):
        return None, 0
    return None, 0


def no_array(path: Place) -> str:
    """Return why a folder is no volume, naming up to five that it holds."""
    if not can_list(path):
        return f"source (={path}) must be a Zarr array or image; there is no metadata of one"
    if not any(path.iterdir()):
        return f"source (={path}) holds nothing: there is no Zarr"
    arrays: list[str] = []
    folders_left, looks = [path], 0
    while folders_left and len(arrays) <= 5 and looks <= 1000:
        folder, node, image = folders_left.pop(), None, False
        looks += 1
        with suppress(ValueError):
            node = read_node(folder)
            image = node is not None and parse_multiscale(node.attributes) is not None
        if node is not None and (node.kind == "array" or image):
            arrays.append(str(folder).removeprefix(str(path)).lstrip("/"))
        else:
            folders_left += reversed(folders(folder))
    if not arrays:
        return f"source (={path}) must be a Zarr array or image; the folder holds none"
    listed = ", ".join(arrays[:5]) + (", ..." if len(arrays) > 5 else "")
    return f"source (={path}) is a group, not an array; name one inside it: {listed}"


def dimension_names(node: ZarrNode, path: Place) -> tuple[str, ...] | None:
    """Return the axes that the array itself states; None where it says nothing of use."""
    stated = node.metadata.get("dimension_names") or node.attributes.get("_ARRAY_DIMENSIONS")
    if not isinstance(stated, list):
        return None
    names = [str(name).lower() if isinstance(name, str) else "" for name in stated]
    names = [_NAMES.get(name, name) for name in names]
    are_axes = [len(name) == 1 and name in AXES for name in names]
    if not any(are_axes):
        return None
    if not all(are_axes):
        raise BadRequest(f"source (={path}) has axes {stated}; name them with axes (of {AXES})")
    return tuple(names)


def image_attributes(
    *,
    axes: str,
    scale: Sequence[float],
    units: Sequence[str | None],
    name: str,
    version: Literal["0.4", "0.5"],
    translation: Sequence[float] = (),
) -> dict[str, object]:
    """Return the OME attributes of a group whose only resolution is the array ``0``.

    ``axes``, ``scale``, ``units`` and ``translation`` are per dimension, the channel axis among
    them; a translation of zeros is left out.
    """
    described = []
    for letter, unit in zip(axes, units, strict=True):
        axis = {"name": letter, "type": _TYPES.get(letter, "space")}
        described.append(axis if unit is None or letter == "c" else {**axis, "unit": unit})
    transformations: list[dict[str, object]] = [
        {"type": "scale", "scale": [float(n) for n in scale]}
    ]
    if any(translation):
        transformations.append(
            {"type": "translation", "translation": [float(n) for n in translation]}
        )
    image: dict[str, object] = {
        "name": name,
        "axes": described,
        "datasets": [{"path": "0", "coordinateTransformations": transformations}],
    }
    if version == "0.4":
        return {"multiscales": [{"version": "0.4", **image}]}
    return {"ome": {"version": "0.5", "multiscales": [image]}}
