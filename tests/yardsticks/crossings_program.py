"""Affinity placement, exactly: ExFlow's integer program on collapsed counts (arXiv 2401.08383).

What a token pays depends only on the pair of experts that it visits, so tokens collapse exactly into counts.

    x[i, g] in {0, 1}       expert i (of some layer) is on device g
    n[i, j]                 tokens of a pair: i in a layer and j in the next (transitions), or both in one (together)
    y[i, j, p] in 0..1      both experts of the pair are at place p; places are the devices, and the hosts
    minimise sum_{i, j} n[i, j] * weight * (1 - sum_p y[i, j, p]),  over devices and over hosts

    (1)-(5) one copy, slots, balance, order of interchangeable devices, cutoff: ``placement_program``
    (6) staying:   y[i, j, p] <= in(i, p), in(j, p)   where in(i, p) = sum_{g in p} x[i, g]        ``_staying``
    (7) company:   (2) and (3) times in(i, p): sum_j y[i, j, p] <= capacity[p] in(i, p), ...       ``_company``

weight is ``device_weight`` for devices and ``host_weight - device_weight`` for hosts. ExFlow's own cut variables,
z >= x[i, g] - x[j, g], have a linear relaxation of 0 (all experts evenly on all devices); that of y with (7) is at
least the b-matching bound of ``bounds.crossings``. y need not be declared integral: given x, an optimum is.

``stage="joint"`` decides devices and hosts together. ``stage="hosts_first"`` is ExFlow's: places are first the hosts,
then, host by host, its devices; each stage is optimal by itself, which both together need not be.
"""

# L layers, E experts, G devices

import time
from typing import Literal

import numpy as np
import pulp
from numpy.typing import ArrayLike

from moeplan.solvers import mip
from moeplan.solvers.placement.problem import Level, Place
from moeplan.solvers.result import Infeasible, NotFound, Solution
from moeplan.tests.yardsticks.placement_problem import AffinityProblem
from moeplan.tests.yardsticks.placement_program import PlacementProgram, Search

Stage = Literal["joint", "hosts_first"]


def place_exactly(
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
    stage: Stage = "joint",
    incumbent: ArrayLike | None = None,
    solver: str = mip.DEFAULT_SOLVER,
    time_limit: float = mip.TIME_LIMIT,
    seed: int = 0,
) -> Solution[np.ndarray]:
    """The placement [L, E] of fewest weighted crossings.

    transitions: [L-1, E, E] tokens from expert a of a layer to expert b of the next.
    together: [L, E, E] tokens that use both experts a < b of a layer (the rest is not read); default none.
    capacity: [G] slots per layer; hosts: [G] number of each device's host; 0 <= device_weight <= host_weight.
    load: [L, E]; speed: [G] (default 1); limit: [L] largest load over speed of any device (default none).
    incumbent: [L, E] a placement within slots and limit: the answer is no worse, and is it where the time ends first.
    solver: ``highs``, ``cp_sat`` (whole loads only), or what ``mip.choose_solver`` accepts.

    Status is ``optimal``, or ``time_limit`` with the best found and the bound proven so far. ``hosts_first`` proves
    only that every token that must change hosts pays ``host_weight``, and is ``feasible`` where it costs more.
    Raises ``Infeasible``; ``NotFound`` when the time ends without a placement, or the first stage leaves the second
    none; ``SolverUnavailable``.
    """
    started = time.perf_counter()
    problem = AffinityProblem.checked(
        transitions, capacity, hosts, device_weight, host_weight, together=together, load=load, speed=speed, limit=limit
    )
    if stage not in ("joint", "hosts_first"):
        raise ValueError(f"stage must be 'joint' or 'hosts_first', got {stage!r}")
    if not time_limit > 0:
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    known = None if incumbent is None else problem.checked_placement(incumbent)
    search = Search(solver, started + time_limit, seed)
    try:
        placed, bound, proven = _joint(problem, search, known) if stage == "joint" else _hosts_first(problem, search)
    except NotFound:
        if known is None:
            raise
        placed, bound, proven = known, 0.0, False
    if known is not None and problem.movement(known) < problem.movement(placed):
        placed = known
    if not problem.keeps(placed):
        raise AssertionError(f"{solver} returned a placement that breaks the slots or the limit")
    objective, seconds = problem.movement(placed), time.perf_counter() - started
    if stage == "hosts_first" and proven:
        return Solution.from_heuristic(placed, objective, bound, seconds)
    return Solution(placed, objective, bound, "optimal" if proven else "time_limit", seconds)


