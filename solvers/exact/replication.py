"""Replication, exactly: one layer, for small cases and as the yardstick of the search.

The problem is that of ``replication.replicate``. Its search opens with a placement and ``bounds.replication``
with a bound; between them, the question "do all devices end by t?" is answered by a program over patterns
(``exact.patterns``) until what is found and what is refuted meet. It is asked just below the best known first,
which usually proves it. Under (3) groups, each host is a question of its own: for every set of groups that a host may
get, then for a division into sets that all say yes.

With several windows of load, and where patterns are too many, it is one mixed-integer program over copies and devices
(``exact.assignment``).
HiGHS, CP-SAT (even shares; whole loads and speeds in the second form) or another back end of ``mip`` by name.

With whole loads and speeds the hottest device's values are whole multiples of a unit: nothing is between one and the
next. Otherwise "just below" is ``TOLERANCE`` below, and that is the gap that an optimal solution reports.
"""

# W windows, E experts, G devices, R slots, X hosts, K groups

import math
import time
from functools import partial

import numpy as np
from numpy.typing import ArrayLike

from ..bounds.replication import Shares, division_bounds, divisions, host_kinds, hottest_bound, hottest_step
from ..mip import DEFAULT_SOLVER, TIME_LIMIT
from ..replication.replicate import Problem, checked, replicate, widened
from ..replication.shares import optimal_shares
from ..result import NotFound, Solution, Status
from ..slots import EMPTY, Slots
from .assignment import Assignment, most_copies
from .patterns import TooManyPatterns, feasible

TOLERANCE = 1e-7  # relative: well above what floating-point back ends take for equal
DIVISIONS = 1_000  # of the groups over the hosts, at most, to ask about one by one


def replicate_exactly(
    load: ArrayLike,
    speed: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    *,
    groups: int = 1,
    shares: Shares = "even",
    full: bool = False,
    solver: str = DEFAULT_SOLVER,
    seed: int = 0,
    time_limit: float = TIME_LIMIT,
    known: Slots | None = None,
    most_variables: float = math.inf,
) -> Solution[Slots]:
    """Optimal copies, places and shares of one layer; load: [E] tokens, or [W, E] windows of them.

    known: a solution to begin with, in place of a search. most_variables: of the program over copies and devices;
    where there are more, what is known is returned as ``feasible``. The rest is as in ``replication.replicate``.

    Where the time ends first, the best found so far, with the bound proven so far. Raises as ``replicate`` does, and
    ``SolverUnavailable``.
    """
    began = time.perf_counter()
    rows = np.asarray(load, float)
    if rows.ndim not in (1, 2):
        raise ValueError(f"load must be one layer's [experts], or windows of it, got {list(rows.shape)}")
    rows = np.atleast_2d(rows)
    problem = checked(rows[:, None], speed, capacity, hosts, groups, shares, full)
    if known is None:
        search = partial(replicate, rows[:, None], speed, capacity, hosts, groups=groups, shares=shares, full=full)
        known = search(seed=seed, time_limit=time_limit).assignment
    devices = problem.speed, problem.capacity, problem.hosts
    floor = np.array([hottest_bound(row[None], *devices, groups, shares, full)[0] for row in rows])
    proof = _Proof(rows, problem, capacity, known, floor, solver, seed, began + time_limit)
    if proof.open:
        try:
            proof.by_patterns()
        except TooManyPatterns:
            kinds = most_copies(problem) if shares == "even" else 2
            if rows.shape[1] * len(problem.speed) * kinds > most_variables:
                return proof.solution("feasible", began)
            proof.by_assignment()
    return proof.solution("time_limit" if proof.late else "optimal", began)


