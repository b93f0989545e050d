"""Fan-out placement, exactly: the fewest copies of tokens that ``ep`` dispatch sends, one per device and host touched.

Tokens that choose the same set of experts in a layer pay the same, so they collapse exactly into sets with counts, and
the layers do not touch each other: one program per layer.

    x[e, g] in {0, 1}       expert e is on device g
    n[s]                    tokens that choose the set s of experts
    t[s, p] in 0..1         a token of s goes to place p; places are the devices, and the hosts
    minimise sum_s n[s] * weight * sum_p t[s, p],  over devices and over hosts

    (1)-(5) one copy, slots, balance, order of interchangeable devices, cutoff: ``placement_program``
    (6) touched:    t[s, p] >= in(e, p) for e in s,  where in(e, p) = sum_{g in p} x[e, g]       ``_touched``
    (7) capacity:   sum_{e in s} in(e, p) <= capacity[p] t[s, p]                                ``_touched``
    (8) at least:   sum_p t[s, p] >= the fewest places with |s| slots                           ``_touched``

weight is ``device_weight`` for devices and ``host_weight - device_weight`` for hosts: a copy to another device of a
host that is reached anyway costs ``device_weight``, the first one on a host ``host_weight``. The linear relaxation of
(6) alone is one place per token; (8) is what it knows of slots.
"""

# T tokens, L layers, K top-k, S distinct sets, E experts, G devices

import time
from collections.abc import Sequence

import numpy as np
import pulp
from numpy.typing import ArrayLike

from moeplan.solvers import mip
from moeplan.solvers.placement.fan_out import ExpertSets, places
from moeplan.solvers.placement.problem import Level
from moeplan.solvers.result import NotFound, Solution, Status
from moeplan.tests.yardsticks.placement_problem import AffinityProblem
from moeplan.tests.yardsticks.placement_program import PlacementProgram, Search


def place_by_fan_out(
    sets: Sequence[ExpertSets],
    num_experts: int,
    capacity: ArrayLike,
    hosts: ArrayLike,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    *,
    load: ArrayLike | None = None,
    speed: ArrayLike | None = None,
    limit: ArrayLike | None = None,
    incumbent: ArrayLike | None = None,
    solver: str = mip.DEFAULT_SOLVER,
    time_limit: float = mip.TIME_LIMIT,
    seed: int = 0,
) -> Solution[np.ndarray]:
    """The placement [L, E] of least ``fan_out``.

    sets: of every layer, [S, K] experts (distinct in a row) and [S] tokens; the rest as in ``place_exactly``. The
    layers share the time limit: each may take an even part of what is left.

    Status is ``optimal``, or ``time_limit`` with the best found and the bound proven so far. Raises ``Infeasible``,
    ``NotFound`` (only without an incumbent), ``SolverUnavailable``.
    """
    started = time.perf_counter()
    layers = [_checked(layer, one, num_experts) for layer, one in enumerate(sets)]
    if not layers:
        raise ValueError("sets must hold at least one layer")
    nothing = np.zeros((len(layers) - 1, num_experts, num_experts))
    whole = AffinityProblem.checked(
        nothing, capacity, hosts, device_weight, host_weight, load=load, speed=speed, limit=limit
    )
    if not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    known = None if incumbent is None else whole.checked_placement(incumbent)
    placed, bound = np.empty((len(layers), num_experts), np.int64), 0.0
    status: Status = "optimal"
    for layer, layer_sets in enumerate(layers):
        now = time.perf_counter()
        deadline = now + max(started + time_limit - now, 0.0) / (len(layers) - layer)
        search = Search(solver, deadline, seed)
        row = None if known is None else known[layer]
        placed[layer], proven, complete = _place_layer(whole.only(layer), layer_sets, search, row)
        bound += proven
        status = status if complete else "time_limit"
    if not whole.keeps(placed):
        raise AssertionError(f"{solver} returned a placement that breaks the slots or the limit")
    objective = fan_out(placed, layers, whole.hosts, device_weight, host_weight)
    return Solution(placed, objective, bound, status, time.perf_counter() - started)


