"""Predicts how fast a served model answers, from measured tables of GPUs that need not be at hand."""

from .architecture import Architecture, of_config, of_model
from .closed_loop import closed_loop
from .predict import StepTimes, predict, step
from .settings import defaults
from .shapes import Degrees, Load, Served, Settings, Step

__all__ = [
    "Architecture",
    "Degrees",
    "Load",
    "Served",
    "Settings",
    "Step",
    "StepTimes",
    "closed_loop",
    "defaults",
    "of_config",
    "of_model",
    "predict",
    "step",
]
