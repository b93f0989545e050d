"""One placement annealed at each of several prices of balance, beside each other."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import numpy as np

from ...solvers.placement.affinity import Affinity
from ...solvers.result import Solution
from ..budget import Budget
from .question import Question

PRICES = {"local": 1.0, "local, balance first": 3.0}
"""What a unit of balance costs, times what it is worth by itself: what predictions make of it varies."""
STEPS_PER_EXPERT, MOST_STEPS, CHAINS = 500, 2_000_000, 1  # work of one annealing, of which a search has many


def priced(
    question: Question, affinity: Affinity, worth: float, *, seed: int, budget: Budget
) -> dict[str, Solution[np.ndarray]]:
    """By the names of ``PRICES``; worth: seconds of a unit of balance. Ctrl-C ends all of them and is raised."""
    # Imported when they are needed: their compiled loops take a second to load.
    from ...solvers.placement.annealing import anneal
    from ...solvers.placement.chain import load_kernels

    fleet, (inside, between) = question.fleet, question.weights
    affinity.between()  # made before threads ask for it
    load_kernels()
    stop = Event()

    def search(price: float) -> Solution[np.ndarray]:
        return anneal(
            affinity,
            question.load,
            fleet.capacity,
            fleet.speed,
            fleet.hosts,
            device_weight=inside,
            host_weight=between,
            price=price * worth,
            steps=min(STEPS_PER_EXPERT * question.load.size, MOST_STEPS),
            chains=CHAINS,
            seed=seed,
            time_limit=budget.left,
            stop=stop,
        )

    with ThreadPoolExecutor(len(PRICES)) as pool:  # the compiled loops leave the interpreter to each other
        pending = [pool.submit(search, price) for price in PRICES.values()]
        try:
            return dict(zip(PRICES, [one.result() for one in pending], strict=True))
        except KeyboardInterrupt:
            stop.set()
            raise
