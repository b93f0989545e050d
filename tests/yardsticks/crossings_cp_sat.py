"""Affinity placement for CP-SAT in its own terms, clauses and exact integers: beside ``crossings_program``.

    x[i, g] in {0, 1}       expert i (of some layer) is on device g
    in[i, p] in {0, 1}      expert i is at place p (a device or a host)
    stay[i, j] in {0, 1}    both experts of a pair are at one place
    maximise sum_{i, j} n[i, j] * weight * stay[i, j],  over devices and over hosts

    (1) one copy:    exactly one of x[i, g]                                            ``_placement``
    (2) slots:       sum_{i in layer} x[i, g] <= capacity[g]                           ``_placement``
    (3) balance:     sum_{i in layer} load[i] x[i, g] <= limit[layer] speed[g]         ``_placement``
    (4) staying:     stay[i, j] and in[i, p] => in[j, p]                               ``_staying``
    (5) company:     sum_j stay[i, j] <= max_p capacity[p], of one layer's j           ``_staying``
    (6) order:       of interchangeable places, the second is used only after the first    ``_order``

Counts times weights are scaled to 50 bits and rounded up, so that the bound on what stays is a bound on the true sum.
"""

import importlib.util
import math
import time
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from moeplan.solvers import mip
from moeplan.solvers.placement.problem import Place
from moeplan.solvers.result import Infeasible, NotFound, Solution, SolverUnavailable, Status
from moeplan.tests.yardsticks.placement_problem import AffinityProblem

BITS = 50  # of the scaled objective


def place_with_cp_sat(
    transitions: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    *,
    together: ArrayLike | None = None,
    load: ArrayLike | None = None,
    speed: ArrayLike | None = None,
    limit: ArrayLike | None = None,
    incumbent: ArrayLike | None = None,
    time_limit: float = mip.TIME_LIMIT,
    seed: int = 0,
) -> Solution[np.ndarray]:
    """As ``crossings_program.place_exactly`` with ``stage="joint"``; the incumbent is the search's first hint.

    Loads must be whole numbers where there is a limit. Status is ``optimal`` or ``time_limit``.
    Raises ``Infeasible``, ``NotFound`` (only without an incumbent), ``SolverUnavailable``, ``ValueError``.
    """
    started = time.perf_counter()
    problem = AffinityProblem.checked(
        transitions, capacity, hosts, device_weight, host_weight, together=together, load=load, speed=speed, limit=limit
    )
    if np.isfinite(problem.limit).any() and (problem.load != np.floor(problem.load)).any():
        raise ValueError("load must hold whole numbers for CP-SAT: round it, or use another solver")
    if not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    known = None if incumbent is None else problem.checked_placement(incumbent)
    program = _Program(problem, _import_cp_model())
    if known is not None:
        program.hint(known)
    status, placed, bound = program.solve(time_limit, seed)
    if placed is None or (known is not None and problem.movement(known) < problem.movement(placed)):
        placed = known
    if placed is None:
        raise NotFound(f"cp_sat found no solution within {time_limit:g} s: raise the time limit")
    if not problem.keeps(placed):
        raise AssertionError("cp_sat returned a placement that breaks the slots or the limit")
    return Solution(placed, problem.movement(placed), bound, status, time.perf_counter() - started)


def _import_cp_model() -> Any:
    # Imported late for the reason that ``mip`` gives: it cannot always be loaded beside highspy.
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        known = importlib.util.find_spec("ortools") is not None
        hint = "pip install 'highspy>=1.16' (OR-tools cannot be loaded beside 1.15)" if known else "pip install ortools"
        raise SolverUnavailable(f"solver 'cp_sat' cannot be loaded: {hint}") from error
    return cp_model


