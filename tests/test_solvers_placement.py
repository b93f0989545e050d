from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible
from moeplan.solvers.balance import balance, balance_bound, finish, greedy_balance, linear, longest_first
from moeplan.solvers.placement.crossings import crossings, host_weights


def layouts(experts, capacity):
    """Every placement of one layer within the slots."""
    for placed in product(range(len(capacity)), repeat=experts):
        if (np.bincount(placed, minlength=len(capacity)) <= capacity).all():
            yield np.array(placed)


def random_devices(rng, experts, devices):
    speed = rng.choice([1.0, 2.0, 0.5], devices)
    capacity = rng.integers(0, experts + 1, devices)
    while capacity.sum() < experts:
        capacity[rng.integers(devices)] += 1
    return speed, capacity


def test_linear_is_contiguous_and_as_even_as_whole_numbers_allow():
    assert linear(8, 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert linear(7, 3).tolist() == [0, 0, 0, 1, 1, 2, 2]
    assert linear(2, 4).tolist() == [0, 1]


@pytest.mark.parametrize(("experts", "devices"), [(0, 1), (1, 0)])
def test_linear_needs_experts_and_devices(experts, devices):
    with pytest.raises(ValueError, match="at least 1"):
        linear(experts, devices)


def test_balance_is_hottest_over_ideal():
    load = [[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    assert balance([[0, 0, 1, 1]] * 3, load, [1.0, 1.0]).tolist() == [2.0, 1.0, 1.0]
    assert balance([[0, 0, 0, 1]], [[1, 1, 1, 1]], [3.0, 1.0]).tolist() == [1.0]


def test_crossings_weigh_hosts():
    transitions = [[[1, 2], [4, 8]]]
    weight = host_weights([0, 0, 1], 1.0, 10.0)
    assert weight.tolist() == [[0, 1, 10], [1, 0, 10], [10, 10, 0]]
    assert crossings([[0, 1], [0, 1]], transitions, weight) == 6
    assert crossings([[0, 2], [0, 1]], transitions, weight) == 2 + 4 * 10 + 8 * 10


def test_balance_bound_is_below_every_placement_and_greedy_keeps_the_slots():
    rng = np.random.default_rng(0)
    proven = 0
    for _ in range(150):
        experts, devices = int(rng.integers(1, 7)), int(rng.integers(1, 4))
        speed, capacity = random_devices(rng, experts, devices)
        load = rng.integers(0, 20, (1, experts)).astype(float)
        best = min(finish(placed, load[0], speed).max() for placed in layouts(experts, capacity))
        assert balance_bound(load[0], speed, capacity) <= best + 1e-12
        solution = greedy_balance(load, speed, capacity)
        placed = solution.assignment[0]
        assert (np.bincount(placed, minlength=devices) <= capacity).all()
        assert solution.objective == finish(placed, load[0], speed).max() >= best - 1e-12
        assert solution.bound <= best + 1e-12
        if solution.status == "optimal":
            proven += 1
            assert solution.objective == pytest.approx(best)
    assert proven > 20


@given(st.integers(1, 40), st.integers(1, 8), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_greedy_without_tight_slots_is_within_graham_of_the_bound(experts, devices, seed):
    load = np.random.default_rng(seed).random((3, experts))
    solution = greedy_balance(load, np.ones(devices), np.full(devices, experts))
    # Longest processing time first on equal machines: at most 4/3 of the optimum; list scheduling: 2 of this bound.
    assert solution.bound <= solution.objective <= 2 * solution.bound


def test_greedy_gives_fast_devices_more():
    solution = greedy_balance(np.ones((1, 12)), [1.0, 2.0, 3.0], [12, 12, 12])
    assert np.bincount(solution.assignment[0]).tolist() == [2, 4, 6]
    assert (solution.objective, solution.bound, solution.status) == (2.0, 2.0, "optimal")


def test_greedy_is_deterministic_and_ties_go_to_the_first():
    assert greedy_balance(np.ones((1, 4)), [1.0, 1.0], [2, 2]).assignment.tolist() == [[0, 1, 0, 1]]


def test_too_few_slots_says_how_many_are_missing():
    with pytest.raises(Infeasible, match="8 experts need 3 more slots: the devices hold 5") as error:
        greedy_balance(np.ones((2, 8)), [1.0, 1.0], [2, 3])
    assert (error.value.unit, error.value.missing) == ("slots", 3)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**20), st.integers(1, 4), st.integers(1, 16), st.integers(1, 5))
def test_longest_first_takes_expert_by_expert_to_where_it_ends_earliest(seed, layers, experts, devices):
    rng = np.random.default_rng(seed)
    load, speed = rng.integers(0, 6, (layers, experts)).astype(float), rng.choice([0.5, 1.0, 2.0], devices)
    capacity = rng.integers(0, 4, devices)
    capacity[0] += max(0, experts - capacity.sum())
    for row, placed in zip(load, longest_first(load, speed, capacity), strict=True):
        carried, free = [0.0] * devices, capacity.tolist()
        for expert in sorted(range(experts), key=lambda e: -row[e]):
            open_ = [g for g in range(devices) if free[g]]
            g = min(open_, key=lambda g: ((carried[g] + row[expert]) / speed[g], g))
            assert placed[expert] == g
            carried[g] += row[expert]
            free[g] -= 1
