"""The chains of ``annealing``: how they share threads, time and seeds."""

# L layers, E experts

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Event
from typing import Any

import numpy as np

from .chain import Chain, Problem
from .splice import Costs

THREADS = 2
GENERATIONS = 2  # of chains that go on from a splice
WHOLE = 0.75  # of its steps that a chain should have time for, or there are fewer chains
SCOUT = 0.1  # of a chain's proposals: walks that look for the price of balance


@dataclass(eq=False)
class Walks:
    """Chains of one problem, so many threads at a time, that share the time until the deadline.

    steps: proposals of each chain. deadline: in seconds of ``time.perf_counter``. planned: chains at first, in each
    generation that follows, and generations.
    """

    problem: Problem
    steps: int
    deadline: float
    planned: tuple[int, int, int]
    seed: int
    stop: Event
    on_event: Callable[[dict[str, Any]], None] | None
    price: float = 0.0  # of balance, once ``scout`` has found it
    begun: int = 0  # chains
    turn: int = 0
    proposals: int = 0
    squeezed: bool = False  # whether a chain had no time for all its steps
    total: int = 0  # chains before any were left out; 0: all are planned
    pace: float = 0.0  # steps a second of each thread, of the last walks
    left_out: tuple[int, int] = (0, 0)  # chains at first and generations that were planned, where some are left out
    coolest: float = math.inf  # the least mean hottest where a chain ended
    cheapest: float | None = None  # cost of the best so far, for whoever hears of progress

    def scout(self, start: np.ndarray) -> list[np.ndarray]:
        """Placements [L, E] that short walks find: the first answer, while longer walks are still warm.

        They set ``price`` to what the cap costs where they end. They may take a whole turn of the time, far more than
        their part of it: all other walks hang on what they find.
        """
        part, turns, scouts = max(1, round(SCOUT * self.steps)), 1 + self._turns, self._chains(start, THREADS)
        began = time.perf_counter()
        found = _finish([partial(s.run, part, self.deadline, turns, self.stop, None) for s in scouts], self.stop)
        self.squeezed |= any(scout.squeezed for scout in scouts)
        self.pace = min(scout.done for scout in scouts) / max(time.perf_counter() - began, 1e-9)
        self.price = float(np.exp(np.mean(np.log([scout.settled or scout.price for scout in scouts]))))
        self.coolest = min(self.coolest, *(scout.balance() for scout in scouts))
        return [placed for placed in found if placed is not None]

    def run(self, start: np.ndarray, count: int, warmest: float, *, hold: bool = False) -> list[np.ndarray]:
        """Placements [L, E] that chains from ``start`` found; those without any left out. warmest, hold: ``Chain``."""
        mine, runs = self._chains(start, count), []
        for i, chain in enumerate(mine):
            turn = self.turn + i // THREADS
            shown = self._part_of(turn) if self.on_event and i % THREADS == 0 else None
            left = self._turns - turn
            runs.append(partial(chain.run, self.steps, self.deadline, left, self.stop, shown, warmest, hold))
        began = time.perf_counter()
        found = _finish(runs, self.stop)
        self.turn += -(-count // THREADS)
        self.pace = sum(chain.done for chain in mine) / min(count, THREADS) / max(time.perf_counter() - began, 1e-9)
        self.proposals += sum(chain.done for chain in mine)
        self.squeezed |= any(chain.squeezed for chain in mine)
        self.coolest = min(self.coolest, *(chain.balance() for chain in mine))
        return [placed for placed in found if placed is not None]

    def tells(self, costs: Costs, found: Sequence[np.ndarray]) -> None:
        """From now on the cost of the cheapest of the placements [L, E] is part of what is reported."""
        if self.on_event and found:
            self.cheapest = min(map(costs.total, found))

    def affordable(self) -> int:
        """Chains to begin with: fewer where the scouts' pace leaves those planned less than ``WHOLE`` of their steps.

        A few walks that cool slowly find more than many that are cut short, and one splice more than a second one.
        """
        first, after, generations = self.planned
        if not self._fits(self._turns, WHOLE):
            self.total = first + generations * after
            self.squeezed = True
            turns = int((self.deadline - time.perf_counter()) * self.pace / (WHOLE * self.steps))
            self.left_out = first, generations
            after, generations = min(after, THREADS), min(generations, 1)
            first = min(first, THREADS * max(turns - generations, 1))
            self.planned = first, after, generations
        return first

    def adds_chains(self) -> bool:
        """Take back ``THREADS`` chains that were left out, where later walks show that there is time for them."""
        first, after, generations = self.planned
        turns = 1 - (-after // THREADS) * generations
        fits = first < self.left_out[0] and not self.stop.is_set() and self._fits(turns)
        if fits:
            self.planned = first + THREADS, after, generations
        return fits

    def adds_generation(self) -> bool:
        """The same for a generation of followers."""
        first, after, generations = self.planned
        fits = generations < self.left_out[1] and not self.stop.is_set() and self._fits(-(-after // THREADS))
        if fits:
            self.planned = first, after, generations + 1
        return fits

    def _fits(self, turns: int, part: float = 1.0) -> bool:
        """Whether so many turns of that part of the steps end in time, at the pace of the last walks."""
        left = self.deadline - time.perf_counter()
        return left == math.inf or not self.pace or left * self.pace >= turns * part * self.steps

    @property
    def late(self) -> bool:
        return time.perf_counter() >= self.deadline

    def share(self, part: float) -> float:
        """When that part of the time left is over."""
        now = time.perf_counter()
        return now + part * max(self.deadline - now, 0.0)

    @property
    def _turns(self) -> int:
        """How often all threads are taken for ``steps`` proposals."""
        first, after, generations = self.planned
        return -(-first // THREADS) - (-after // THREADS) * generations

    def _chains(self, start: np.ndarray, count: int) -> list[Chain]:
        """Chains from ``start``, each with the next seed."""
        first = self.seed * 7919 + self.begun
        self.begun += count
        return [Chain(self.problem, start.copy(), seed, self.price) for seed in range(first, first + count)]

    def _part_of(self, turn: int) -> Callable[[dict[str, Any]], None]:
        """What a chain reports, as a part of all of them, with ``incumbent`` where it is known."""
        on_event, turns = self.on_event, self._turns
        known = {} if self.cheapest is None else {"incumbent": self.cheapest}

        def report(event: dict[str, Any]) -> None:
            assert on_event is not None
            on_event(event | known | {"done": turn * event["of"] + event["done"], "of": turns * event["of"]})

        return report

    @property
    def done(self) -> float:
        """Part of the planned proposals."""
        first, after, generations = self.planned
        return self.proposals / (self.steps * (self.total or first + generations * after))


def _finish(runs: Sequence[Callable[[], np.ndarray | None]], stop: Event) -> list[np.ndarray | None]:
    """What the runs return, so many threads at a time; Ctrl-C ends them early."""
    with ThreadPoolExecutor(THREADS) as pool:
        pending = [pool.submit(run) for run in runs]
        try:
            return [run.result() for run in pending]
        except KeyboardInterrupt:
            stop.set()
            return [run.result() for run in pending]
