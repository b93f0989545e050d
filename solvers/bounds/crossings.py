"""Proven lower bounds on token movement: how few tokens any placement lets change devices between layers.

Single copies, slots #{e: d[l, e] = g} <= capacity[g], optionally a limit on
every device's load over speed; minimise sum_l sum_{a,b} transitions[l][a, b] * weight(d[l, a], d[l+1, b]). Or, as in
``annealing``, a cap on the mean over samples of load and layers of the hottest device's load over speed.

weight is ``device_weight`` between the devices of a host and ``host_weight``, no less, between hosts:

    movement = device_weight * (tokens that change devices) + (host_weight - device_weight) * (tokens that change hosts)

Both terms are the same problem, with devices or with hosts as *places*; each is bounded by itself, and the bounds add.

    slots          an expert shares its place with at most max(capacity) experts of the next layer, and of the one
                   before: all but its heaviest successors (predecessors) leave.             ``_least_by_slots``
    matching       the same for all experts at once: the pairs that share a place are a b-matching, of no more pairs in
                   all than the fullest places allow; the heaviest is a linear program.      ``_least_by_matching``
    spectral       Donath and Hoffman's eigenvalue bound with the best diagonal, all layers at once.
    semidefinite   the spectral bound's matrix with entries in 0..1.
    triangle       the same, with sharing a place transitive, and with the limit and the cap.

Spectral to triangle are relaxations of one run, in ``bounds.semidefinite``; matching, which seldom comes near them,
has what time they leave. The relaxations take every place for as large and as fast as the largest and fastest; what
limit and cap add is in triangle only. The linear relaxation of ExFlow's integer program proves nothing: by symmetry,
all experts evenly on all devices move nothing.
"""

# B boundaries (L - 1), L layers, E experts, G devices, P places, S samples

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..balance import balance_bound, idle, over_ideal
from ..placement.affinity import least_by_slots
from ..placement.problem import AffinityProblem, Level, Place
from .cap_rows import CapRows
from .rows import LoadRows, Rows
from .semidefinite import least_leaving

NAMES = ("slots", "matching", "spectral", "semidefinite", "triangle")  # in this order
DEFAULT_STEPS = 400
LATE = 0.5  # of the longest linear program: what building one and reading it takes beside solving
MATCHING = 0.5  # seconds below which none is begun
TIME_OUT = 1  # linprog's status
SAFETY = 1e-9  # of the tokens: what floating-point linear algebra may add to a bound


def affinity_bounds(
    transitions: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    *,
    load: ArrayLike | None = None,
    speed: ArrayLike | None = None,
    limit: ArrayLike | None = None,
    samples: ArrayLike | None = None,
    balance_cap: float = math.inf,
    steps: int = DEFAULT_STEPS,
    time_limit: float = math.inf,
    on_bound: Callable[[float], None] | None = None,
) -> dict[str, float]:
    """Every bound by name, in the unit of the movement; all of them hold, the largest is the one to quote.

    transitions: [B, E, E] tokens from expert a of a layer to expert b of the next; capacity: [G] slots per layer;
    hosts: [G] number of each device's host; 0 <= device_weight <= host_weight.
    load: [L, E]; speed: [G] (default 1); limit: [L] largest load over speed of any device (default none).
    samples: [S, L, E] loads, of which the mean balance (``balance.mean_balance``) is at most ``balance_cap``.
    steps: work budget of the relaxations for devices, and again for hosts; 0 leaves them out. A step is an eigenvalue
    problem of 2 E slots for each boundary at most; devices and hosts have a thread each. time_limit: seconds, a
    ceiling: what has not started by then is left out (``slots`` never is), and a relaxation cut short has a weaker
    bound. on_bound: is told of the best bound so far, which only rises, from either thread.

    Raises ``ValueError`` on malformed input and ``Infeasible`` when slots are missing.
    """
    started = time.perf_counter()
    problem = AffinityProblem.checked(
        transitions, capacity, hosts, device_weight, host_weight, load=load, speed=speed, limit=limit
    )
    if steps < 0 or not time_limit > 0:
        raise ValueError(f"steps must be at least 0 and time_limit positive, got {steps} and {time_limit}")
    if samples is None and balance_cap < math.inf:
        raise ValueError(f"balance_cap {balance_cap} needs samples, the loads whose mean balance it limits")
    levels, counts = problem.levels, problem.transitions
    slots = [_slots(problem, level) for level in levels]
    sized = list(zip(levels, slots, strict=True))
    safety = SAFETY * host_weight * float(counts.sum())
    bounds = {"slots": sum(level.weight * float(_least_by_slots(counts, held).sum()) for level, held in sized)}
    if steps > 0 and levels and time.perf_counter() - started < time_limit:
        relative = None if samples is None or balance_cap == math.inf else _over_ideal(problem, samples)
        cap = balance_cap - (0.0 if relative is None else idle(relative))

        rising = _Rising(safety, bounds["slots"], on_bound)

        def relaxed(level: Level, held: np.ndarray) -> dict[str, float]:
            places, largest = len(held), int(held.max())
            rows = _load_rows(problem, level, places * largest)
            rows += _cap_rows(problem, level, places * largest, relative, cap)
            told = partial(rising.take, level)
            return least_leaving(
                counts, places, largest, rows, steps=steps, deadline=started + time_limit, on_bound=told
            )

        with ThreadPoolExecutor(len(levels)) as pool:
            for level, found in zip(levels, pool.map(relaxed, levels, slots), strict=True):
                for name, least in found.items():
                    bounds[name] = bounds.get(name, 0.0) + level.weight * least
    if time_limit - (time.perf_counter() - started) > MATCHING:
        until = started + time_limit
        bounds["matching"] = sum(level.weight * _least_by_matching(counts, held, until) for level, held in sized)
    return {name: max(float(bounds[name]) - safety, 0.0) for name in NAMES if name in bounds}


