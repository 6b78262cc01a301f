"""Training: the loop, its schedule, optimizer, checkpoints and monitor."""

from .identity import ResumeError
from .loop import TrainResult, train
from .optimizer import MasterAdamW
from .schedule import Schedule
from .window import NonFiniteError

__all__ = ["MasterAdamW", "NonFiniteError", "ResumeError", "Schedule", "TrainResult", "train"]
