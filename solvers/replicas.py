"""How many replicas of each form: an integer program over forms, not over devices.

Formulation. J forms, R things of which there is a stock (devices of a class, requests in flight, ...):

    count[j] >= 0, whole                             replicas of form j
    minimise   sum_j cost[j] * count[j]
    such that  sum_j need[j, r] * count[j] <= stock[r]        for every r
               used[j] in {0, 1}, count[j] <= most[j] * used[j], sum_j used[j] <= kinds      where kinds is given

A negative need is something that a replica makes (requests that prefill hands to decode), a negative stock something
that is demanded. Every form needs a thing that no form makes: what there is of it bounds the count. Forms that another
one beats in cost and in every need are left out; the optimum stays the same.
"""

import time
from dataclasses import dataclass

import numpy as np
import pulp

from .mip import solve as solve_mip
from .result import DEFAULT_SOLVER, TIME_LIMIT, Infeasible, Solution

SLACK = 1e-7  # of a row's largest term: what rounding may exceed


@dataclass(frozen=True, eq=False)
class Problem:
    """cost: [J]; need: [J, R]; stock: [R]. Raises ValueError for wrong shapes, or a form whose count has no bound."""

    cost: np.ndarray
    need: np.ndarray
    stock: np.ndarray

    def __post_init__(self) -> None:
        forms, things = self.need.shape
        if self.cost.shape != (forms,) or self.stock.shape != (things,):
            raise ValueError(f"expected [{forms}] costs and a stock of [{things}]")
        if not all(np.isfinite(a).all() for a in (self.cost, self.need, self.stock)):
            raise ValueError("costs, needs and stock must be finite")
        if not np.isfinite(self.most()).all():
            raise ValueError("a form needs nothing that is limited: its count has no bound")

    def most(self) -> np.ndarray:
        """[J] replicas of each form that the stock of what nobody makes allows."""
        limited = (self.need >= 0).all(0)
        need, stock = self.need[:, limited], np.maximum(self.stock[limited], 0.0)
        with np.errstate(divide="ignore", invalid="ignore"):
            each = np.where(need > 0, np.floor(stock / need + SLACK), np.inf)
        return each.min(1, initial=np.inf)

    def fits(self, count: np.ndarray) -> bool:
        """Whether the stock allows these counts, but for rounding."""
        terms = self.need * count[:, None]
        scale = np.maximum(np.abs(terms).max(0, initial=0.0), np.abs(self.stock))
        return bool((terms.sum(0) <= self.stock + SLACK * scale).all())


def choose_replicas(
    problem: Problem,
    kinds: int | None = None,
    *,
    solver: str = DEFAULT_SOLVER,
    time_limit: float = TIME_LIMIT,
    seed: int = 0,
) -> Solution[np.ndarray]:
    """[J] counts of least cost; kinds: at most so many different forms.

    Raises Infeasible (unit ``units``), and as ``mip.solve``.
    """
    start = time.perf_counter()
    most = problem.most()
    kept = _unbeaten(problem, most)
    program = pulp.LpProblem("replicas", pulp.LpMinimize)
    count = {j: program.add_variable(f"count_{j}", 0, int(most[j]), pulp.LpInteger) for j in kept}
    program += pulp.lpSum(float(problem.cost[j]) * v for j, v in count.items())
    for r, stock in enumerate(problem.stock.tolist()):
        row = [(float(problem.need[j, r]), v) for j, v in count.items() if problem.need[j, r]]
        if row:
            program += pulp.lpSum(need * v for need, v in row) <= stock
        elif stock < 0:
            raise Infeasible("something is demanded that no form makes", unit="units", missing=-stock)
    if kinds is not None and kinds < len(count):
        used = {j: program.add_variable(f"used_{j}", 0, 1, pulp.LpInteger) for j in kept}
        program += pulp.lpSum(used.values()) <= kinds
        for j, variable in count.items():
            program += variable <= int(most[j]) * used[j]
    found = np.zeros(len(problem.cost), np.int64)
    if not count:
        return Solution(found, 0.0, 0.0, "optimal", time.perf_counter() - start, solver="nothing to choose")
    outcome = solve_mip(program, solver=solver, time_limit=time_limit, seed=seed)
    if outcome.status == "infeasible":
        raise Infeasible("no numbers of replicas meet the demand", unit="units", missing=0.0)
    for j, variable in count.items():
        found[j] = round(variable.varValue or 0.0)
    if not problem.fits(found):
        raise AssertionError("the solver's counts break a row")
    objective = float(problem.cost @ found)
    bound = min(outcome.bound, objective)
    return Solution(found, objective, bound, outcome.status, time.perf_counter() - start, solver=solver)


def _unbeaten(problem: Problem, most: np.ndarray) -> list[int]:
    """Forms that no other one beats in cost and all needs; of equal ones the first."""
    able = np.flatnonzero(most > 0)
    table = np.column_stack([problem.cost, problem.need])[able]
    kept = list[int]()
    for i, row in enumerate(table):
        no_worse = (table <= row).all(1)
        better = no_worse & ((table < row).any(1) | (np.arange(len(table)) < i))
        if not better.any():
            kept.append(int(able[i]))
    return kept
