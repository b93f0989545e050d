"""Small placements with copies against brute force, value and gap."""

import numpy as np
import pytest
from scipy.optimize import linprog

from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.request import Request
from moeplan.planner.place.solve import place
from moeplan.spec.trace import Trace
from moeplan.tests.exact_cases import CLOSE, check_balance, layouts, random_ids, unequal, windows_of


@pytest.mark.parametrize("shares", ["even", "optimal"])
@pytest.mark.parametrize("part", range(4))
def test_copies_of_counts_agree_with_brute_force(shares, part):
    for seed in range(15 * part, 15 * part + 15):
        rng = np.random.default_rng(seed)
        devices, layers = int(rng.integers(2, 4)), int(rng.integers(1, 4))
        experts = int(rng.integers(devices, 6))
        hosts, groups = 1, 1
        if rng.random() < 0.4:
            devices, hosts, groups, experts = 2, 2, 2, int(rng.choice([4, 6]))
        slots = experts + int(rng.integers(0, 4)) * (rng.random() < 0.8)
        full = slots % devices == 0 and rng.random() < 0.5
        counts = np.round(rng.pareto(1.0, (layers, experts)) * 5) * (rng.random((layers, experts)) < 0.8)
        counts[rng.random(layers) < 0.15] = 0
        fleet = even_fleet(devices, hosts, slots, full) if full else unequal(rng, devices, hosts, slots)
        request = Request(fleet, slots, shares=shares, equal_slots=full, groups=groups, objective="balance")
        check_balance(place(Trace.of_counts(counts), request), counts[None], request)


@pytest.mark.parametrize("spare", [0, 2])
def test_windows_of_tokens_agree_with_brute_force(spare):
    for seed in range(12):
        rng = np.random.default_rng(seed)
        experts, layers = int(rng.integers(3, 5)), int(rng.integers(1, 3))
        ids = random_ids(rng, int(rng.integers(20, 70)), layers, experts, 2)
        fleet = unequal(rng, 2, 1, experts + spare)
        request = Request(fleet, experts + spare, objective="balance")
        check_balance(place(Trace.of(ids, experts), request), windows_of(ids, experts), request)


def test_windows_with_optimal_shares_agree_with_linear_programs():
    for seed in range(4):
        rng = np.random.default_rng(seed)
        ids = random_ids(rng, 40, 1, 3, 2)
        request = Request(even_fleet(2, 1, 4, False), 4, objective="balance", shares="optimal")
        found, windows = place(Trace.of(ids, 3), request), windows_of(ids, 3)[:, 0]
        ideal, best = windows.sum(axis=1) / 2, np.inf
        for chosen in layouts(3, request.devices, 1, False, True):
            pairs = [(e, g) for e, s in enumerate(chosen) for g in s]
            rows = np.zeros((len(windows), 2, len(pairs) + len(windows)))
            for i, (e, g) in enumerate(pairs):
                rows[:, g, i] = windows[:, e] / ideal
            for w in range(len(windows)):
                rows[w, :, len(pairs) + w] = -1
            whole = np.array([[float(p[0] == e) for p in pairs] + [0.0] * len(windows) for e in range(3)])
            cost = np.array([0.0] * len(pairs) + [1 / len(windows)] * len(windows))
            flat = rows.reshape(-1, rows.shape[2])
            result = linprog(cost, A_ub=flat, b_ub=np.zeros(len(flat)), A_eq=whole, b_eq=np.ones(3))
            best = min(best, result.fun)
        assert found.solver.objective == pytest.approx(best, rel=CLOSE)
        assert found.solver.gap == 0
