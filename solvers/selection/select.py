"""Selection: one strategy for every layer, fastest in all, within every device's memory.

An option of a layer costs seconds, takes bytes of its own on every device, and may need *regions*: memory that layers
share because they use it one after the other (gathered weights, workspaces). A region is charged once, at the largest
size that any layer's choice needs.

Layers with equal rows are one class c of n[c] layers, and equal region sizes are one size k.

    x[c, o] in 0..n[c]     layers of class c that use option o
    y[f, k] in {0, 1}      region f is needed in size k
    r[f, g] >= 0           bytes of region f on device g
    minimise sum_{c,o} cost[c][o] x[c, o]

    (1) every layer has one option:     sum_o x[c, o] = n[c]                                     ``_one_option_each``
    (2) an option needs its regions:    x[c, o] <= n[c] y[f, k(c, o, f)]                         ``_regions_needed``
    (3) a region holds its largest:     r[f, g] >= size[f][k][g] y[f, k]                         ``_region_sizes``
    (4) memory:                         sum memory[c][o][g] x[c, o] + sum_f r[f, g] <= capacity[g]   ``_memory``

Most of it is decided before any program: layers and devices that are alike are one, options that are never better are
gone (``problem``), and prices on memory give a bound, a choice, and options that no better choice has (``prices``).
What is left open is solved (``program``).

Bytes are divided by their common divisor first, and the answer is checked on whole bytes: where a floating-point back
end oversteps a limit within its tolerance, CP-SAT, exact in integers, solves it again.
"""

# L layers, O options, F regions, G devices; C classes of layers

import time
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from ..result import DEFAULT_SOLVER, ROUNDING, TIME_LIMIT, Solution, Status
from .prices import price
from .problem import Problem, cheapest, checked, per_layer, refuse_if_hopeless

if TYPE_CHECKING:
    from ..mip import Outcome


def select(
    cost: ArrayLike,
    memory: ArrayLike,
    capacity: ArrayLike,
    *,
    shared: ArrayLike | None = None,
    gap: float = 0.0,
    target: float = np.inf,
    solver: str = DEFAULT_SOLVER,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
) -> Solution[tuple[int, ...]]:
    """The option of every layer.

    cost: [L, O] seconds, ``inf`` where a layer does not have the option.
    memory: [L, O, G] whole bytes that each layer takes for itself; capacity: [G] whole bytes.
    shared: [L, O, F, G] whole bytes that the option needs of region f, charged once at the largest.
    gap: relative, between objective and bound, that is small enough; 0 for the best choice of all.
    target: no program is solved for choices that cost at least this much.
    solver: ``highs``, ``cp_sat``, or what ``mip.choose_solver`` accepts.

    Raises ``Infeasible`` with the bytes missing on each device at least, ``NotFound`` when the time limit ends the
    search without a solution, ``SolverUnavailable``.
    """
    started = time.perf_counter()
    problem = checked(cost, memory, capacity, shared)
    floor = float(problem.count @ problem.cost.min(axis=1))
    fastest = cheapest(problem)
    if problem.fits(fastest):  # then memory binds nothing, and there is nothing to search
        return Solution(per_layer(problem, fastest), floor, floor, "optimal", time.perf_counter() - started)
    refuse_if_hopeless(problem)
    problem = problem.by_kind().undominated()
    priced = price(problem, max(gap, ROUNDING))
    close = priced.seconds - priced.bound <= max(gap, ROUNDING) * priced.seconds
    if priced.chosen is not None and (close or priced.bound >= target):
        found = per_layer(problem, priced.chosen)
        return Solution.from_heuristic(found, priced.seconds, priced.bound, time.perf_counter() - started)
    outcome, chosen = _exact(problem.only(priced.open), solver, time_limit, seed)
    objective = problem.seconds(chosen)
    bound = max(min(outcome.bound, objective), priced.bound, floor)
    status: Status = "optimal" if outcome.status == "optimal" else "time_limit"
    return Solution(per_layer(problem, chosen), objective, bound, status, time.perf_counter() - started)


def _exact(problem: Problem, solver: str, time_limit: float, seed: int) -> tuple["Outcome", np.ndarray]:
    """By a program; raises what ``select`` raises."""
    # Imported here: where memory binds nothing, no back end is loaded.
    from .program import divisor_of, least_overflow, solve

    divisor = divisor_of(problem.memory, problem.shared)
    outcome, chosen = solve(problem, solver, time_limit, seed, divisor)
    if outcome.status != "infeasible" and not problem.fits(chosen):
        outcome, chosen = solve(problem, "cp_sat", time_limit, seed, divisor)
    if outcome.status == "infeasible":
        raise least_overflow(problem, solver, time_limit, seed)
    return outcome, chosen
