"""Launchers: start one process per rank, here, on many hosts, or in an emulated cluster."""

from .environment import EnvironmentLauncher
from .lab import Lab, LabLauncher, LabSpec
from .local import LocalLauncher
from .rank import Launcher, Rank

__all__ = ["EnvironmentLauncher", "Lab", "LabLauncher", "LabSpec", "Launcher", "LocalLauncher", "Rank"]
