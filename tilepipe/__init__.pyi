"""The public names, and where each is defined; read by type checkers and at run time alike."""

from .errors import BadRequest, TileError
from .evaluation.evaluate import Scores, evaluate
from .models.model import load_model
from .models.spec import context
from .options import Options
from .planning.plan import plan
from .segmentation.report import Report
from .segmentation.segment import segment
from .training.recipe import Recipe
from .training.train import train
from .volumes.volume import open_volume

__version__: str
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
