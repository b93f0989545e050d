"""Replication: how many copies of every expert, on which devices, and which share of its tokens each copy takes.

    at[l, r]                what slot r of layer l holds: an expert or nothing
    share[l, r]             of its expert's tokens: 1 / copies (even), or free (optimal)
    finish[w, l, g] = sum of share * load[w, l, expert] over the slots of device g / speed[g]
    minimise sum_l mean_w max_g finish[w, l, g]      a layer waits for its slowest device

    (1) slots:   capacity[g] per device and layer; every expert has a copy              ``Slots``
    (2) copies:  never two of an expert on one device                                   ``Slots``
    (3) groups:  the experts of a group stay on one host, with all their copies, and
                 every host has groups / hosts of the groups (groups > 1 only)          ``_assignments``, ``anneal``
    (4) full:    no empty slot, as serving engines demand (on request)                  ``fill``

Windows w are parts of the time that the loads were recorded over: what is cool in each of them, and not only on
average, stays cooler on what comes next. One window is the plain problem.

Layers are independent. Each is annealed with even shares from a greedy start (``replication.search``), under (3) for
the most promising divisions of groups over hosts; optimal shares are solved for afterwards (``shares``), with copies
moved on while that proves to pay. Bounds: ``bounds.replication``. Exact for small cases: ``exact.replication``.
"""

# W windows, L layers, E experts, G devices, R slots, X hosts, K groups

import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Timer

import numpy as np
from numpy.typing import ArrayLike

from ..bounds.replication import Shares, division_bounds, divisions, host_kinds, hottest_bound, relief
from ..result import Infeasible, Solution
from ..slots import EMPTY, Slots
from .greedy import fill, greedy
from .search import anneal
from .share_search import improve_shares
from .shares import optimal_shares

STEPS = 100_000  # changes tried per layer
SQUARINGS = (3, 5)  # powers 8, to order everything, and then 32, for the hottest alone
DIVISIONS_TRIED = 16  # per layer, the most promising first
NOTHING_HELD = np.zeros((1, 1), np.bool_)
LONGEST_WAIT = 1e6  # seconds: more is no limit
CLOSE = 1e-3  # a division whose result is this close to its bound ends the trials of others


@dataclass(frozen=True)
class Problem:
    """Validated input; load: [W, L, E], speed, capacity (at most E), hosts: [G] from 0, groups: K."""

    load: np.ndarray
    speed: np.ndarray
    capacity: np.ndarray
    hosts: np.ndarray
    groups: int
    shares: Shares
    full: bool


def replicate(
    load: ArrayLike,
    speed: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    *,
    groups: int = 1,
    shares: Shares = "even",
    full: bool = False,
    seed: int = 0,
    steps: int = STEPS,
    time_limit: float = 60.0,
    start: Slots | None = None,
) -> Solution[Slots]:
    """Copies, places and shares for the coolest hottest device, summed over the layers.

    load: [L, E] tokens per expert, or [W, L, E] windows of them; speed: [G] relative; capacity: [G] slots per layer;
    hosts: [G] number of each device's host. groups: expert groups, of adjacent experts, that must each stay on one
    host (1: free). full: every slot holds a copy (where a device has more slots than there are experts, they end).
    steps: work budget per layer and division of the groups. time_limit: seconds, a ceiling, looked at between rounds of
    a layer: layers begun after it keep their start.
    start: begin there, its shares made even where ``shares`` is, and never return a layer hotter than that; without it
    a greedy placement.

    The objective is the sum over layers of the mean over windows of the hottest load over speed. Raises
    ``Infeasible`` when slots are missing or groups or experts do not divide, ``ValueError`` on malformed arrays.
    """
    began = time.perf_counter()
    problem = checked(load, speed, capacity, hosts, groups, shares, full)
    layers = problem.load.shape[1]
    begin = _checked_start(start, problem) if start is not None else None
    bound = np.stack(
        [hottest_bound(w, problem.speed, problem.capacity, problem.hosts, groups, shares, full) for w in problem.load]
    )
    cut, halt = np.zeros(layers, bool), np.zeros(1, bool)

    def solve(layer: int) -> tuple[np.ndarray, np.ndarray]:
        def late() -> bool:
            cut[layer] |= halt[0] or time.perf_counter() - began > time_limit
            return bool(cut[layer])

        first = (begin.expert_of[layer], begin.share_of[layer]) if begin is not None else None
        return _solve_layer(problem, layer, bound[:, layer], steps, seed, first, late, halt)

    with _set_after(time_limit - (time.perf_counter() - began), halt), ThreadPoolExecutor(os.cpu_count()) as pool:
        solved = list(pool.map(solve, range(layers)))
    found = widened(np.stack([at for at, _ in solved]), np.stack([share for _, share in solved]), problem, capacity)
    objective = float(np.mean([found.hottest(w, problem.speed).sum() for w in problem.load]))
    seconds = time.perf_counter() - began
    solution = Solution.from_heuristic(found, objective, float(bound.mean(axis=0).sum()), seconds, "local search")
    return replace(solution, status="time_limit") if cut.any() and solution.status == "feasible" else solution


