"""Small placements by brute force: what is minimised is computed here anew, from the document alone.

Loads, windows and fan-out are counted from the trace; only the smoothed traffic and the load samples, which are input
to the problem, are the product's.
"""

from itertools import combinations, product

import numpy as np
import pytest

from moeplan.planner.place.fleet import even_fleet
from moeplan.spec.placement import PlacementDevice

CLOSE = 1e-6  # relative: what HiGHS may take for equal


def subsets(devices):
    return [s for n in range(1, devices + 1) for s in combinations(range(devices), n)]


def held(placement):
    """[L][E] the set of devices of every expert."""
    return [
        [tuple(g for g, on in enumerate(layer.slots) if e in on) for e in range(placement.num_experts)]
        for layer in placement.layers
    ]


def keeps_rules(chosen, fleet, groups, full):
    """Slots, groups and full slots of one layer; chosen: [E] sets of devices."""
    count = [sum(g in s for s in chosen) for g in range(len(fleet))]
    if any(c > d.capacity for c, d in zip(count, fleet, strict=True)):
        return False
    reach = len(chosen) // (1 if groups == 1 else len({d.host for d in fleet}))  # experts that a device may hold
    if full and any(c != min(d.capacity, reach) for c, d in zip(count, fleet, strict=True)):
        return False
    if groups == 1:
        return True
    names, size = sorted({d.host for d in fleet}), len(chosen) // groups
    host = [{fleet[g].host for s in chosen[k * size : (k + 1) * size] for g in s} for k in range(groups)]
    return all(len(h) == 1 for h in host) and all(host.count({n}) == groups // len(names) for n in names)


def hottest(chosen, load, speed, shares):
    """Hottest load over speed of one layer and window."""
    if shares == "even":
        finish = [sum(x / len(s) for s, x in zip(chosen, load, strict=True) if g in s) for g in range(len(speed))]
        return max(f / v for f, v in zip(finish, speed, strict=True))
    # Optimal shares: some set of devices must take all of the experts that are nowhere else.
    return max(
        sum(x for s, x in zip(chosen, load, strict=True) if set(s) <= set(some)) / sum(speed[g] for g in some)
        for some in subsets(len(speed))
    )


def mean_over_ideal(chosen, windows, speed, shares):
    """Mean over windows [W, E] of one layer; a window without load counts 1."""
    ideal = [w.sum() / sum(speed) for w in windows]
    return np.mean([hottest(chosen, w, speed, shares) / i if i else 1.0 for w, i in zip(windows, ideal, strict=True)])


def layouts(experts, fleet, groups, full, copies):
    choices = subsets(len(fleet)) if copies else [(g,) for g in range(len(fleet))]
    return [c for c in product(choices, repeat=experts) if keeps_rules(c, fleet, groups, full)]


def check_balance(placement, windows, request):
    """Value, rules and gap of a placement for balance; windows: [W, L, E]."""
    speed = [d.speed for d in request.devices]
    experts = windows.shape[2]
    rows = layouts(experts, request.devices, request.groups, request.equal_slots, request.slots > experts)
    best = np.mean(
        [min(mean_over_ideal(c, w, speed, request.shares) for c in rows) for w in windows.transpose(1, 0, 2)]
    )
    mine = held(placement)
    assert all(keeps_rules(c, request.devices, request.groups, request.equal_slots) for c in mine)
    value = 0.0
    for layer, w in zip(placement.layers, windows.transpose(1, 0, 2), strict=True):
        loads = w @ layer.share_matrix(experts) / speed
        ideal = w.sum(axis=1) / sum(speed)
        value += np.mean([f.max() / i if i else 1.0 for f, i in zip(loads, ideal, strict=True)])
    solver = placement.solver
    assert solver.objective == pytest.approx(value / len(placement.layers), rel=1e-9)
    assert solver.objective == pytest.approx(best, rel=CLOSE)
    assert solver.bound <= best * (1 + CLOSE)
    assert solver.gap == 0
    assert solver.status == "optimal"


def unequal(rng, devices, hosts, slots):
    fleet = even_fleet(devices, hosts, slots, False)
    if rng.random() < 0.5:
        return fleet
    return tuple(PlacementDevice(host=d.host, speed=float(rng.choice([1, 2, 0.7])), capacity=d.capacity) for d in fleet)


def random_ids(rng, tokens, layers, experts, top_k):
    """[T, L, K] skewed and with affinity: the layers' order of experts is shared by the tokens of a topic."""
    taste = rng.normal(size=(3, layers, experts)) * 1.5
    gumbel = rng.gumbel(size=(tokens, layers, experts)) + taste[rng.integers(0, 3, tokens)]
    return np.argsort(-gumbel, axis=2)[:, :, :top_k]


def windows_of(ids, experts, count=16):
    """[W, L, E]"""
    parts = [p for p in np.array_split(ids, count) if len(p)]
    return np.stack([[np.bincount(p[:, i].ravel(), minlength=experts) for i in range(ids.shape[1])] for p in parts])