class _Program:
    def __init__(self, problem: AffinityProblem, cp_model: Any) -> None:
        self.problem, self.cp = problem, cp_model
        self.model = cp_model.CpModel()
        experts = range(problem.experts)
        self.layers = [[layer * problem.experts + e for e in experts] for layer in range(problem.layers)]
        self._placement()
        self._order()
        pairs = problem.pairs()
        self.all_cross = sum(level.weight * tokens for level in problem.levels for _, _, tokens in pairs)
        self.scale = 2.0 ** (BITS - math.ceil(math.log2(self.all_cross))) if self.all_cross else 1.0
        self._staying(pairs)

    def _placement(self) -> None:
        problem, devices = self.problem, range(self.problem.devices)
        self.x = [[self.model.new_bool_var(f"x_{i}_{g}") for g in devices] for i in range(problem.load.size)]
        for row in self.x:
            self.model.add_exactly_one(row)
        for layer, members in enumerate(self.layers):
            for g in devices:
                self.model.add(sum(self.x[i][g] for i in members) <= int(problem.capacity[g]))
                most_load = problem.most_load(layer, (g,))
                if problem.load[layer].sum() > most_load:
                    loads = problem.load[layer].astype(int).tolist()
                    carried = sum(load * self.x[i][g] for i, load in zip(members, loads, strict=True))
                    self.model.add(carried <= int(most_load))

    def _order(self) -> None:
        """A later place of the same kind holds expert i only if an earlier one holds a lower expert of layer 0."""
        groups = self.problem.interchangeable(range(self.problem.devices)) + self.problem.interchangeable_hosts()
        for group in groups:
            for before, after in pairwise(group):
                for number, i in enumerate(self.layers[0]):
                    earlier = [self.x[k][g] for k in self.layers[0][:number] for g in before]
                    for g in after:
                        self.model.add_bool_or([*earlier, self.x[i][g].negated()])

    def _staying(self, pairs: list[tuple[int, int, float]]) -> None:
        problem, savings = self.problem, []
        for level in problem.levels:
            inside = [[self._inside(i, place) for place in level.places] for i in range(problem.load.size)]
            slots = max(int(problem.capacity[list(place)].sum()) for place in level.places)
            company: dict[tuple[int, int], list[Any]] = {}
            for i, j, tokens in pairs:
                stay = self.model.new_bool_var("")
                for here, there in zip(inside[i], inside[j], strict=True):
                    self.model.add_bool_or([stay.negated(), here.negated(), there])
                savings.append(math.ceil(tokens * level.weight * self.scale) * stay)
                company.setdefault((i, j // problem.experts), []).append(stay)
                company.setdefault((j, i // problem.experts), []).append(stay)
            for (i, layer), others in company.items():
                own = i // problem.experts == layer
                if len(others) > slots - own:
                    self.model.add(sum(others) <= slots - own)
        self.model.maximize(sum(savings))

    def _inside(self, i: int, place: Place) -> Any:
        if len(place) == 1:
            return self.x[i][place[0]]
        inside = self.model.new_bool_var("")
        self.model.add(sum(self.x[i][g] for g in place) == inside)
        return inside

    def hint(self, placed: np.ndarray) -> None:
        for i, device in enumerate(placed.ravel().tolist()):
            for g, variable in enumerate(self.x[i]):
                self.model.add_hint(variable, g == device)

    def solve(self, time_limit: float, seed: int) -> tuple[Status, np.ndarray | None, float]:
        """(status, placement [L, E] if any, bound on the movement)"""
        search = self.cp.CpSolver()
        search.parameters.num_workers = 1
        search.parameters.random_seed = seed % 2**31
        search.parameters.max_time_in_seconds = time_limit
        search.parameters.catch_sigint_signal = False  # Ctrl-C is the caller's, as in ``mip``
        status = search.solve(self.model)
        if status == self.cp.INFEASIBLE:
            raise Infeasible("no placement keeps both slots and limit: raise the limit", unit="balance", missing=0)
        if status == self.cp.MODEL_INVALID:
            raise ValueError(f"cp_sat: {self.model.validate().strip()}")
        if status == self.cp.UNKNOWN:
            return "time_limit", None, 0.0
        values = np.array([[search.value(variable) for variable in row] for row in self.x])
        bound = max(self.all_cross - search.best_objective_bound / self.scale, 0.0)
        placed = values.argmax(axis=1).reshape(self.problem.load.shape)
        return ("optimal" if status == self.cp.OPTIMAL else "time_limit"), placed, bound
