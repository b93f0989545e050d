"""Single copies placed exactly, where layers are small enough that all their arrangements can be looked at.

Larger layers are annealed only: CP-SAT on one of 64 experts, with all others as annealed, found at most 0.03 % less
movement in 5 s a layer.
"""

# L layers, N arrangements, E experts, G devices, S samples, T tokens

from dataclasses import replace

import numpy as np

from ...solvers.balance import over_ideal
from ...solvers.exact.arrangements import arrangements, classes, hottest
from ...solvers.exact.layers import MOST_PAIRS, Layers, shortest
from ...solvers.placement.affinity import Affinity
from ...solvers.placement.fan_out import expert_sets, fan_outs
from ...solvers.result import NotFound, Solution
from ...spec.trace import Trace
from ..budget import Budget
from .answer import ALL_ARRANGEMENTS
from .movement import Movement, fan_out, moved_between_layers
from .single import Single

EXACT_TIME = 0.3  # of the time limit, at most
MOST_CELLS = 3e8  # of layers x arrangements x (samples or sets of experts) x devices


def place_exactly(
    single: Single,
    trace: Trace,
    affinity: Affinity,
    load: np.ndarray,
    cap: float,
    budget: Budget,
) -> Solution[np.ndarray] | None:
    """[L, E] devices of least movement under a cap on the mean balance of ``load`` [S, L, E]; None: not small enough.

    The objective is that of ``movement``; ``max_moves`` is not looked at. None, too, where the time ends first. Raises
    ``Infeasible`` where no placement keeps the cap.
    """
    fleet, layers = single.fleet, trace.layers
    at = arrangements(trace.num_experts, fleet.capacity, fleet.hosts, single.groups)
    if at is None or layers * len(at) * len(fleet.speed) * max(len(load), 1) > MOST_CELLS:
        return None
    relative, empty = over_ideal(load, fleet.speed), load.sum(axis=2) == 0  # [S, L]
    heat = np.stack([hottest(at, relative[:, i], fleet.speed) + empty[:, i].mean() for i in range(layers)])
    inside, between = single.weights
    levels = [(inside, np.arange(len(fleet.speed))), (between - inside, fleet.hosts)]
    levels = [(weight, place) for weight, place in levels if weight > 0]
    cost, transitions = np.zeros(heat.shape), None
    if single.movement == "coherent" and layers > 1:
        transitions = affinity.transitions / len(affinity.transitions)
    else:
        sets = expert_sets(trace.expert_ids)
        if sum(members.size for members, _ in sets) * len(at) * len(levels) > MOST_CELLS:
            return None
        cost = np.stack([fan_outs(at, one, levels) for one in sets]) / (layers * trace.tokens)
    first, of_class = classes(at, fleet.capacity, fleet.speed, fleet.hosts)
    problem = Layers(at, cost, heat, cap, first, of_class, transitions, tuple(levels))
    if problem.pairs > MOST_PAIRS:
        return None
    try:
        return shortest(problem, time_limit=budget.left, stop=budget.stop)
    except NotFound:
        return None


def allowed(placed: np.ndarray, single: Single) -> bool:
    """Whether a placement [L, E] keeps to the moves from the previous one."""
    return (
        single.previous is None
        or single.max_moves is None
        or int((placed != single.previous).sum()) <= single.max_moves
    )


def better(
    found: Solution[np.ndarray],
    exact: Solution[np.ndarray],
    trace: Trace,
    single: Single,
    affinity: Affinity,
) -> Solution[np.ndarray]:
    """The one of both that moves less."""
    values = [proven(trace, single, affinity, one.assignment, 0.0).value for one in (found, exact)]
    return found if values[0] <= values[1] else replace(found, assignment=exact.assignment, solver=exact.solver)


def proven(trace: Trace, single: Single, affinity: Affinity, placed: np.ndarray, bound: float) -> Movement:
    """How much ``placed`` moves, where ``place_exactly`` proved how much any placement must."""
    if single.movement == "coherent" and trace.layers > 1:
        minimised, value = moved_between_layers(single, affinity, placed)
    else:
        minimised, value, _ = fan_out(trace, single, placed)
    return Movement(minimised, value, {ALL_ARRANGEMENTS: min(bound, value)})