class _Proof:
    """The best placement and the bound on it, until they meet. rows: [W, E] load; floor: [W] bounds of the windows.

    late: the time ended first. deadline: ``time.perf_counter()``.
    """

    def __init__(
        self,
        rows: np.ndarray,
        problem: Problem,
        capacity: ArrayLike,
        known: Slots,
        floor: np.ndarray,
        solver: str,
        seed: int,
        deadline: float,
    ) -> None:
        self.rows, self.problem, self.capacity, self.floor = rows, problem, capacity, floor
        self.solver, self.seed, self.deadline, self.late = solver, seed, deadline, False
        self.best, self.value = known, _mean_hottest(known, rows, problem.speed)
        self.bound = float(floor.mean())

    @property
    def open(self) -> bool:
        """What is so close that a floating-point back end could not tell it apart counts as met."""
        return self.bound < self.value * (1 - 2 * TOLERANCE)

    @property
    def left(self) -> float:
        return max(self.deadline - time.perf_counter(), 0.1)

    def solution(self, status: Status, began: float) -> Solution[Slots]:
        bound = self.value if status == "optimal" else min(self.bound, self.value)
        return Solution(self.best, self.value, bound, status, time.perf_counter() - began)

    def by_patterns(self) -> None:
        """Ask for ever cooler placements of one window; raises ``TooManyPatterns``, with what is proven by then."""
        if len(self.rows) > 1:
            raise TooManyPatterns("several windows")
        problem = self.problem
        step = hottest_step(self.rows[0], problem.speed, problem.capacity, problem.shares)
        question = _Question(self.rows[0], problem, self.solver, self.seed)
        ask = self.value
        try:
            while self.open:
                if time.perf_counter() > self.deadline:
                    raise NotFound("the time limit ended the proof")
                ask = max(min(ask, self.value - max(step / 2, self.value * TOLERANCE)), self.bound)
                at = question.answer(ask, self.left)
                if at is None:
                    self.bound = _next(ask, step)
                    ask = self.value
                else:
                    self._take(at)
                    ask = (self.bound + self.value) / 2
        except NotFound:
            self.late = True

    def by_assignment(self) -> None:
        """One program over copies and devices."""
        floor = np.array([self.bound]) if len(self.rows) == 1 else self.floor
        try:
            outcome, at = Assignment(self.rows, self.problem, floor, self.value).solve(
                self.solver, self.seed, self.left
            )
        except NotFound:
            self.late = True
            return
        if at is not None:
            self._take(at)
        if outcome.status == "time_limit":
            self.late, self.bound = True, max(self.bound, outcome.bound)

    def _take(self, at: np.ndarray) -> None:
        """Experts in slots [R], if they are cooler than the best."""
        found = Slots.even(at[None], self.problem.capacity)
        if self.problem.shares == "optimal":
            found = optimal_shares(found, self.rows[:, None], self.problem.speed)
        found = widened(found.expert_of, found.share_of, self.problem, self.capacity)
        hottest = _mean_hottest(found, self.rows, self.problem.speed)
        if hottest < self.value:
            self.best, self.value = found, hottest


def _mean_hottest(slots: Slots, load: np.ndarray, speed: np.ndarray) -> float:
    """Mean over windows of the hottest load over speed of one layer; load: [W, E]."""
    return float(np.mean([slots.hottest(row[None], speed)[0] for row in load]))


def _next(refuted: float, step: float) -> float:
    """The least value that is not refuted."""
    return math.ceil(refuted / step * (1 - 1e-12)) * step if step > refuted * TOLERANCE else refuted


class _Question:
    """Do all devices of a layer end by a given time? load: [E]."""

    def __init__(self, load: np.ndarray, problem: Problem, solver: str, seed: int) -> None:
        self.load, self.problem, self.solver, self.seed = load, problem, solver, seed
        if problem.groups == 1:
            return
        kinds = host_kinds(problem.speed, problem.capacity, problem.hosts)
        options = divisions(problem.groups, *kinds)
        if options is None or len(options[1]) > DIVISIONS:
            raise TooManyPatterns(f"more than {DIVISIONS} divisions of groups over hosts")
        self.alike = kinds[1]
        self.sets, self.chosen = options
        self.promise = division_bounds(
            load, problem.speed, problem.capacity, problem.hosts, problem.groups, problem.shares, *options
        )

    def answer(self, end: float, time_limit: float) -> np.ndarray | None:
        """Experts in slots [R] of a placement (its shares are to be solved for), or None: proven that there is none."""
        began = time.perf_counter()
        problem = self.problem
        at = np.full(int(problem.capacity.sum()), EMPTY)
        if problem.groups == 1:
            found = self._ask(np.arange(len(self.load)), np.arange(len(problem.speed)), end, time_limit)
            return found if found is None else self._put(at, np.arange(len(problem.speed)), found)
        known: dict[tuple[int, int], np.ndarray | None] = {}
        for p in np.argsort(self.promise, kind="stable"):
            if self.promise[p] > end:
                return None
            for x, s in enumerate(self.chosen[p].tolist()):
                key = (s, 0 if self.alike else x)
                if key not in known:
                    experts = np.flatnonzero(np.repeat(self.sets[s], len(self.load) // problem.groups))
                    left = max(time_limit - (time.perf_counter() - began), 0.1)
                    known[key] = self._ask(experts, self._devices(key[1]), end, left)
                found = known[key]
                if found is None:
                    break
                self._put(at, self._devices(x), found)
            else:
                return at
        return None

    def _devices(self, host: int) -> np.ndarray:
        """A host's devices, in an order that is the same on hosts that are alike."""
        mine = np.flatnonzero(self.problem.hosts == host)
        return mine[np.lexsort((self.problem.capacity[mine], self.problem.speed[mine]))]

    def _put(self, at: np.ndarray, devices: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Write the slots of some devices, one device after another, into those of all."""
        capacity = self.problem.capacity
        first = np.cumsum(capacity) - capacity
        taken = 0
        for g in devices:
            at[first[g] : first[g] + capacity[g]] = found[taken : taken + capacity[g]]
            taken += capacity[g]
        return at

    def _ask(self, experts: np.ndarray, devices: np.ndarray, end: float, time_limit: float) -> np.ndarray | None:
        """Experts in the slots of these devices, or None: proven that there is none."""
        problem = self.problem
        at = feasible(
            self.load[experts],
            problem.speed[devices],
            problem.capacity[devices],
            end,
            shares=problem.shares,
            full=problem.full,
            solver=self.solver,
            seed=self.seed,
            time_limit=time_limit,
        )
        return None if at is None else np.where(at == EMPTY, EMPTY, experts[at])
