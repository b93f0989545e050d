"""The split of ``split`` as a mixed-integer program, with its rows as named there: to check that, at small sizes."""

# G devices, N units

import time

import numpy as np
import pulp
from numpy.typing import ArrayLike

from moeplan.solvers import mip
from moeplan.solvers.result import Solution
from moeplan.solvers.splits.split import checked, infeasible, reachable


def split_mip(
    cost: ArrayLike,
    units: int,
    *,
    solver: str = mip.DEFAULT_SOLVER,
    time_limit: float = mip.TIME_LIMIT,
    seed: int = 0,
) -> Solution[tuple[int, ...]]:
    """The same split by mixed-integer programming, to the back end's tolerance; for checking, at small sizes.

    Two solves: the makespan, then the sum of squares with every costlier count removed. ``cp_sat`` does not fit
    (seconds are not whole numbers); ties beyond the squares fall as the back end has them.
    """
    started = time.perf_counter()
    table = checked(cost, units)
    everything = reachable(np.isfinite(table), units)
    if not everything >> units & 1:
        raise infeasible(table, units, everything)
    problem, choice = _choices(table)
    _one_count_each(problem, choice)
    _all_units(problem, choice, units)
    unit = float(table[np.isfinite(table)].max()) or 1.0
    _makespan(problem, choice, table / unit)
    outcome = mip.solve(problem, solver=solver, time_limit=time_limit, seed=seed)
    counts = _extract(choice)
    makespan = _longest(table, counts)
    if outcome.status == "optimal":
        problem, choice = _choices(np.where(table <= makespan, table, np.inf))
        _one_count_each(problem, choice)
        _all_units(problem, choice, units)
        problem.setObjective(pulp.lpSum(table[g, n] ** 2 * x for (g, n), x in choice.items()))
        mip.solve(problem, solver=solver, time_limit=time_limit, seed=seed)
        counts = _extract(choice)
    bound = max(outcome.bound * unit, float(table.min(axis=1).max()))
    return Solution(counts, _longest(table, counts), bound, outcome.status, time.perf_counter() - started)  # type: ignore[arg-type]


Choice = dict[tuple[int, int], pulp.LpVariable]


def _choices(table: np.ndarray) -> tuple[pulp.LpProblem, Choice]:
    problem = pulp.LpProblem("split", pulp.LpMinimize)
    pairs = [(int(g), int(n)) for g, n in np.argwhere(np.isfinite(table))]
    return problem, {(g, n): problem.add_variable(f"x_{g}_{n}", 0, 1, cat="Binary") for g, n in pairs}


def _one_count_each(problem: pulp.LpProblem, choice: Choice) -> None:
    for g in {g for g, _ in choice}:
        problem += pulp.lpSum(x for (device, _), x in choice.items() if device == g) == 1


def _all_units(problem: pulp.LpProblem, choice: Choice, units: int) -> None:
    problem += pulp.lpSum(n * x for (_, n), x in choice.items()) == units


def _makespan(problem: pulp.LpProblem, choice: Choice, table: np.ndarray) -> None:
    t = problem.add_variable("t", 0, float(table[np.isfinite(table)].max()))
    problem.setObjective(t + 0)
    for g in {g for g, _ in choice}:
        problem += pulp.lpSum(table[g, n] * x for (device, n), x in choice.items() if device == g) <= t


def _extract(choice: Choice) -> tuple[int, ...]:
    taken = {g: n for (g, n), x in choice.items() if x.varValue is not None and x.varValue > 0.5}
    return tuple(taken[g] for g in sorted(taken))


def _longest(table: np.ndarray, counts: tuple[int, ...]) -> float:
    return float(max(table[g, n] for g, n in enumerate(counts)))