def _checked(layer: int, sets: ExpertSets, num_experts: int) -> ExpertSets:
    members, tokens = np.asarray(sets[0]), np.asarray(sets[1], float)
    if (
        members.ndim != 2
        or members.shape[1] == 0
        or members.dtype.kind not in "iu"
        or tokens.shape != members.shape[:1]
    ):
        raise ValueError(f"sets of layer {layer} must be experts [S, K] and tokens [S], got {members.shape}")
    if ((members < 0) | (members >= num_experts)).any() or (np.diff(np.sort(members, axis=1), axis=1) == 0).any():
        raise ValueError(f"sets of layer {layer} must name distinct experts in 0..{num_experts - 1}")
    if not np.isfinite(tokens).all() or (tokens < 0).any():
        raise ValueError(f"tokens of layer {layer} must be finite and not negative")
    return members, tokens


def _place_layer(
    problem: AffinityProblem, sets: ExpertSets, search: Search, known: np.ndarray | None
) -> tuple[np.ndarray, float, bool]:
    """(devices [E], bound, whether the search was complete)"""
    program = _FanOutProgram(problem, sets)

    def cost(row: np.ndarray) -> float:
        return fan_out(row[None], [sets], problem.hosts, problem.device_weight, problem.host_weight)

    if known is not None:
        program.cutoff(cost(known), whole=search.whole)
    try:
        chosen, bound, complete = search.run(program)
    except NotFound:
        if known is None:
            raise
        return known, program.constant + program.least, False
    placed = np.array([chosen[e] for e in range(problem.experts)])
    if known is not None and cost(known) < cost(placed):
        placed = known
    return placed, max(bound, program.constant + program.least), complete


class _FanOutProgram(PlacementProgram):
    """constant: what every token pays at the levels of one place; least: what (8) alone says of the others."""

    def __init__(self, problem: AffinityProblem, sets: ExpertSets) -> None:
        super().__init__(problem, dict.fromkeys(range(problem.experts), tuple(range(problem.devices))))
        levels, tokens = problem.levels, float(sets[1].sum())
        self.constant = tokens * (problem.host_weight - sum(level.weight for level in levels))
        self.least = 0.0
        copies: list[pulp.LpAffineExpression] = []
        for number, level in enumerate(levels):
            copies += self._touched(number, level, sets)
        self.lp.setObjective(pulp.lpSum(copies))

    def _touched(self, number: int, level: Level, sets: ExpertSets) -> list[pulp.LpAffineExpression]:
        """What the copies to a level's places cost."""
        slots = [int(self.problem.capacity[list(place)].sum()) for place in level.places]
        fullest = np.cumsum(sorted(slots, reverse=True))
        copies = []
        for s, (members, tokens) in enumerate(zip(sets[0].tolist(), sets[1].tolist(), strict=True)):
            if tokens == 0:
                continue
            fewest = int(np.searchsorted(fullest, len(members))) + 1
            touched = [self.lp.add_variable(f"t_{number}_{s}_{p}", 0, 1) for p in range(len(slots))]
            self.lp += pulp.lpSum(touched) >= fewest
            for t, place, capacity in zip(touched, level.places, slots, strict=True):
                inside = [self.inside(e, place) for e in members]
                for one in inside:
                    self.lp += t >= one
                if len(members) > capacity:
                    self.lp += pulp.lpSum(inside) <= capacity * t
                copies.append(tokens * level.weight * t)
            self.least += tokens * level.weight * fewest
        return copies


def fan_out(
    device_of: ArrayLike,
    sets: Sequence[ExpertSets],
    hosts: ArrayLike,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
) -> float:
    """Weighted fan-out of all tokens; device_of: [L, E]; sets as ``expert_sets`` gives them; hosts: [G]."""
    host = np.asarray(hosts)
    return sum(
        device_weight * float(tokens @ places(row, members))
        + (host_weight - device_weight) * float(tokens @ places(host[row], members))
        for row, (members, tokens) in zip(np.asarray(device_of), sets, strict=True)
    )
