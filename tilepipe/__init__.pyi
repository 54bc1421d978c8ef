"""The public names, and where each is defined; read by type checkers and at run time alike."""

from .engines.jobs import Jobs
from .errors import BadRequest, TileError
from .evaluation.evaluate import evaluate
from .evaluation.scores import Scores
from .host.allocator import keep_memory
from .instances.components import label_components
from .instances.growth import grow_objects
from .models.checkpoint import save_checkpoint
from .models.model import load_model
from .models.spec import context
from .models.unet import UNet
from .options import Options
from .planning.plan import Plan, plan
from .runs.array import ArrayTask
from .segmentation.report import Report
from .segmentation.segment import segment
from .training.recipe import Recipe
from .training.train import train
from .volumes.synthetic import write_synthetic
from .volumes.volume import Volume, open_volume

__version__: str
__all__ = [
    "ArrayTask",
    "BadRequest",
    "Jobs",
    "Options",
    "Plan",
    "Recipe",
    "Report",
    "Scores",
    "TileError",
    "UNet",
    "Volume",
    "__version__",
    "context",
    "evaluate",
    "grow_objects",
    "keep_memory",
    "label_components",
    "load_model",
    "open_volume",
    "plan",
    "save_checkpoint",
    "segment",
    "train",
    "write_synthetic",
]
