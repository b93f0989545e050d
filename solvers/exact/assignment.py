"""Replication by assignment: one layer's mixed-integer program over copies and devices.

For several windows of load, and for one where patterns (``exact.patterns``) are too many.

Even shares:
    copies[e, c] in {0, 1}      expert e has c copies
    at[e, c, g] in {0, 1}       one of them is on device g (so never two of an expert on one device)
Optimal shares:
    at[e, g] in {0, 1}          a copy of expert e is on device g
    share[e, g] >= 0            what it takes of its expert's tokens
Both:
    host[k, x] in {0, 1}        group k of experts is on host x (groups > 1 only)
    minimise mean_w hottest[w]

    (1) tokens:  even: sum_c copies[e, c] = 1, sum_g at[e, c, g] = c * copies[e, c]                ``_even``
                 optimal: sum_g share[e, g] = 1, share[e, g] <= at[e, g]                           ``_optimal``
    (2) slots:   copies on a device <= capacity[g] (= where every slot must be full)               ``_slots``
    (3) heat:    sum_e load[w, e] / c * at[e, c, g], or sum_e load[w, e] * share[e, g],
                 <= speed[g] * hottest[w]                                                          ``_heat``
    (4) groups:  copies of e on g <= host[group of e, host of g]; each group on one host, and
                 each host with groups / hosts of them                                             ``_groups``
    (5) alike:   devices of a host with equal speed and capacity are in order of their heat, of all windows   ``_heat``

The mean lies between a floor (bounds) and a cap (a known solution): copies that alone are hotter drop out.
"""

# W windows, E experts, G devices, X hosts, K groups

import math

import numpy as np
import pulp

from ..mip import Outcome
from ..mip import solve as solve_mip
from ..replication.replicate import Problem
from ..slots import EMPTY

Copies = dict[tuple[int, int], list[pulp.LpVariable]]  # (expert, device): the variables of which at most one is 1


def most_copies(problem: Problem) -> int:
    """Copies that one expert may have, so that every other still has one."""
    return min(len(problem.speed), int(problem.capacity.sum()) - problem.load.shape[2] + 1)