def _joint(problem: AffinityProblem, search: Search, known: np.ndarray | None) -> tuple[np.ndarray, float, bool]:
    """(placement, bound, whether the search was complete)"""
    everywhere = dict.fromkeys(range(problem.load.size), tuple(range(problem.devices)))
    program = _MovementProgram(problem, everywhere, problem.levels)
    if known is not None:
        program.cutoff(problem.movement(known), whole=search.whole)
    chosen, bound, proven = search.run(program)
    return _array(chosen, problem), max(bound, 0.0), proven


def _hosts_first(problem: AffinityProblem, search: Search) -> tuple[np.ndarray, float, bool]:
    """As ``_joint``; the bound is the first stage's, in which a token pays only to change hosts."""
    whole = problem.by_host()
    everywhere = dict.fromkeys(range(problem.load.size), tuple(range(whole.devices)))
    on_host, bound, proven = search.run(_MovementProgram(whole, everywhere, whole.levels))
    placed: dict[int, int] = {}
    for host, devices in enumerate(problem.on_hosts(range(problem.devices))):
        here = {i: devices for i, at in on_host.items() if at == host}
        if not here:
            continue
        inside = [Level(problem.device_weight, tuple((g,) for g in devices))]
        try:
            on_device, _, complete = search.run(_MovementProgram(problem, here, inside))
        except Infeasible as error:
            message = f"the experts chosen for host {host} keep no limit on its devices: use stage 'joint'"
            raise NotFound(message) from error
        proven &= complete
        placed |= on_device
    return _array(placed, problem), max(bound, 0.0), proven


def _array(chosen: dict[int, int], problem: AffinityProblem) -> np.ndarray:
    return np.array([chosen[i] for i in range(problem.load.size)], np.int64).reshape(problem.load.shape)


class _MovementProgram(PlacementProgram):
    """constant: the movement if no pair stayed; the objective is minus what the pairs that stay save."""

    def __init__(self, problem: AffinityProblem, where: dict[int, Place], levels: list[Level]) -> None:
        super().__init__(problem, where)
        pairs = [(i, j, tokens) for i, j, tokens in problem.pairs() if i in where and j in where]
        self.constant = sum(tokens * level.weight for level in levels for _, _, tokens in pairs)
        savings: list[pulp.LpAffineExpression] = []
        for number, level in enumerate(levels):
            savings += self._staying(number, level, pairs)
        self.lp.setObjective(-pulp.lpSum(savings))

    def _staying(self, number: int, level: Level, pairs: list[tuple[int, int, float]]) -> list[pulp.LpAffineExpression]:
        """What the pairs that stay at one level save."""
        savings = []
        company: dict[tuple[int, int, int], list[tuple[int, pulp.LpVariable]]] = {}
        for i, j, tokens in pairs:
            for p, place in enumerate(level.places):
                y = self.lp.add_variable(f"y_{number}_{i}_{j}_{p}", 0, 1)
                self.lp += y <= self.inside(i, place)
                self.lp += y <= self.inside(j, place)
                savings.append(tokens * level.weight * y)
                company.setdefault((i, self.layer(j), p), []).append((j, y))
                company.setdefault((j, self.layer(i), p), []).append((i, y))
        for (i, layer, p), others in company.items():
            self._company(i, layer, level.places[p], others)
        return savings

    def _company(self, i: int, layer: int, place: Place, others: list[tuple[int, pulp.LpVariable]]) -> None:
        """Others of a layer that are with expert i at a place: it holds only so many, of so much load."""
        own = self.layer(i) == layer  # then i itself takes a slot and its load
        slots = int(self.problem.capacity[list(place)].sum()) - own
        if len(others) > slots:
            self.lp += pulp.lpSum(y for _, y in others) <= slots * self.inside(i, place)
        most_load = self.problem.most_load(layer, place) - own * self.load(i)
        if sum(self.load(j) for j, _ in others) > most_load:
            self.lp += pulp.lpSum(self.load(j) * y for j, y in others) <= most_load * self.inside(i, place)
