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
    from tilepipe.segment import Report, segment
    from tilepipe.volume import open_volume

__version__ = "0.1.0"
__all__ = [
    "BadRequest",
    "Options",
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
]
_HOMES = {
    "BadRequest": "errors",
    "Options": "options",
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

    @property
    def segment(self) -> object:
        """The function `tilepipe.segment.segment`."""
        return import_module("tilepipe.segment").segment

    @segment.setter
    def segment(self, module: ModuleType) -> None: ...

    @property
    def evaluate(self) -> object:
        """The function `tilepipe.evaluate.evaluate`."""
        return import_module("tilepipe.evaluate").evaluate

    @evaluate.setter
    def evaluate(self, module: ModuleType) -> None: ...

    @property
    def plan(self) -> object:
        """The function `tilepipe.plan.plan`."""
        return import_module("tilepipe.plan").plan

    @plan.setter
    def plan(self, module: ModuleType) -> None: ...


sys.modules[__name__].__class__ = _Package
