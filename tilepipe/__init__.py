"""Exact tiled segmentation of images too large for memory.

``tilepipe.segment("volume.zarr", model="unet.pt")`` gives, for an image of any size, the answer
of one pass of the network over the whole mirrored image. Nothing heavy is imported until it is
used.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tilepipe.errors import BadRequest, TileError
    from tilepipe.evaluate import Scores, evaluate
    from tilepipe.model import load_model
    from tilepipe.options import Options
    from tilepipe.plan import plan
    from tilepipe.profile import context
    from tilepipe.recipe import Recipe
    from tilepipe.segment import Report, segment
    from tilepipe.train import train
    from tilepipe.volume import open_volume

__version__ = "0.1.0"
__all__ = [
    "BadRequest",
    "Options",
    "Recipe",
    "Report",
    "Scores",
    "TileError",
    "__version__",
    "context",
    "evaluate",
    "load_model",
    "open_volume",
    "plan",
    "segment",
    "train",
]
_HOMES = {
    "BadRequest": "errors",
    "Options": "options",
    "Recipe": "recipe",
    "Report": "segment",
    "Scores": "evaluate",
    "TileError": "errors",
    "context": "profile",
    "load_model": "model",
    "open_volume": "volume",
}


def __getattr__(name: str) -> object:
    """Import a part of the public interface when it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tilepipe' has no attribute {name!r}")
    return getattr(import_module(f"tilepipe.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """The package; its main functions bear the names of the modules that tell their stories.

    Importing such a module must not put it in the place of the function.
    """


def _story(name: str) -> property:
    """Return the function that bears the name of its module; that cannot be put in its place."""
    return property(
        lambda _: getattr(import_module(f"tilepipe.{name}"), name), lambda _, module: None
    )


for _name in ("evaluate", "plan", "segment", "train"):
    setattr(_Package, _name, _story(_name))
sys.modules[__name__].__class__ = _Package
