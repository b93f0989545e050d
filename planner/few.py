"""Spaces of few plans with a gap left: every combination of the layers' options is timed whole.

Elsewhere layers are added up that are timed by themselves, and a whole step may take less or more than that sum, by
how its devices wait for each other: what is chosen then lies above the bound. Where there are few plans, nothing is
left to that: the fastest is found, and its seconds are the bound.
"""

import math
from itertools import product
from typing import NamedTuple

from .budget import Budget
from .tables import Tables

MOST_LAYERS = 2_048  # combinations x layers of one space


class Open(NamedTuple):
    """A space in which a plan may be as fast as ``bound``, below the fastest known there."""

    where: str
    degree: int
    tables: Tables
    bound: float

    @property
    def few(self) -> bool:
        options, classes = len(self.tables.columns), len(self.tables.seconds)
        return options**classes * len(self.tables.step.model.layers) <= MOST_LAYERS

    def fastest(self, budget: Budget) -> tuple[tuple[int, ...], float] | None:
        """(options, seconds) of the fastest that keeps to memory, one option per class; None where time ends first."""
        best, least = tuple[int, ...](), math.inf
        classes = len(self.tables.seconds)
        for chosen in product(range(len(self.tables.columns)), repeat=classes):
            if budget.over:
                return None
            if self.tables.fit(chosen):
                seconds = self.tables.step_seconds(chosen)
                if seconds < least:
                    best, least = chosen, seconds
        return best, least