class _Rising:
    """The best bound so far: of every level what its tokens pay at least, added up."""

    def __init__(self, safety: float, best: float, on_bound: Callable[[float], None] | None) -> None:
        self.safety, self.best, self.on_bound = safety, best, on_bound
        self.least: dict[int, float] = {}  # by the number of places
        self.lock = Lock()
        if on_bound:
            on_bound(max(best - safety, 0.0))

    def take(self, level: Level, leaving: float) -> None:
        """leaving: tokens that change this level's places, at least."""
        with self.lock:
            self.least[len(level.places)] = level.weight * leaving
            total = sum(self.least.values())
            if self.on_bound and total > self.best:
                self.best = total
                self.on_bound(max(total - self.safety, 0.0))


def _slots(problem: AffinityProblem, level: Level) -> np.ndarray:
    """[P] slots of the places that have any; none needs more than there are experts."""
    slots = np.array([problem.capacity[list(place)].sum() for place in _used(problem, level)])
    return np.minimum(slots, problem.experts)


def _load_rows(problem: AffinityProblem, level: Level, size: int) -> list[Rows]:
    """The limit on the fastest place, with ``size`` experts a layer; none where it never binds."""
    places = _used(problem, level)
    mean = problem.load.sum(axis=1) / len(places)
    limit = np.where(mean > 0, problem.limit * _fastest(problem, places) / np.where(mean > 0, mean, 1.0), np.inf)
    limit = np.minimum(limit, len(places))  # all of the load on one place
    if (limit >= len(places)).all() or problem.layers == 1:
        return []
    load = np.zeros((problem.layers, size))
    load[:, : problem.experts] = problem.load / np.where(mean > 0, mean, 1.0)[:, None]
    return [LoadRows(load, limit)]


def _cap_rows(problem: AffinityProblem, level: Level, size: int, relative: np.ndarray | None, cap: float) -> list[Rows]:
    """The cap, for the fastest place; relative: [S, L, E] loads over the ideal finish, None without a cap."""
    if relative is None or problem.layers == 1:
        return []
    places = _used(problem, level)
    mean = float(problem.speed.sum()) / len(places)
    load = np.zeros((*relative.shape[:2], size))
    load[:, :, : problem.experts] = relative / mean
    least = [[balance_bound(row, problem.speed, problem.capacity) for row in sample] for sample in relative]
    return [CapRows(load, np.array(least), cap, _fastest(problem, places) / mean)]


def _over_ideal(problem: AffinityProblem, samples: ArrayLike) -> np.ndarray:
    """[S, L, E] validated, in parts of the ideal finish."""
    loads = np.asarray(samples, float)
    if loads.ndim != 3 or loads.shape[1:] != problem.load.shape or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"samples must be finite, non-negative [S, L, E] of {problem.load.shape}, got {loads.shape}")
    return over_ideal(loads, problem.speed)


def _used(problem: AffinityProblem, level: Level) -> list[Place]:
    """The places that have slots."""
    return [place for place in level.places if problem.capacity[list(place)].any()]


def _fastest(problem: AffinityProblem, places: list[Place]) -> float:
    return max(float(problem.speed[list(place)].sum()) for place in places)


def _least_by_slots(transitions: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """[B]"""
    return least_by_slots(transitions, int(capacity.max()))[0]


def _least_by_matching(transitions: np.ndarray, capacity: np.ndarray, deadline: float) -> float:
    """The linear program relaxes pairs to 0..1; its dual solution, made exactly feasible, is the proof."""
    # Imported when they are needed: they take as long as all else that a command begins with.
    from scipy.optimize import linprog
    from scipy.sparse import csr_array, eye_array, kron, vstack

    leaving = _least_by_slots(transitions, capacity)
    experts, slots = transitions.shape[1], int(capacity.max())
    # sum_p n[p] n'[p] <= sum_p n[p]^2 (or n'), which is largest with the largest places full.
    free, pairs = experts, 0
    for most in sorted(capacity.tolist(), reverse=True):
        pairs += min(most, free) ** 2
        free -= min(most, free)
    unit: Any = eye_array(experts)
    ones: Any = csr_array(np.ones((1, experts)))
    rows: Any = vstack([kron(unit, ones), kron(ones, unit), csr_array(np.ones((1, experts**2)))]).tocsr()
    limits = np.concatenate([np.full(2 * experts, float(slots)), [float(pairs)]])
    longest = 0.0
    for boundary, counts in enumerate(transitions):
        total = float(counts.sum())
        if total == 0.0:
            continue
        now = time.perf_counter()
        left = deadline - now - LATE * longest
        if left <= 0:
            break
        weight = counts.ravel() / total
        options: Any = {"time_limit": left} if left < math.inf else {}
        result = linprog(-weight, A_ub=rows, b_ub=limits, bounds=(0, 1), method="highs", options=options)
        longest = max(longest, time.perf_counter() - now)
        if result.status == TIME_OUT:
            break
        if result.status != 0:
            raise AssertionError(f"b-matching: {result.message}")
        price = np.maximum(-result.ineqlin.marginals, 0.0)
        staying = float(limits @ price + np.maximum(weight - rows.T @ price, 0.0).sum())
        leaving[boundary] = max(leaving[boundary], total * (1 - staying))
    return float(leaving.sum())
