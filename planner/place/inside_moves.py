"""Placements inside ``solve`` for ``coherent``: few tokens change devices between their first experts of two layers.

    minimise  move * sum_l crossings[l] + partial * sum_l apart[l] + price * sum_l balance[l]      seconds

crossings[l]: mean over tokens of whether the first experts of layers l and l + 1 lie on different devices. apart[l]: of
how many of a token's other experts of layer l lie elsewhere than its first. Both cost more between hosts, and both are
those of tokens to come, as the whole trace lets expect them: a decoding step is too few tokens to be fitted. It is an
estimate, as in ``inside``: the prediction of the whole step decides.
"""

# C classes of layers, one layer each

import numpy as np

from ...solvers.placement.affinity import Affinity, least_by_slots
from ...solvers.slots import Slots
from ...spec.trace import Trace
from ..budget import Budget, OutOfTime
from .inside import SEARCH_TIME
from .priced import PRICES, priced
from .question import Placed, Proof, Question, said
from .ready import solvers_ready
from .sample import coherent_affinity, counted_affinity

NAMES = dict(zip(PRICES, ("affinity", "affinity, balance first"), strict=True))
SECONDS = "estimated seconds that a coherent layer's moves take"
LEAST_TIME = 0.02  # seconds of one search


def placed_for_moves(
    question: Question, trace: Trace, partial: float, kept: float, *, seed: int, budget: Budget
) -> dict[str, Placed]:
    """By name; ``question.weights``: seconds of a mean move of all tokens, inside a host and between hosts.

    partial: seconds of a partial output over those of a move; kept: of new keys and values. Everybody gets the latter,
    from where the tokens are: that, too, takes as long as the device with most of them.
    """
    fleet = question.fleet
    if len(fleet.speed) == 1 or fleet.capacity.sum() < question.experts or len(question.load) != trace.layers:
        return {}
    if not solvers_ready(budget, question.load.size, everything=False):
        return {}
    mine = budget.part(SEARCH_TIME)
    (inside, between), affinity = question.weights, _affinity(trace, partial, mine)
    host_capacity = int(np.bincount(fleet.hosts, fleet.capacity).max())
    devices, hosts = least_by_slots(affinity.transitions, int(fleet.capacity.max()), host_capacity)
    least = (inside * devices.sum() + (between - inside) * hosts.sum()) / trace.layers
    alike = len(fleet.speed) / len(set(fleet.hosts.tolist()))  # devices of a host
    gather = kept * (inside * (alike - 1) + between * (len(fleet.speed) - alike))
    worth = float(question.ideal.mean()) + gather
    found = {}
    for name, solution in priced(question, affinity, worth, seed=seed, budget=mine.at_least(LEAST_TIME)).items():
        cost = affinity.cost(solution.assignment, fleet.hosts, inside, between) / trace.layers
        proof = np.full(trace.layers, cost), np.full(trace.layers, min(least, cost))
        slots = Slots.from_device_of(solution.assignment, fleet.capacity)
        found[NAMES[name]] = Placed(slots, said("annealing", solution.status), SECONDS, _always(proof))
    return found


def _affinity(trace: Trace, partial: float, budget: Budget) -> Affinity:
    """As tokens to come will move, or, where that takes too long, as counted."""
    try:
        return coherent_affinity(trace, budget, partial)
    except OutOfTime:
        return counted_affinity(trace, partial)


def _always(proof: tuple[np.ndarray, np.ndarray]) -> Proof:
    return lambda: proof
