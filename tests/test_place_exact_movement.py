"""Small placements of single copies against brute force, value and gap, with and without a balance cap."""

from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest

from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.interpolation import interpolated
from moeplan.planner.place.request import Request
from moeplan.planner.place.sample import load_samples
from moeplan.planner.place.solve import place
from moeplan.spec.errors import InfeasibleError
from moeplan.spec.trace import Trace
from moeplan.tests.exact_cases import (
    CLOSE,
    held,
    keeps_rules,
    layouts,
    mean_over_ideal,
    random_ids,
    unequal,
    windows_of,
)


def moved(chosen, trace, movement, fleet):
    """What a placement of single copies [L][E] moves: crossings of the expected traffic, or fan-out of the tokens."""
    device = np.array(chosen)[:, :, 0]
    names = [d.host for d in fleet]
    host = np.array([names.index(n) for n in names])[device]
    if movement == "coherent" and trace.layers > 1:
        traffic = interpolated(trace) / (trace.layers - 1)
        return sum(
            w * float((t * (a[:, None] != b[None, :])).sum())
            for w, at in ((0.3, device), (1.0, host))
            for t, (a, b) in zip(traffic, pairwise(at), strict=True)
        )
    total = 0.0
    for token in trace.expert_ids:
        for i, experts in enumerate(token):
            total += 0.3 * len(set(device[i][experts])) + 1.0 * len(set(host[i][experts]))
    return total / (trace.tokens * trace.layers)


def heat(chosen, samples, speed):
    """Mean balance over samples [S, L, E]."""
    return np.mean(
        [mean_over_ideal(c, w, speed, "even") for c, w in zip(chosen, samples.transpose(1, 0, 2), strict=True)]
    )


def brute_force(trace, request, samples, cap):
    """The least movement of placements whose mean balance is at most ``cap``; inf where there are none."""
    speed = [d.speed for d in request.devices]
    rows = layouts(trace.num_experts, request.devices, request.groups, False, False)
    heats = [[mean_over_ideal(c, w, speed, "even") for c in rows] for w in samples.transpose(1, 0, 2)]
    found = np.inf
    coherent = request.movement == "coherent" and trace.layers > 1
    if coherent:
        traffic = interpolated(trace) / (trace.layers - 1)
        names = [d.host for d in request.devices]
        at = np.array(rows)[:, :, 0]
        host = np.array([names.index(n) for n in names])[at]
        apart = sum(w * (x[:, None, :, None] != x[None, :, None, :]) for w, x in ((0.3, at), (1.0, host)))
        steps = [np.einsum("nmef,ef->nm", apart, t) for t in traffic]
    else:
        one = [Trace.of(trace.expert_ids[:, i : i + 1], trace.num_experts) for i in range(trace.layers)]
        inside = [[moved([c], t, "ep", request.devices) / trace.layers for c in rows] for t in one]
    for path in product(range(len(rows)), repeat=trace.layers):
        if np.mean([heats[i][n] for i, n in enumerate(path)]) > cap * (1 + 1e-9):
            continue
        if coherent:
            cost = sum(step[a, b] for step, (a, b) in zip(steps, pairwise(path), strict=True))
        else:
            cost = sum(inside[i][n] for i, n in enumerate(path))
        found = min(found, cost)
    return found


SHAPES = [
    (4, 2, 1, 1, 3),
    (4, 2, 2, 2, 3),
    (5, 2, 2, 1, 2),
    (4, 4, 2, 1, 2),
    (4, 4, 2, 2, 2),
    (5, 3, 1, 1, 2),
    (6, 2, 1, 1, 2),
]


def random_single(seed, movement):
    """(trace, request) without a cap; experts, devices, hosts, groups, layers as in SHAPES."""
    rng = np.random.default_rng(seed)
    experts, devices, hosts, groups, layers = SHAPES[seed % len(SHAPES)]
    layers = int(rng.integers(1, layers + 1)) if movement == "ep" else layers
    trace = Trace.of(random_ids(rng, int(rng.integers(20, 60)), layers, experts, int(rng.integers(1, 4))), experts)
    fleet = unequal(rng, devices, hosts, experts)
    return trace, Request(fleet, experts, objective="locality", movement=movement, groups=groups)


def check_movement(placement, trace, request, samples, cap):
    mine, solver = held(placement), placement.solver
    assert all(keeps_rules(c, request.devices, request.groups, False) for c in mine)
    assert heat(mine, samples, [d.speed for d in request.devices]) <= cap * (1 + 1e-9)
    best = brute_force(trace, request, samples, cap)
    assert solver.objective == pytest.approx(moved(mine, trace, request.movement, request.devices), rel=1e-9, abs=1e-12)
    assert solver.objective == pytest.approx(best, rel=1e-9, abs=1e-9)
    assert solver.bound <= best + 1e-9
    assert (solver.gap, solver.status) == (0, "optimal")


@pytest.mark.parametrize("movement", ["coherent", "ep"])
@pytest.mark.parametrize("part", range(3))
def test_movement_without_a_cap_agrees_with_brute_force(movement, part):
    for seed in range(14 * part, 14 * part + 14):
        trace, request = random_single(seed, movement)
        check_movement(place(trace, request), trace, request, trace.expert_counts[None], np.inf)


@pytest.mark.parametrize("movement", ["coherent", "ep"])
@pytest.mark.parametrize("part", range(2))
def test_movement_under_a_cap_agrees_with_brute_force(movement, part):
    refused = 0
    for seed in range(14 * part, 14 * part + 14):
        trace, request = random_single(seed, movement)
        counts = trace.expert_counts[None]
        cap = 1 + float(np.random.default_rng(seed).choice([0.02, 0.1, 0.3, 0.6]))
        request = replace(request, balance_cap=cap)
        if brute_force(trace, request, counts, cap) == np.inf:
            with pytest.raises(InfeasibleError, match="it is proven to be at least"):
                place(trace, request)
            refused += 1
        else:
            check_movement(place(trace, request), trace, request, counts, cap)
    assert 0 < refused < 14


@pytest.mark.parametrize("movement", ["coherent", "ep"])
def test_the_default_cap_is_kept_and_its_optimum_found(movement):
    for seed in range(3):
        trace, request = random_single(seed, movement)
        request = replace(request, objective="latency")
        found = place(trace, request)
        assert found.balance_cap is not None
        check_movement(found, trace, request, load_samples(trace), found.balance_cap)


def test_locality_with_copies_on_hosts_knows_the_best_balance():
    """Copies on several hosts trade balance for locality: the gap is to the coolest placement there is."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = random_ids(rng, 50, 2, 4, 2)
        request = Request(even_fleet(2, 2, 6, False), 6)
        found, windows = place(Trace.of(ids, 4), request), windows_of(ids, 4)
        rows = layouts(4, request.devices, 1, False, True)
        best = np.mean([min(mean_over_ideal(c, w, [1, 1], "even") for c in rows) for w in windows.transpose(1, 0, 2)])
        assert found.solver.bound == pytest.approx(best, rel=CLOSE)
        assert found.solver.gap == pytest.approx(1 - best / found.solver.objective, abs=CLOSE)


def test_equal_inputs_give_equal_placements():
    for movement in ("coherent", "ep"):
        trace, request = random_single(3, movement)
        a, b = (place(trace, request) for _ in range(2))
        assert a.layers == b.layers
    counts = Trace.of_counts(np.array([[9, 7, 6, 5, 1.0], [3, 3, 2, 8, 1]]))
    request = Request(even_fleet(2, 1, 8, False), 8, objective="balance")
    assert place(counts, request).layers == place(counts, request).layers
