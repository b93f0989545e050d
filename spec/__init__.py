"""The documents that flow between the rooms of moeplan, and the vocabulary they share."""

from .cluster import Cluster
from .errors import MoeplanError
from .model import Model
from .placement import Placement
from .plan import Plan
from .report import Report
from .trace import Trace
from .workload import Workload

__all__ = ["Cluster", "Model", "MoeplanError", "Placement", "Plan", "Report", "Trace", "Workload"]
