"""The part of an integer program that every exact placement shares: where experts may be.

x[i, g] in {0, 1}       expert i (of some layer) is on device g

(1) one copy:    sum_g x[i, g] = 1                                                       ``_one_device_each``
(2) slots:       sum_{i in layer} x[i, g] <= capacity[g]                                 ``_slots``
(3) balance:     sum_{i in layer} load[i] x[i, g] <= limit[layer] speed[g]               ``_balance``
(4) order:       interchangeable devices, and hosts, follow their first expert of the first layer   ``_order``
(5) cutoff:      no worse than a known placement                                         ``cutoff``
"""

import time
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pulp

from moeplan.solvers import mip
from moeplan.solvers.placement.problem import Place
from moeplan.solvers.result import Infeasible
from moeplan.tests.yardsticks.placement_problem import AffinityProblem

CUTOFF_ROUNDING = 1e-7  # relative: the known placement itself must pass the cutoff


class PlacementProgram:
    """(1) to (4) for the experts in ``where``, each on one of the devices that it is offered.

    constant: what the objective leaves out, to be set by who sets the objective.
    """

    def __init__(self, problem: AffinityProblem, where: dict[int, Place]) -> None:
        self.problem, self.where = problem, where
        self.lp = pulp.LpProblem("placement", pulp.LpMinimize)
        self.constant = 0.0
        self.x = {
            (i, g): self.lp.add_variable(f"x_{i}_{g}", 0, 1, cat="Binary") for i, offer in where.items() for g in offer
        }
        self.members: dict[int, list[int]] = {}
        for i in where:
            self.members.setdefault(self.layer(i), []).append(i)
        self.devices = sorted({g for offer in where.values() for g in offer})
        self._one_device_each()
        self._slots()
        self._balance()
        self._order()

    def layer(self, i: int) -> int:
        return i // self.problem.experts

    def load(self, i: int) -> float:
        return float(self.problem.load.flat[i])

    def inside(self, i: int, place: Place) -> pulp.LpAffineExpression:
        """1 where expert i is on one of the place's devices."""
        return pulp.lpSum(self.x[i, g] for g in place)

    def chosen(self) -> dict[int, int]:
        """The device of every expert, after a solution."""
        found = {}
        for i, offer in self.where.items():
            values = [self.x[i, g].varValue or 0.0 for g in offer]
            found[i] = offer[int(np.argmax(values))]
        return found

    def cutoff(self, cost: float, *, whole: bool) -> None:
        """(5), for a placement of that cost; ``whole``: only if its coefficients are whole numbers."""
        most = cost - self.constant
        coefficients = list(self.lp.objective.values())
        if not coefficients or (whole and any(c != int(c) for c in (*coefficients, most))):
            return
        slack = 0.0 if whole else CUTOFF_ROUNDING * (1.0 + abs(most))
        self.lp += pulp.LpAffineExpression(self.lp.objective) <= most + slack

    def _one_device_each(self) -> None:
        for i, offer in self.where.items():
            self.lp += self.inside(i, offer) == 1

    def _slots(self) -> None:
        for members in self.members.values():
            for g in self.devices:
                if len(members) > self.problem.capacity[g]:
                    self.lp += pulp.lpSum(self.x[i, g] for i in members) <= int(self.problem.capacity[g])

    def _balance(self) -> None:
        for layer, members in self.members.items():
            for g in self.devices:
                most_load = self.problem.most_load(layer, (g,))
                if sum(self.load(i) for i in members) > most_load:
                    self.lp += pulp.lpSum(self.load(i) * self.x[i, g] for i in members) <= most_load

    def _order(self) -> None:
        """Of interchangeable places, the first in use holds the lowest expert of the first layer, and so on."""
        first = self.members[min(self.members)]
        groups = self.problem.interchangeable(self.devices)
        if len(self.devices) == self.problem.devices:
            groups += self.problem.interchangeable_hosts()
        for group in groups:
            for before, after in pairwise(group):
                for number, i in enumerate(first):
                    earlier = [self.inside(k, before) for k in first[:number]]
                    self.lp += self.inside(i, after) <= pulp.lpSum(earlier)


@dataclass(frozen=True)
class Search:
    """A back end and the time (``time.perf_counter()``) at which it must end."""

    solver: str
    deadline: float
    seed: int

    @property
    def whole(self) -> bool:
        """Whether rows must have whole coefficients."""
        return self.solver.lower() == "cp_sat"

    def run(self, program: PlacementProgram) -> tuple[dict[int, int], float, bool]:
        """(device of every expert, bound on the cost, whether the search was complete).

        Raises ``Infeasible``, ``NotFound`` and ``SolverUnavailable``.
        """
        if not program.lp.objective:  # any placement will do, but CBC wants an objective: the left side of one (1)
            i, offer = next(iter(program.where.items()))
            program.lp.setObjective(program.inside(i, offer))
            program.constant -= 1.0
        left = max(self.deadline - time.perf_counter(), 0.01)
        outcome = mip.solve(program.lp, solver=self.solver, time_limit=left, seed=self.seed)
        if outcome.status == "infeasible":
            raise Infeasible("no placement keeps both slots and limit: raise the limit", unit="balance", missing=0)
        return program.chosen(), program.constant + outcome.bound, outcome.status == "optimal"
