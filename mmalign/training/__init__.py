"""The training loop: settings, one optimizer step, checkpoints, processes, metrics and health."""

from mmalign.training.checkpoint import load_weights
from mmalign.training.distributed import Processes, launch
from mmalign.training.metrics import TIMING, read_rows
from mmalign.training.settings import TrainingSettings
from mmalign.training.trainer import TrainingResult, train

__all__ = [
    "TIMING",
    "Processes",
    "TrainingResult",
    "TrainingSettings",
    "launch",
    "load_weights",
    "read_rows",
    "train",
]