@contextmanager
def _set_after(seconds: float, halt: np.ndarray) -> Iterator[None]:
    """Set ``halt`` [1] once so many seconds are over: compiled loops look at it, and at no clock."""
    if seconds > LONGEST_WAIT:
        yield
        return
    timer = Timer(max(seconds, 0.0), halt.fill, (True,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def checked(
    load: ArrayLike,
    speed: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    groups: int,
    shares: Shares,
    full: bool,
) -> Problem:
    """The problem, or an error that names what is wrong with it; arguments as in ``replicate``."""
    loads, speeds, slots, host = np.asarray(load, float), np.asarray(speed, float), np.asarray(capacity), hosts
    if loads.ndim not in (2, 3) or 0 in loads.shape or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"load must be finite, non-negative [layers, experts] per window, got {list(loads.shape)}")
    if speeds.ndim != 1 or len(speeds) == 0 or not np.isfinite(speeds).all() or (speeds <= 0).any():
        raise ValueError(f"speed must hold a positive number per device, got {speed!r}")
    if slots.shape != speeds.shape or slots.dtype.kind not in "iu" or (slots < 0).any():
        raise ValueError(f"capacity must hold a whole number of slots for {len(speeds)} devices, got {capacity!r}")
    if np.shape(host) != speeds.shape:
        raise ValueError(f"hosts must hold a number for each of {len(speeds)} devices, got {hosts!r}")
    if shares not in ("even", "optimal"):
        raise ValueError(f"shares must be 'even' or 'optimal', got {shares!r}")
    experts = loads.shape[-1]
    number = np.unique(np.asarray(host), return_inverse=True)[1]
    count = int(number.max()) + 1
    slots = np.minimum(slots.astype(np.int64), experts)
    if groups < 1 or experts % groups:
        raise Infeasible(
            f"{experts} experts do not form {groups} equal groups: experts % groups must be 0",
            unit="groups",
            missing=1,
        )
    if groups > 1 and groups % count:
        raise Infeasible(
            f"{groups} groups of experts cannot be spread evenly over {count} hosts: groups % hosts must be 0, "
            "or let experts go anywhere (groups 1)",
            unit="groups",
            missing=count - groups % count,
        )
    host_slots = np.bincount(number, slots).astype(int) if groups > 1 else slots.sum(keepdims=True)
    need = experts // (count if groups > 1 else 1)
    if (host_slots < need).any():
        where = "every host needs" if groups > 1 else "the devices need"
        raise Infeasible(
            f"{where} {need} slots for one copy of each expert, got {int(host_slots.min())}: add slots",
            unit="slots",
            missing=int(np.maximum(need - host_slots, 0).sum()),
        )
    if groups > 1:  # a device cannot use more slots than its host has experts
        slots = np.minimum(slots, need)
    return Problem(loads.reshape(-1, *loads.shape[-2:]), speeds, slots, number, groups, shares, full)


def _checked_start(start: Slots, problem: Problem) -> Slots:
    """``start`` in this problem's slots; ValueError where it does not fit, or breaks (3)."""
    _, layers, experts = problem.load.shape
    if len(start.expert_of) != layers or start.num_experts != experts or len(start.capacity) != len(problem.speed):
        got = [len(start.expert_of), start.num_experts, len(start.capacity)]
        expected = [layers, experts, len(problem.speed)]
        raise ValueError(f"start must have {expected} layers, experts and devices, got {got}")
    lists = start.to_lists()
    fitted = Slots.from_lists([held for held, _ in lists], [share for _, share in lists], problem.capacity)
    if problem.groups > 1:
        host = problem.hosts[fitted.device_of_slot]
        for layer, row in enumerate(fitted.expert_of):
            held = row != EMPTY
            pairs = {(int(k), int(h)) for k, h in zip(row[held] * problem.groups // experts, host[held], strict=True)}
            size = np.bincount([h for _, h in pairs], minlength=host.max() + 1)
            if len(pairs) != problem.groups or len(set(size.tolist())) != 1:
                raise ValueError(f"start, layer {layer}: its groups of experts are not whole and even over the hosts")
    if problem.shares == "even":
        fitted = Slots.even(fitted.expert_of, problem.capacity)
    if problem.full and (fitted.expert_of == EMPTY).any():
        raise ValueError("start has empty slots, and every slot must hold a copy")
    return fitted


def _solve_layer(
    problem: Problem,
    layer: int,
    bound: np.ndarray,
    steps: int,
    seed: int,
    start: tuple[np.ndarray, np.ndarray] | None,
    late: Callable[[], bool],
    halt: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """(experts, shares), [R] each, of one layer; bound: [W]; halt: [1]."""
    load = np.ascontiguousarray(problem.load[:, layer])
    target = np.maximum(bound, 1e-300)  # positive, also in a window without load
    best, best_value = start, np.inf
    if start is not None:
        best_value = _value(problem, load, *start)
    for trial, (host_of, promise) in enumerate(_assignments(problem, load, start)):
        if trial == DIVISIONS_TRIED or (best is not None and trial and best_value <= promise * (1 + CLOSE)):
            break
        key = int(np.random.SeedSequence([seed, layer, trial]).generate_state(1)[0])
        begin = start[0] if start is not None and trial == 0 else None
        at, share = _search(problem, load, target, host_of, steps, key, begin, late, halt)
        value = _value(problem, load, at, share)
        if value < best_value or best is None:
            best, best_value = (at, share), value
        if late():
            break
    assert best is not None
    return best


def _assignments(
    problem: Problem, load: np.ndarray, start: tuple[np.ndarray, np.ndarray] | None
) -> Iterator[tuple[np.ndarray, float]]:
    """Hosts for the groups ([K]; all 0 where groups are free), most promising first, each with its bound.

    load: [W, E]. The start's own division comes first.
    """
    if problem.groups == 1:
        yield np.zeros(1, np.int64), 0.0
        return
    groups, experts = problem.groups, load.shape[1]
    if start is not None:
        slot_host = problem.hosts[np.repeat(np.arange(len(problem.capacity)), problem.capacity)]
        held = start[0] != EMPTY
        host_of = np.zeros(groups, np.int64)
        host_of[start[0][held] * groups // experts] = slot_host[held]
        yield host_of, 0.0
    options = divisions(groups, *host_kinds(problem.speed, problem.capacity, problem.hosts))
    by_group = load.reshape(len(load), groups, -1).sum(axis=2)
    if options is None:
        yield _longest_group_first(by_group, problem), 0.0
        return
    sets, chosen = options
    cost = np.mean(
        [
            division_bounds(w, problem.speed, problem.capacity, problem.hosts, groups, problem.shares, sets, chosen)
            for w in load
        ],
        axis=0,
    )
    for p in np.argsort(cost, kind="stable"):
        host_of = np.zeros(groups, np.int64)
        for h, s in enumerate(chosen[p]):
            host_of[sets[s]] = h
        yield host_of, float(cost[p])


def _longest_group_first(by_group: np.ndarray, problem: Problem) -> np.ndarray:
    """[K] hosts: heaviest group first to where it ends earliest, then swaps while they cool; by_group: [W, K]."""
    speed = np.bincount(problem.hosts, problem.speed)
    hosts, groups = len(speed), by_group.shape[1]
    free = np.full(hosts, groups // hosts)
    ends = np.zeros((len(by_group), hosts))
    host_of = np.empty(groups, np.int64)
    for k in np.argsort(-by_group.sum(axis=0), kind="stable"):
        hottest = (ends + by_group[:, k, None] / speed).sum(axis=0)
        h = int(np.where(free > 0, hottest, np.inf).argmin())
        host_of[k] = h
        free[h] -= 1
        ends[:, h] += by_group[:, k] / speed[h]
    while True:
        hot = int(ends.sum(axis=0).argmax())
        best, swap = ends.max(axis=1).sum() * (1 - 1e-9), None
        mine = np.flatnonzero(host_of == hot)
        for other in np.flatnonzero(np.arange(hosts) != hot):
            theirs = np.flatnonzero(host_of == other)
            rest = np.delete(ends, np.array([hot, other]), axis=1).max(axis=1, initial=0.0)[:, None, None]
            moved = by_group[:, mine, None] - by_group[:, None, theirs]  # [W, mine, theirs]
            here, there = (
                ends[:, hot, None, None] - moved / speed[hot],
                ends[:, other, None, None] + moved / speed[other],
            )
            hottest = np.maximum(np.maximum(here, there), rest).sum(axis=0)
            if hottest.min() < best:
                best = hottest.min()
                i, j = np.unravel_index(int(hottest.argmin()), hottest.shape)
                swap = (mine[i], theirs[j], other, moved[:, i, j])
        if swap is None:
            return host_of
        one, two, host, load = swap
        host_of[one], host_of[two] = host, hot
        ends[:, hot] -= load / speed[hot]
        ends[:, host] += load / speed[host]


def _search(
    problem: Problem,
    load: np.ndarray,
    target: np.ndarray,
    host_of: np.ndarray,
    steps: int,
    seed: int,
    begin: np.ndarray | None,
    late: Callable[[], bool],
    halt: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Anneal one layer under one division of the groups; load: [W, E], target: [W], host_of: [K]."""
    zones = int(host_of.max()) + 1
    zone_of_expert = np.repeat(host_of, load.shape[1] // len(host_of))
    zone_of_device = problem.hosts if zones > 1 else np.zeros(len(problem.hosts), np.int64)
    first = np.concatenate([[0], np.cumsum(problem.capacity)])
    if begin is None:
        gain = np.full((zones, len(problem.speed) + 1), np.inf)
        for z in range(zones):
            useful = relief(problem.speed[zone_of_device == z], problem.capacity[zone_of_device == z], "even")
            gain[z, : len(useful)] = useful
        mean = load.mean(axis=0)
        begin = greedy(mean, problem.speed, first, zone_of_expert, zone_of_device, gain, problem.full)
    at, best = begin, np.inf
    for squarings in SQUARINGS:
        if late():
            break
        budget = steps // len(SQUARINGS)
        to, value = anneal(
            at,
            load,
            problem.speed,
            first,
            zone_of_device,
            target,
            problem.full,
            squarings,
            budget,
            seed,
            halt,
            NOTHING_HELD,
            -1,
        )
        if value < best:
            at, best = to, value
    if problem.shares == "optimal":  # further copies cost nothing then
        copies = np.bincount(at[at != EMPTY], minlength=load.shape[1])
        fill(at, load.mean(axis=0), copies, first, zone_of_expert, zone_of_device)
        if len(load) == 1 and not late():
            tries = steps // (20 + len(at) // 10)  # what a solve of the shares costs, in changes
            at = improve_shares(at, load[0], problem.speed, first, zone_of_device, target[0], tries, seed, halt)
    placed = Slots.even(at[None], problem.capacity)
    if problem.shares == "optimal":
        placed = optimal_shares(placed, load[:, None], problem.speed)
    return placed.expert_of[0], placed.share_of[0]


def _value(problem: Problem, load: np.ndarray, at: np.ndarray, share: np.ndarray) -> float:
    """Mean over windows of the hottest load over speed; load: [W, E]."""
    device = np.repeat(np.arange(len(problem.capacity)), problem.capacity)
    tokens = np.where(at == EMPTY, 0.0, load[:, at] * share)
    return float(np.mean([(np.bincount(device, t, len(problem.speed)) / problem.speed).max() for t in tokens]))


def widened(at: np.ndarray, share: np.ndarray, problem: Problem, capacity: ArrayLike) -> Slots:
    """The solution in the caller's slots: those that could never be used stay empty."""
    wide = np.asarray(capacity, np.int64)
    rank = np.arange(at.shape[1]) - np.repeat(np.cumsum(problem.capacity) - problem.capacity, problem.capacity)
    slot = np.repeat(np.cumsum(wide) - wide, problem.capacity) + rank
    expert_of = np.full((len(at), int(wide.sum())), EMPTY)
    share_of = np.zeros(expert_of.shape)
    expert_of[:, slot], share_of[:, slot] = at, share
    return Slots(expert_of, share_of, wide)
