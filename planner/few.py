"""Spaces of few plans with a gap left: every combination of the layers' options is simulated whole.

Elsewhere layers are added up that are simulated by themselves, and a whole step may take less or more than that sum, by
how its devices wait for each other: what is chosen then lies above the bound. Where there are few plans, nothing is
left to that: the fastest is found, and its seconds are the bound.
"""

import math
import time
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

from ..spec.plan import LayerPlan
from .options import Classes
from .step import Step

MOST_LAYERS = 2_048  # combinations x layers of one space


class Open(NamedTuple):
    """A space in which a plan may be as fast as ``bound``, below the fastest known there; options: of each class."""

    where: str
    step: Step
    degree: int
    options: Sequence[Sequence[LayerPlan]]
    bound: float

    @property
    def few(self) -> bool:
        return math.prod(map(len, self.options)) * len(self.step.model.layers) <= MOST_LAYERS

    def fastest(
        self, classes: Classes, stored: int, limits: Sequence[int], deadline: float
    ) -> tuple[list[LayerPlan], float] | None:
        """(plans, seconds) of the fastest that keeps to memory, one plan per layer; None where the time ends first."""
        plans, least = list[LayerPlan](), math.inf
        for chosen in product(*self.options):
            if time.perf_counter() > deadline:
                return None
            spread = classes.spread(chosen)
            if any(held.total > held.limit for held in self.step.memory(spread, stored, limits)):
                continue
            seconds = self.step.seconds(spread)
            if seconds < least:
                plans, least = spread, seconds
        return plans, least
