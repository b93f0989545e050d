"""Lower bounds on the hottest device with replication: no placement that keeps the rules of ``replication`` is cooler.

    (1) mean:     the load of a set of devices over their speed, all of them equally busy       ``_peak``
    (2) copies:   an expert with c copies puts at least load * relief[c] on one of its devices;
                  the slots allow only so many copies                                           ``_peak``, ``relief``
    (2b) company: a device whose slots must be filled, by rule or because the others hold too few, has beside that copy
                  the lightest others at least; even shares                                     ``_peak``, ``forced``
    (3) hosts:    whole groups of experts go to hosts, as many to each: the best of all such
                  divisions, each host judged by (1) and (2) on its own                         ``division_bounds``
    (4) whole:    whole loads and speeds have values between which there is nothing              ``hottest_step``

relief[c], even shares: c copies on the fastest devices end at load / (c * speed of the slowest of them), and fewer may
be better: the least over 1..c of 1 / (c * speed[c]), fastest first. Optimal shares: 1 / (speed[1] + .. + speed[c]).
Giving the next copy to the largest load * relief minimises that largest value, as relief never grows.

Where the divisions are too many to look at, (3) is replaced by: (1) and (2) on the whole, and each group on the
strongest host.
"""

# L layers, E experts, G devices, X hosts, K groups, S sets of K / X groups, P divisions of the groups over the hosts

import math
from functools import lru_cache
from itertools import combinations
from math import comb, factorial
from typing import Literal

import numpy as np

from ..jit import njit

Shares = Literal["even", "optimal"]
MAX_DIVISIONS = 20_000
FINEST = 1e6  # steps in one unit of load over speed: closer values are not told apart


def hottest_bound(
    load: np.ndarray,
    speed: np.ndarray,
    capacity: np.ndarray,
    hosts: np.ndarray,
    groups: int,
    shares: Shares,
    full: bool = False,
) -> np.ndarray:
    """[L] lower bounds on the hottest load over speed; load: [L, E], the rest as in ``replication.replicate``."""
    found = _bounds(load, speed, capacity, hosts, groups, shares, full)
    for layer, row in enumerate(load):
        step = hottest_step(row, speed, capacity, shares)
        if step and math.isfinite(found[layer]):
            found[layer] = max(found[layer], math.ceil(found[layer] / step * (1 - 1e-12)) * step)
    return found


def _bounds(
    load: np.ndarray,
    speed: np.ndarray,
    capacity: np.ndarray,
    hosts: np.ndarray,
    groups: int,
    shares: Shares,
    full: bool,
) -> np.ndarray:
    """[L] (1) to (3)."""
    if groups == 1:
        return np.array([_host_peak(row, speed, capacity, shares, full) for row in load])
    options = divisions(groups, *host_kinds(speed, capacity, hosts))
    if options is not None:
        sets, chosen = options
        cost = [division_bounds(row, speed, capacity, hosts, groups, shares, sets, chosen, full) for row in load]
        return np.array([c.min() for c in cost])
    whole = np.array([_host_peak(row, speed, capacity, shares, full) for row in load])
    members = [hosts == h for h in range(hosts.max() + 1)]
    by_group = load.reshape(len(load), groups, -1)
    alone = [
        [min(_host_peak(group, speed[m], capacity[m], shares) for m in members) for group in row] for row in by_group
    ]
    return np.maximum(whole, np.max(alone, axis=1))


def hottest_step(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, shares: Shares) -> float:
    """One layer's hottest load over speed is a whole multiple of this; 0 where nothing is known. load: [E]."""
    if any((x != np.round(x)).any() for x in (load, speed)):
        return 0.0
    if shares == "optimal":  # load of some experts over speed of some devices
        most = int(speed.sum())
        unit = math.lcm(*range(1, most + 1)) if most <= 32 else 0
    else:
        copies = min(len(speed), int(np.minimum(capacity, len(load)).sum()) - len(load) + 1)
        if copies < 1 or copies > 32:
            return 0.0
        unit = math.lcm(*speed.astype(int).tolist()) * math.lcm(*range(1, copies + 1))
    return 1 / unit if 0 < unit <= FINEST else 0.0


def relief(speed: np.ndarray, capacity: np.ndarray, shares: Shares) -> np.ndarray:
    """[G'] least load over speed of the busiest of 1, 2, .. copies, per unit of load, on devices that have slots."""
    fastest = np.sort(speed[capacity > 0])[::-1]
    if shares == "optimal":
        return 1 / np.cumsum(fastest)
    return np.minimum.accumulate(1 / (np.arange(1, len(fastest) + 1) * fastest))


def host_kinds(speed: np.ndarray, capacity: np.ndarray, hosts: np.ndarray) -> tuple[int, bool]:
    """(number of hosts, whether all are alike in their devices)."""
    kinds = {tuple(sorted(zip(speed[m], capacity[m], strict=True))) for m in (hosts == h for h in np.unique(hosts))}
    return len(np.unique(hosts)), len(kinds) == 1


