"""The chains of ``annealing``: how they share threads, time and seeds."""

# L layers, E experts

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Event
from typing import Any

import numpy as np

from .annealing_chain import Chain, Problem

THREADS = 2
GENERATIONS = 2  # of chains that go on from a splice


@dataclass(eq=False)
class Walks:
    """Chains of one problem, so many threads at a time, that share the time until the deadline.

    steps: proposals of each chain. deadline: in seconds of ``time.perf_counter``. planned: chains at first, and in each
    generation that follows.
    """

    problem: Problem
    steps: int
    deadline: float
    planned: tuple[int, int]
    seed: int
    stop: Event
    on_event: Callable[[dict[str, Any]], None] | None
    begun: int = 0  # chains
    turn: int = 0
    proposals: int = 0
    squeezed: bool = False  # whether a chain had no time for all its steps
    coolest: float = math.inf  # the least mean hottest where a chain ended

    def run(self, start: np.ndarray, count: int, warmest: float) -> list[np.ndarray]:
        """Placements [L, E] that chains from ``start`` found; those without any left out."""
        first, after = self.planned
        turns = -(-first // THREADS) - (-after // THREADS) * GENERATIONS
        mine = [Chain(self.problem, start.copy(), self.seed * 7919 + self.begun + i) for i in range(count)]
        self.begun += count
        with ThreadPoolExecutor(THREADS) as pool:
            runs = []
            for i, chain in enumerate(mine):
                turn = self.turn + i // THREADS
                shown = _part_of(self.on_event, turn, turns) if self.on_event and i % THREADS == 0 else None
                runs.append(pool.submit(chain.run, self.steps, self.deadline, turns - turn, self.stop, shown, warmest))
            try:
                found = [run.result() for run in runs]
            except KeyboardInterrupt:
                self.stop.set()
                found = [run.result() for run in runs]
        self.turn += -(-count // THREADS)
        self.proposals += sum(chain.done for chain in mine)
        self.squeezed |= any(chain.squeezed for chain in mine)
        self.coolest = min(self.coolest, *(chain.balance() for chain in mine))
        return [placed for placed in found if placed is not None]

    @property
    def done(self) -> float:
        """Part of the planned proposals."""
        first, after = self.planned
        return self.proposals / (self.steps * (first + GENERATIONS * after))


def _part_of(on_event: Callable[[dict[str, Any]], None], turn: int, turns: int) -> Callable[[dict[str, Any]], None]:
    """What a chain reports, as a part of all of them."""

    def report(event: dict[str, Any]) -> None:
        on_event(event | {"done": turn * event["of"] + event["done"], "of": turns * event["of"]})

    return report
