"""When to look at the placement anew: once traffic is known, and whenever it has drifted.

    learning   batches are collected until they cover the window: then decide on them, and take them for the reference
    watching   every further batch goes into the drift test; an alarm: decide on the batches since the change, and learn

A test that has seen ``RENEWED`` batches without an alarm begins anew, so that memory is bounded.
"""

# L layers, E experts, B batches

from dataclasses import dataclass
from typing import Literal

import numpy as np

from ...solvers.drift import DriftTest
from .loads import Loads

Reason = Literal["learned", "drift"]
RENEWED = 4096
AFTER_DRIFT = 4  # batches, at least, that a decision after an alarm is made on


@dataclass(frozen=True)
class Rules:
    """window: seconds of traffic that is learned from; least, most: batches of it. between: batches between false
    alarms, on average at least."""

    window: float = 300.0
    least: int = 20
    most: int = 64
    between: float = 1000.0


class Watcher:
    """Says after which batch to decide, and on what; never decides itself. Equal records give equal reasons."""

    def __init__(self, rules: Rules, layers: int, experts: int) -> None:
        self.rules = rules
        self.loads = Loads(rules.window, rules.least, rules.most, layers, experts)
        self.test: DriftTest | None = None
        self.seen = 0
        """Batches in all."""

    def add(self, when: float, counts: np.ndarray) -> Reason | None:
        """Whether to decide now, on ``batches``; counts: [L, E] recorded at ``when``, in seconds."""
        batch = self.loads.add(when, counts)
        if batch is None:
            return None
        self.seen += 1
        if self.test is None:
            return self._learn()
        if self.test.look(batch):
            self.loads.keep_last(max(self.test.changed, AFTER_DRIFT))
            self.test = None
            return "drift"
        if self.test.looks >= RENEWED:
            self.test = None
            self.loads.keep_last(0)
        return None

    def _learn(self) -> Reason | None:
        held, rules = len(self.loads.batches), self.rules
        if held < rules.least or (self.loads.covered < rules.window and held < rules.most):
            return None
        self.test = DriftTest.of(self.batches(), rules.between)
        return "learned"

    def batches(self) -> np.ndarray:
        """[B, L, E] to decide on."""
        return self.loads.stacked()