class Assignment:
    """The program of one layer; load: [W, E] tokens, floor: [W] of hottest, cap: of its mean."""

    def __init__(self, load: np.ndarray, problem: Problem, floor: np.ndarray, cap: float) -> None:
        self.load, self.given, self.cap = load, problem, cap
        self.experts, self.devices = range(load.shape[1]), range(len(problem.speed))
        self.most = most_copies(problem)
        # Heat is counted in a unit that makes it whole for whole loads and speeds, as CP-SAT demands
        whole = len(load) == 1 and all((x == np.round(x)).all() for x in (load, problem.speed))
        whole &= problem.shares == "even"
        self.unit = math.lcm(*problem.speed.astype(int).tolist()) * math.lcm(*range(1, self.most + 1)) if whole else 1
        low, high = floor * self.unit, (cap * len(load) - (floor.sum() - floor)) * self.unit
        self.problem = pulp.LpProblem("replication", pulp.LpMinimize)
        if whole:
            low, high = np.ceil(low * (1 - 1e-12)), np.floor(high * (1 + 1e-12))
        else:
            high = np.maximum(high, low)  # but for rounding
        kind = pulp.LpInteger if whole else pulp.LpContinuous
        self.hottest = [
            self.problem.add_variable(f"hottest_{w}", float(low[w]), float(high[w]), kind) for w in range(len(load))
        ]
        self.problem += pulp.lpSum(self.hottest) * (1 / (self.unit * len(load)))
        heat, self.at = self._even() if problem.shares == "even" else self._optimal()
        self._slots()
        self._heat(heat)
        if problem.groups > 1:
            self._groups()

    def solve(self, solver: str, seed: int, time_limit: float) -> tuple[Outcome, np.ndarray | None]:
        """How it ended, and the experts in slots [R] (None: infeasible). Raises as ``mip.solve``."""
        outcome = solve_mip(self.problem, solver=solver, seed=seed, time_limit=time_limit)
        if outcome.status == "infeasible":
            return outcome, None
        first = np.cumsum(self.given.capacity) - self.given.capacity
        at = np.full(int(self.given.capacity.sum()), EMPTY)
        for g in self.devices:
            held = [e for e in self.experts if any(v.varValue > 0.5 for v in self.at[e, g])]
            at[first[g] : first[g] + len(held)] = held
        return outcome, at

    def _binary(self, name: str) -> pulp.LpVariable:
        return self.problem.add_variable(name, 0, 1, pulp.LpInteger)

    def _heated(
        self, heat: list[list[pulp.LpAffineExpression]], e: int, g: int, variable: pulp.LpVariable, part: float
    ) -> None:
        """Add a part of an expert's tokens to a device."""
        for w, load in enumerate(self.load[:, e].tolist()):
            if load:
                heat[w][g] += load * part / self.given.speed[g] * variable

    def _even(self) -> tuple[list[list[pulp.LpAffineExpression]], Copies]:
        heat = [[pulp.LpAffineExpression() for _ in self.devices] for _ in self.load]
        at: Copies = {(e, g): [] for e in self.experts for g in self.devices}
        for e in self.experts:
            chosen = []
            for c in range(1, self.most + 1):
                piece = float(self.load[:, e].mean()) / c
                fits = [g for g in self.devices if piece <= self.cap * self.given.speed[g] * (1 + 1e-12)]
                if len(fits) < c:
                    continue
                chosen.append(self._binary(f"copies_{e}_{c}"))
                here = [self._binary(f"at_{e}_{c}_{g}") for g in fits]
                self.problem += pulp.lpSum(here) == c * chosen[-1]
                for g, variable in zip(fits, here, strict=True):
                    at[e, g].append(variable)
                    self._heated(heat, e, g, variable, self.unit / c)
                    self.problem += variable <= chosen[-1]
            self.problem += pulp.lpSum(chosen) == 1
        return heat, at

    def _optimal(self) -> tuple[list[list[pulp.LpAffineExpression]], Copies]:
        heat = [[pulp.LpAffineExpression() for _ in self.devices] for _ in self.load]
        at: Copies = {}
        for e in self.experts:
            shares = []
            for g in self.devices:
                at[e, g] = [self._binary(f"at_{e}_{g}")]
                shares.append(self.problem.add_variable(f"share_{e}_{g}", 0, 1))
                self.problem += shares[-1] <= at[e, g][0]
                self._heated(heat, e, g, shares[-1], 1.0)
            self.problem += pulp.lpSum(shares) == 1
            self.problem += pulp.lpSum(at[e, g] for g in self.devices) >= 1
        return heat, at

    def _slots(self) -> None:
        for g in self.devices:
            held = pulp.lpSum(v for e in self.experts for v in self.at[e, g])
            capacity = int(self.given.capacity[g])
            self.problem += held == capacity if self.given.full else held <= capacity

    def _heat(self, heat: list[list[pulp.LpAffineExpression]]) -> None:
        before: dict[tuple[float, int, int], int] = {}
        whole = [pulp.lpSum(window[g] for window in heat) for g in self.devices]
        for g in self.devices:
            for window, hottest in zip(heat, self.hottest, strict=True):
                self.problem += window[g] <= hottest
            host = int(self.given.hosts[g]) if self.given.groups > 1 else 0  # hosts do not matter without groups
            kind = (float(self.given.speed[g]), int(self.given.capacity[g]), host)
            if kind in before:
                self.problem += whole[before[kind]] >= whole[g]
            before[kind] = g

    def _groups(self) -> None:
        groups, count = self.given.groups, int(self.given.hosts.max()) + 1
        host = [[self._binary(f"host_{k}_{x}") for x in range(count)] for k in range(groups)]
        for k in range(groups):
            self.problem += pulp.lpSum(host[k]) == 1
        for x in range(count):
            self.problem += pulp.lpSum(host[k][x] for k in range(groups)) == groups // count
        for (e, g), here in self.at.items():
            self.problem += pulp.lpSum(here) <= host[e * groups // len(self.experts)][self.given.hosts[g]]
