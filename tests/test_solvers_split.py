import time
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible
from moeplan.solvers.splits.split import split
from moeplan.tests.yardsticks.split_program import split_mip


def brute_force(cost, units):
    """(makespan, sum of squares) of the lexicographic optimum, or the largest total that fits."""
    best, most = None, -1
    for counts in product(range(units + 1), repeat=len(cost)):
        values = [cost[g][n] for g, n in enumerate(counts)]
        if sum(counts) > units or not np.isfinite(values).all():
            continue
        most = max(most, sum(counts))
        if sum(counts) == units:
            key = (max(values), sum(v * v for v in values))
            best = key if best is None or key < best else best
    return best, most


def random_table(rng, devices, units):
    """Small whole numbers make ties likely; some are not monotone, some counts do not fit."""
    cost = rng.integers(0, 12, (devices, units + 1)).astype(float)
    if rng.random() < 0.5:
        cost = np.sort(cost, axis=1)
    if rng.random() < 0.5:
        cost[rng.random(cost.shape) < 0.3] = np.inf
    return cost


def test_equals_brute_force_on_hundreds_of_random_tables():
    rng = np.random.default_rng(0)
    infeasible = 0
    for _ in range(300):
        devices, units = int(rng.integers(1, 5)), int(rng.integers(0, 7))
        cost = random_table(rng, devices, units)
        best, most = brute_force(cost, units)
        if best is None:
            infeasible += 1
            with pytest.raises(Infeasible) as error:
                split(cost, units)
            assert error.value.unit == "units"
            if most >= 0:
                assert error.value.missing == units - most
            continue
        solution = split(cost, units)
        values = [cost[g, n] for g, n in enumerate(solution.assignment)]
        assert sum(solution.assignment) == units
        assert (solution.objective, sum(v * v for v in values)) == best
        assert max(values) == solution.objective == solution.bound
        assert solution.status == "optimal"
    assert 20 < infeasible < 200


def test_integer_program_agrees():
    rng = np.random.default_rng(1)
    compared = 0
    for _ in range(60):
        devices, units = int(rng.integers(1, 5)), int(rng.integers(1, 9))
        cost = random_table(rng, devices, units) * 1e-5 if rng.random() < 0.5 else random_table(rng, devices, units)
        try:
            exact = split(cost, units)
        except Infeasible as error:
            with pytest.raises(Infeasible, match=str(error)):
                split_mip(cost, units)
            continue
        program = split_mip(cost, units)
        total = [sum(cost[g, n] ** 2 for g, n in enumerate(s.assignment)) for s in (exact, program)]
        assert program.objective == pytest.approx(exact.objective, rel=1e-6)
        assert total[1] == pytest.approx(total[0], rel=1e-6)
        assert program.bound <= exact.objective * (1 + 1e-6)
        assert program.gap == pytest.approx(0, abs=1e-6)
        compared += 1
    assert compared > 20


def test_integer_program_agrees_with_another_back_end():
    cost = np.array([[0.0], [0.5], [0.25]]) + np.outer([1.0, 2.0, 3.5], np.arange(12))
    assert split_mip(cost, 11, solver="cbc").objective == pytest.approx(split(cost, 11).objective)


@given(
    units=st.integers(1, 60),
    speeds=st.lists(st.floats(0.1, 10), min_size=1, max_size=8),
    startup=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_increasing_costs_never_beat_the_fluid_bound_and_no_single_unit_helps(units, speeds, startup):
    n = np.arange(units + 1)
    cost = np.where(n > 0, startup, 0.0) + n / np.array(speeds)[:, None]
    solution = split(cost, units)
    counts = np.array(solution.assignment)
    assert solution.objective >= units / sum(speeds) - 1e-9
    for giver in np.flatnonzero(counts):
        for taker in range(len(speeds)):
            moved = counts + np.eye(len(speeds), dtype=int)[taker] - np.eye(len(speeds), dtype=int)[giver]
            assert cost[np.arange(len(speeds)), moved].max() >= solution.objective


@given(st.permutations(range(4)))
@settings(max_examples=20, deadline=None)
def test_the_order_of_devices_does_not_change_the_makespan(order):
    cost = np.random.default_rng(3).random((4, 21)).cumsum(axis=1)
    assert split(cost[list(order)], 20).objective == split(cost, 20).objective


def test_equal_devices_share_evenly_and_ties_favour_the_first():
    assert split(np.tile(np.arange(9.0), (4, 1)), 8).assignment == (2, 2, 2, 2)
    assert split(np.tile(np.arange(10.0), (4, 1)), 9).assignment == (3, 2, 2, 2)
    # A device whose every count costs the same takes what the others are spared.
    assert split([[0.0, 5.0, 5.0, 5.0], [0.0, 1.0, 2.0, 3.0]], 3).assignment == (0, 3)


def test_a_device_may_be_idle_or_forced_to_work():
    n = np.arange(11.0)
    assert split([n, 100 * n], 10).assignment == (10, 0)
    forced = 100 * n
    forced[0] = np.inf
    assert split([n, forced], 10).assignment == (9, 1)


def test_costs_beyond_the_units_are_ignored():
    assert split([[0, 1, 2, np.nan], [0, 1, 2, -1]], 2).assignment == (1, 1)


def test_infeasible_says_how_many_units_do_not_fit():
    cost = np.zeros((3, 11))
    cost[:, 3:] = np.inf
    with pytest.raises(Infeasible, match="4 of 10 units do not fit: the devices can take 6") as error:
        split(cost, 10)
    assert (error.value.unit, error.value.missing) == ("units", 4)
    cost = np.zeros((2, 3))
    cost[:, :2] = np.inf
    with pytest.raises(Infeasible, match="the devices need at least 4 units, got 2"):
        split(cost, 2)
    cost[1] = np.inf
    with pytest.raises(Infeasible, match="device 1 cannot take any"):
        split(cost, 2)


@pytest.mark.parametrize(
    ("cost", "units", "message"),
    [
        ([[0.0, 1.0]], -1, "units must be at least 0"),
        ([[0.0, 1.0]], 2, "at least 3"),
        ([0.0, 1.0], 1, r"got \[2\]"),
        (np.zeros((0, 4)), 1, r"got \[0, 4\]"),
        ([[0.0, np.nan]], 1, "NaN"),
        ([[0.0, -1.0]], 1, "negative"),
    ],
)
def test_bad_input(cost, units, message):
    with pytest.raises(ValueError, match=message):
        split(cost, units)


def test_large_instances_take_seconds():
    rng = np.random.default_rng(4)
    n = np.arange(4097)
    smooth = (n * rng.uniform(0.5, 2, (64, 1)) + 20) * (1 + 0.1 * rng.random((64, 4097)))
    started = time.process_time()
    solution = split(smooth, 4096)
    assert sum(solution.assignment) == 4096
    assert time.process_time() - started < 10
    ends = smooth[np.arange(64), solution.assignment]
    assert ends.max() == solution.objective
    # Within anything less, the devices together could not take all units.
    assert sum(int(np.flatnonzero(row < solution.objective).max(initial=0)) for row in smooth) < 4096