@lru_cache(maxsize=8)
def divisions(groups: int, hosts: int, alike: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """All ways to give every host groups / hosts of the groups, or None where they are more than ``MAX_DIVISIONS``.

    Returns sets [S, K] bool (groups of each set) and chosen [P, X] (the set of each host). Where hosts are alike,
    divisions that differ by the names of hosts only are listed once.
    """
    size = groups // hosts
    count = factorial(groups) // factorial(size) ** hosts // (factorial(hosts) if alike else 1)
    if count > MAX_DIVISIONS:
        return None
    members = list(combinations(range(groups), size))
    number = {m: i for i, m in enumerate(members)}
    found: list[list[int]] = []

    def extend(left: tuple[int, ...], before: list[int]) -> None:
        if not left:
            found.append(before)
            return
        for m in combinations(left, size):
            if alike and m[0] != left[0]:
                break
            extend(tuple(k for k in left if k not in m), [*before, number[m]])

    extend(tuple(range(groups)), [])
    sets = np.zeros((comb(groups, size), groups), bool)
    for i, m in enumerate(members):
        sets[i, list(m)] = True
    return sets, np.array(found)


def division_bounds(
    load: np.ndarray,
    speed: np.ndarray,
    capacity: np.ndarray,
    hosts: np.ndarray,
    groups: int,
    shares: Shares,
    sets: np.ndarray,
    chosen: np.ndarray,
    full: bool = False,
) -> np.ndarray:
    """[P] bounds on one layer's hottest device under each division; load: [E]; ``inf`` where slots are missing."""
    by_group = np.ascontiguousarray(load.reshape(groups, -1))
    alike = host_kinds(speed, capacity, hosts)[1]
    cost = np.empty((chosen.shape[1], len(sets)))
    for h in range(len(cost)):
        member = hosts == h
        if h and alike:
            cost[h] = cost[0]
            continue
        experts = int(sets[0].sum()) * by_group.shape[1]
        slots = int(np.minimum(capacity[member], experts).sum())
        useful = relief(speed[member], capacity[member], shares)
        held, fast = forced(experts, speed[member], capacity[member], shares, full)
        cost[h] = _peaks(by_group, sets, useful, slots, speed[member & (capacity > 0)].sum(), held, fast)
    return cost[np.arange(len(cost)), chosen].max(axis=1)


def forced(
    experts: int, speed: np.ndarray, capacity: np.ndarray, shares: Shares, full: bool
) -> tuple[np.ndarray, np.ndarray]:
    """(copies that a device must hold at least, its speed), each kind of device that has slots once; [kinds]."""
    usable = np.minimum(capacity, experts)
    least = usable if full else np.maximum(experts - (usable.sum() - usable), 0)
    if shares == "optimal" and usable.sum() > experts:  # copies may take nothing
        least = np.zeros_like(usable)
    kinds = sorted({(int(k), float(s)) for k, s, r in zip(least, speed, usable, strict=True) if r > 0})
    return np.array([k for k, _ in kinds], np.int64), np.array([s for _, s in kinds], float)


def _host_peak(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, shares: Shares, full: bool = False) -> float:
    """(1) and (2) for experts that may use these devices and no others; load: [experts]."""
    slots = int(np.minimum(capacity, len(load)).sum())
    if slots < len(load):
        return np.inf
    held, fast = forced(len(load), speed, capacity, shares, full)
    useful, usable = relief(speed, capacity, shares), speed[capacity > 0].sum()
    return float(_peak(np.ascontiguousarray(load), useful, slots, usable, held, fast))


@njit(cache=True, nogil=True)
def _peaks(
    by_group: np.ndarray,
    sets: np.ndarray,
    relief: np.ndarray,
    slots: int,
    speed: float,
    held: np.ndarray,
    fast: np.ndarray,
) -> np.ndarray:
    """[S] ``_peak`` of the experts of each set of groups; by_group: [K, E / K], sets: [S, K]."""
    peaks = np.empty(len(sets))
    size, width = sets[0].sum(), by_group.shape[1]
    load = np.empty(size * width)
    for s in range(len(sets)):
        filled = 0
        for k in range(len(by_group)):
            if sets[s, k]:
                load[filled : filled + width] = by_group[k]
                filled += width
        peaks[s] = _peak(load, relief, slots, speed, held, fast) if slots >= len(load) else np.inf
    return peaks


@njit(cache=True, nogil=True)
def _peak(load: np.ndarray, relief: np.ndarray, slots: int, speed: float, held: np.ndarray, fast: np.ndarray) -> float:
    """The larger of the mean, the least largest load in so many slots, and the load of devices with ``held`` copies."""
    most = min(len(relief), slots - len(load) + 1)
    order = np.argsort(load)
    rank = np.empty(len(load), np.int64)
    rank[order] = np.arange(len(load))
    lightest = np.zeros(len(load) + 1)  # total of so many lightest copies
    for i in range(len(load)):
        lightest[i + 1] = lightest[i] + load[order[i]] / most
    copies = np.ones(len(load), np.int64)
    mean = load.sum() / speed
    for g in range(len(held)):
        mean = max(mean, lightest[held[g]] / fast[g])
    worst = np.empty(len(load))
    for e in range(len(load)):
        worst[e] = _alone(load[e], 1, rank[e], relief, lightest, held, fast, most)
    for _ in range(slots - len(load)):
        e = int(worst.argmax())
        if worst[e] <= mean or copies[e] == len(relief):
            break
        copies[e] += 1
        worst[e] = _alone(load[e], copies[e], rank[e], relief, lightest, held, fast, most)
    return max(mean, worst.max())


@njit(cache=True, nogil=True)
def _alone(
    load: float,
    copies: int,
    rank: int,
    relief: np.ndarray,
    lightest: np.ndarray,
    held: np.ndarray,
    fast: np.ndarray,
    most: int,
) -> float:
    """(2) and (2b) of an expert with so many copies at most; rank: among all experts, lightest first."""
    least = np.inf
    for g in range(len(held)):
        others = max(held[g] - 1, 0)
        company = lightest[others]
        if rank < others:  # it is among the lightest itself
            company = lightest[others + 1] - load / most
        least = min(least, (load / copies + company) / fast[g])
    return max(load * relief[copies - 1], least)
