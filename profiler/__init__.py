"""Measures exactly what the runtime runs: operators, links and collectives, as one ``spec.Cluster``."""

from .profile import BUDGET_SECONDS, merge, profile

__all__ = ["BUDGET_SECONDS", "merge", "profile"]
