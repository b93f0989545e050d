"""Replication by assignment: one layer's mixed-integer program over copies and devices, where patterns are too many.

Even shares:
    copies[e, c] in {0, 1}      expert e has c copies
    at[e, c, g] in {0, 1}       one of them is on device g (so never two of an expert on one device)
Optimal shares:
    at[e, g] in {0, 1}          a copy of expert e is on device g
    tokens[e, g] >= 0           what it computes
Both:
    host[k, x] in {0, 1}        group k of experts is on host x (groups > 1 only)
    minimise hottest

    (1) tokens:  even: sum_c copies[e, c] = 1, sum_g at[e, c, g] = c * copies[e, c]                ``_even``
                 optimal: sum_g tokens[e, g] = load[e], tokens[e, g] <= load[e] * at[e, g]         ``_optimal``
    (2) slots:   copies on a device <= capacity[g] (= where every slot must be full)               ``_slots``
    (3) heat:    sum_e load[e] / c * at[e, c, g], or sum_e tokens[e, g], <= speed[g] * hottest     ``_heat``
    (4) groups:  copies of e on g <= host[group of e, host of g]; each group on one host, and
                 each host with groups / hosts of them                                             ``_groups``
    (5) alike:   devices of a host with equal speed and capacity are in order of their heat        ``_heat``

``hottest`` lies between a floor (a bound) and a cap (a known solution): copies that alone are hotter drop out.
"""

# E experts, G devices, X hosts, K groups

import math

import numpy as np
import pulp

from .mip import Outcome
from .mip import solve as solve_mip
from .replication import Problem
from .slots import EMPTY

Copies = dict[tuple[int, int], list[pulp.LpVariable]]  # (expert, device): the variables of which at most one is 1


class Assignment:
    """The program of one layer; load: [E] tokens, floor <= hottest <= cap."""

    def __init__(self, load: np.ndarray, problem: Problem, floor: float, cap: float) -> None:
        self.load, self.given, self.cap = load, problem, cap
        self.experts, self.devices = range(len(load)), range(len(problem.speed))
        self.most = min(len(problem.speed), int(problem.capacity.sum()) - len(load) + 1)
        self.tokens: dict[tuple[int, int], pulp.LpVariable] = {}
        # Heat is counted in a unit that makes it whole for whole loads and speeds, as CP-SAT demands
        whole = all((x == np.round(x)).all() for x in (load, problem.speed)) and problem.shares == "even"
        self.unit = math.lcm(*problem.speed.astype(int).tolist()) * math.lcm(*range(1, self.most + 1)) if whole else 1
        low, high = floor * self.unit, cap * self.unit
        self.problem = pulp.LpProblem("replication", pulp.LpMinimize)
        if whole:
            low, high = math.ceil(low * (1 - 1e-12)), math.floor(high * (1 + 1e-12))
        self.hottest = self.problem.add_variable("hottest", low, high, pulp.LpInteger if whole else pulp.LpContinuous)
        self.problem += self.hottest / self.unit
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

    def _even(self) -> tuple[list[pulp.LpAffineExpression], Copies]:
        heat = [pulp.LpAffineExpression() for _ in self.devices]
        at: Copies = {(e, g): [] for e in self.experts for g in self.devices}
        for e in self.experts:
            chosen = []
            for c in range(1, self.most + 1):
                piece = self.load[e] / c
                fits = [g for g in self.devices if piece <= self.cap * self.given.speed[g] * (1 + 1e-12)]
                if len(fits) < c:
                    continue
                chosen.append(self._binary(f"copies_{e}_{c}"))
                here = [self._binary(f"at_{e}_{c}_{g}") for g in fits]
                self.problem += pulp.lpSum(here) == c * chosen[-1]
                for g, variable in zip(fits, here, strict=True):
                    at[e, g].append(variable)
                    heat[g] += self.load[e] * (self.unit / c) / self.given.speed[g] * variable
                    self.problem += variable <= chosen[-1]
            self.problem += pulp.lpSum(chosen) == 1
        return heat, at

    def _optimal(self) -> tuple[list[pulp.LpAffineExpression], Copies]:
        heat = [pulp.LpAffineExpression() for _ in self.devices]
        at: Copies = {}
        for e in self.experts:
            for g in self.devices:
                at[e, g] = [self._binary(f"at_{e}_{g}")]
                tokens = self.problem.add_variable(f"tokens_{e}_{g}", 0, float(self.load[e]))
                self.problem += tokens <= float(self.load[e]) * at[e, g][0]
                heat[g] += 1 / self.given.speed[g] * tokens
                self.tokens[e, g] = tokens
            self.problem += pulp.lpSum(self.tokens[e, g] for g in self.devices) == float(self.load[e])
            self.problem += pulp.lpSum(at[e, g] for g in self.devices) >= 1
        return heat, at

    def _slots(self) -> None:
        for g in self.devices:
            held = pulp.lpSum(v for e in self.experts for v in self.at[e, g])
            room = int(self.given.capacity[g])
            self.problem += held == room if self.given.full else held <= room

    def _heat(self, heat: list[pulp.LpAffineExpression]) -> None:
        before: dict[tuple[float, int, int], int] = {}
        for g in self.devices:
            self.problem += heat[g] <= self.hottest
            host = int(self.given.hosts[g]) if self.given.groups > 1 else 0  # hosts do not matter without groups
            kind = (float(self.given.speed[g]), int(self.given.capacity[g]), host)
            if kind in before:
                self.problem += heat[before[kind]] >= heat[g]
            before[kind] = g

    def _groups(self) -> None:
        groups, count = self.given.groups, int(self.given.hosts.max()) + 1
        host = [[self._binary(f"host_{k}_{x}") for x in range(count)] for k in range(groups)]
        for k in range(groups):
            self.problem += pulp.lpSum(host[k]) == 1
        for x in range(count):
            self.problem += pulp.lpSum(host[k][x] for k in range(groups)) == groups // count
        for (e, g), here in self.at.items():
            self.problem += pulp.lpSum(here) <= host[e * groups // len(self.load)][self.given.hosts[g]]
