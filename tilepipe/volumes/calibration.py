"""How large a voxel of a TIFF is and what its channels are called, as the file says it.

OME-XML, ImageJ's description, the description of an Aperio slide, or the tags of the resolution;
parsed by tifffile.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, cast

import tifffile
from tifffile.tifffile import svs_description_metadata

if TYPE_CHECKING:
    from collections.abc import Mapping

    VoxelSizes = dict[str, tuple[float, str | None]]
    """Size of a voxel and its unit, by axis."""

_UNITS = {
    "": None, "pixel": None, "pixels": None, "reference frame": None,
    "pm": "picometer", "å": "angstrom", "a": "angstrom", "nm": "nanometer",
    "um": "micrometer", "µm": "micrometer", "micron": "micrometer", "microns": "micrometer",
    "mm": "millimeter", "cm": "centimeter", "m": "meter", "in": "inch", '"': "inch",
    "ms": "millisecond", "s": "second", "sec": "second", "min": "minute", "h": "hour",
}  # fmt: skip
"""Names of OME-Zarr for what others write; other names are taken as they stand."""


def unit_name(text: object) -> str | None:
    r"""Return the unit as OME-Zarr names it; None for pixels and for nothing.

    >>> unit_name("µm"), unit_name("\\u00B5m"), unit_name("Nanometre"), unit_name("pixel")
    ('micrometer', 'micrometer', 'nanometer', None)
    """
    name = str(text or "").replace("\\u00B5", "µ").replace("μ", "µ").strip().lower()
    return _UNITS.get(name, name.replace("metre", "meter"))


def voxel_sizes(
    file: tifffile.TiffFile, series: tifffile.TiffPageSeries, number: int
) -> VoxelSizes:
    """Return the size of a voxel of an image at full resolution along the axes that are said.

    ``number`` is the image's in the file. A pyramid's smaller levels are for the caller to scale.
    """
    page = series.keyframe
    sizes = _resolution(page)
    if file.is_ome and (image := _ome_image(file, number)) is not None:
        pixels = cast("Mapping[str, object]", image["Pixels"])
        for axis in "zyx":
            name = f"PhysicalSize{axis.upper()}"
            sizes |= _entry(axis, pixels.get(name), pixels.get(f"{name}Unit", "µm"))
        sizes |= _entry("t", pixels.get("TimeIncrement"), pixels.get("TimeIncrementUnit", "s"))
    elif file.is_imagej and number == 0:
        metadata = file.imagej_metadata or {}
        unit = metadata.get("unit", "")
        if unit_name(unit) is not None:
            across, down = page.resolution
            sizes |= _entry("x", _inverse(across), unit)
            sizes |= _entry("y", _inverse(down), metadata.get("yunit", unit))
        sizes |= _entry("z", metadata.get("spacing"), metadata.get("zunit", unit))
        sizes |= _entry("t", metadata.get("finterval"), metadata.get("tunit", "s"))
    elif file.is_svs and number == 0:
        size = svs_description_metadata(page.description).get("MPP")
        sizes |= _entry("y", size, "µm") | _entry("x", size, "µm")
    return sizes


def channel_names(file: tifffile.TiffFile, number: int) -> tuple[str, ...]:
    """Return what OME-XML calls the channels of an image, "" for one without a name."""
    image = _ome_image(file, number) if file.is_ome else None
    if image is None:
        return ()
    pixels = cast("Mapping[str, object]", image["Pixels"])
    return tuple(str(channel.get("Name", "")) for channel in _several(pixels.get("Channel")))


def _ome_image(file: tifffile.TiffFile, number: int) -> Mapping[str, object] | None:
    """Return what OME-XML says of an image; None where images cannot be told from series."""
    try:
        metadata = tifffile.xml2dict(file.ome_metadata or "")
    except (ValueError, SyntaxError):  # what xml raises
        return None
    images = _several(metadata.get("OME", {}).get("Image"))
    is_clear = len(images) == len(file.series) and "Pixels" in images[number]
    return images[number] if is_clear else None


def _several(value: object) -> list[Mapping[str, object]]:
    items = value if isinstance(value, list) else [value]
    return [item for item in items if isinstance(item, dict)]


def _resolution(page: tifffile.TiffPage) -> VoxelSizes:
    """Return what the tags say; without a unit, how the sides of a pixel compare."""
    if not {"XResolution", "YResolution"} <= {tag.name for tag in page.tags}:
        return {}
    if page.resolutionunit in (2, 3, 4, 5):
        across, down = page.get_resolution("MICROMETER")
        return _entry("x", _inverse(across), "µm") | _entry("y", _inverse(down), "µm")
    across, down = page.resolution
    if across == down or not (across > 0 < down):
        return {}
    return _entry("x", down / across, None)


def _inverse(number: float) -> float:
    return 1 / number if number else math.inf


def _entry(axis: str, size: object, unit: object) -> VoxelSizes:
    """Return one size; nothing for what is no size."""
    if not isinstance(size, int | float) or not math.isfinite(size) or size <= 0:
        return {}
    return {axis: (float(size), unit_name(unit))}
