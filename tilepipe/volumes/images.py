"""What a Zarr group holds: its images, of which one is read, and what lies beside them."""

from __future__ import annotations

import re
import threading
import warnings
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import zarr

from tilepipe.errors import BadRequest
from tilepipe.storage.location import can_list, folders, locate, zarr_store
from tilepipe.storage.objects import explain
from tilepipe.volumes import tiff
from tilepipe.volumes.ome import count_multiscales, parse_multiscale, read_node

if TYPE_CHECKING:
    from zarr.types import AnyArray

    from tilepipe.storage.location import Place
    from tilepipe.volumes.ome import Multiscale, ZarrNode

LAYOUT = "bioformats2raw.layout"
"""The attribute of a group whose images are the groups 0, 1, 2, ... inside it."""
SHOWN = 5
"""What is named at most."""


_warnings_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Chosen:
    """One image of a group."""

    image: Multiscale
    group: Place
    """Where its arrays lie: the group itself, or one inside it."""
    notices: tuple[str, ...]
    """What is to be said of the others."""


def choose_image(path: Place, node: ZarrNode, series: int | None) -> Chosen | None:
    """Return the image of a group that is read; None where there is none.

    Of several ``multiscales`` it is the first, as the specification has it, of several groups
    none: then BadRequest, as for a number that is no image's.
    """
    images = find_images(path, node)
    if not images:
        return None
    count, several = len(images), len({group for group, _ in images}) > 1
    if series is None and several:
        raise BadRequest(
            f"source (={path}) holds {count} images, 0 to {count - 1}; choose one with series, or"
            f" name {images[0][0]}"
        )
    if series is not None and not 0 <= series < count:
        numbers = f"be from 0 to {count - 1}, the images" if count > 1 else "be 0, the image"
        raise BadRequest(f"series (={series}) must {numbers} of {path}")
    group, number = images[series or 0]
    inner = node if group == path else read_node(group)
    image = None if inner is None else _parsed(group, inner, number)
    if image is None:
        return None
    notice = f"the source holds {count} images: number {series or 0} is read (--series)"
    return Chosen(image, group, (notice,) if count > 1 else ())


def find_images(path: Place, node: ZarrNode) -> list[tuple[Place, int]]:
    """Return the images of a group: the group of each, and its number in that group."""
    if count := count_multiscales(node.attributes):
        return [(path, number) for number in range(count)]
    ome = node.attributes.get("ome")
    if LAYOUT not in node.attributes and not (isinstance(ome, dict) and LAYOUT in ome):
        return []
    listed = read_node(path / "OME")
    ome_group = {} if listed is None else listed.attributes.get("ome", listed.attributes)
    names = ome_group.get("series") if isinstance(ome_group, dict) else None
    if isinstance(names, list) and all(re.fullmatch(r"\w+", str(name)) for name in names):
        return [(path / str(name), 0) for name in names]
    groups: list[tuple[Place, int]] = []
    while True:
        group = path / str(len(groups))
        inner = read_node(group)
        if inner is None or not count_multiscales(inner.attributes):
            return groups
        groups.append((group, 0))


def count_images(path: str | Path) -> int:
    """Return how many images a file or a group holds; 1 for what is no image at all."""
    place = locate(path, "source")
    if isinstance(place, Path) and place.is_file():
        return tiff.count_images(place)
    node = read_node(place)
    return 1 if node is None or node.kind == "array" else max(1, len(find_images(place, node)))


def lying_beside(path: str | Path, series: int | None) -> list[str]:
    """Return what to say of labels, arrays and groups that lie beside a source's image."""
    place = locate(path, "source")
    if isinstance(place, Path) and not place.is_dir():
        return []
    node = read_node(place)
    images = [] if node is None or node.kind == "array" else find_images(place, node)
    if not images:
        return []
    group = images[series or 0][0]
    inner = read_node(group)
    attributes = {} if inner is None else inner.attributes
    used = {"labels", "OME"}
    for number in range(count_multiscales(attributes)):
        with suppress(ValueError):  # only the image that is read must be right
            image = parse_multiscale(attributes, number)
            used |= set() if image is None else {name.split("/")[0] for name in image.paths}
    notices = []
    labels = read_node(group / "labels")
    ome = {} if labels is None else labels.attributes.get("ome", labels.attributes)
    if isinstance(ome, dict) and isinstance(names := ome.get("labels"), list) and names:
        notices.append(
            f"the source also holds labels, which are not read: {_shown(list(map(str, names)))}"
        )
    others = [folder.name for folder in folders(group)] if can_list(group) else []
    others = [name for name in others if name not in used and read_node(group / name) is not None]
    if others:
        notices.append(f"the source also holds {_shown(others)}, which the image is not made of")
    return notices


def _shown(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" * (len(names) > SHOWN))


def _parsed(path: Place, node: ZarrNode, number: int) -> Multiscale | None:
    try:
        return parse_multiscale(node.attributes, number)
    except ValueError as error:
        raise BadRequest(
            f"source (={path}) has wrong OME metadata: {error}; name one of its arrays instead"
        ) from error


def open_array(path: Place, node: ZarrNode) -> AnyArray:
    """Open the array and check what can be checked before zarr warns or fails on it."""
    stated = node.metadata.get("data_type", node.metadata.get("dtype"))
    if isinstance(stated, dict):
        stated = stated.get("name")
    try:
        dtype = np.dtype(stated if isinstance(stated, str) else "O")
    except TypeError:
        dtype = np.dtype("O")
    check_dtype(dtype, str(stated), path)
    try:
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of codecs outside the specification, and the like
            return zarr.open_array(
                zarr_store(path, read_only=True), mode="r", zarr_format=node.zarr_format
            )
    except Exception as error:
        cause = f"{type(error).__name__}: {explain(error)}"[:200]
        raise BadRequest(f"source (={path}) cannot be opened by zarr: {cause}") from error


def check_dtype(dtype: np.dtype[np.generic], stated: str, path: Place) -> None:
    """Refuse voxels that are no numbers."""
    if dtype.kind not in "iuf":
        remedy = "uint8" if dtype.kind == "b" else "float32"
        raise BadRequest(
            f"source (={path}) has voxels of type {stated}; they must be integers or floats: "
            f"convert it, for example to {remedy}"
        )
