"""Measures exactly what the runtime runs: operators, links and collectives, as one ``spec.Cluster``."""

from .merge import merge
from .profile import BUDGET_SECONDS, profile

PROBE = "moeplan.profiler.probe:probe"
"""The entry that ``run`` calls beside its steps."""

__all__ = ["BUDGET_SECONDS", "PROBE", "merge", "profile"]
