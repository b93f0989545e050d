from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers import Infeasible, NotFound
from moeplan.solvers.balance import balance_bound, finish
from moeplan.solvers.placement import (
    alternating,
    balance,
    crossing_bound,
    crossings,
    greedy_balance,
    host_weights,
    linear,
)


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


def chained(rng, layers, experts, tokens=2000, loyalty=0.8):
    """Transitions and load of tokens that follow a hidden permutation from layer to layer, most of the time."""
    at = rng.integers(0, experts, tokens)
    visits = [at]
    for _ in range(layers - 1):
        step = rng.permutation(experts)
        at = np.where(rng.random(tokens) < loyalty, step[at], rng.integers(0, experts, tokens))
        visits.append(at)
    transitions = np.zeros((layers - 1, experts, experts))
    for i, (a, b) in enumerate(pairwise(visits)):
        np.add.at(transitions[i], (a, b), 1)
    return transitions, np.stack([np.bincount(v, minlength=experts) for v in visits])


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


def test_crossing_bound_is_below_every_placement():
    rng = np.random.default_rng(1)
    positive = 0
    for _ in range(40):
        experts, devices = int(rng.integers(2, 5)), int(rng.integers(1, 4))
        _, capacity = random_devices(rng, experts, devices)
        hosts = rng.integers(0, 2, devices)
        weight = host_weights(hosts, float(rng.integers(0, 3)), float(rng.integers(0, 6)))
        transitions = rng.integers(0, 9, (1, experts, experts)).astype(float)
        every = list(layouts(experts, capacity))
        best = min(crossings([a, b], transitions, weight) for a in every for b in every)
        bound = crossing_bound(transitions, capacity, hosts, weight)
        assert 0 <= bound <= best + 1e-9
        positive += bound > 0
    assert positive > 5


def check(solution, transitions, load, capacity, speed, cap, weight):
    placed = solution.assignment
    assert placed.shape == load.shape
    for row in placed:
        assert (np.bincount(row, minlength=len(capacity)) <= capacity).all()
    assert (balance(placed, load, speed) <= cap * (1 + 1e-8)).all()
    assert solution.objective == crossings(placed, transitions, weight)
    assert 0 <= solution.bound <= solution.objective


def test_alternating_keeps_slots_and_cap_and_comes_near_the_optimum():
    rng = np.random.default_rng(2)
    exact, total, found = 0, 0.0, 0.0
    for _ in range(25):
        experts, devices, layers = 4, 2, 3
        speed = rng.choice([1.0, 2.0], devices)
        capacity = rng.integers(2, 5, devices)
        transitions, load = chained(rng, layers, experts, tokens=60)
        cap = float(balance(greedy_balance(load, speed, capacity).assignment, load, speed).max()) * 1.2
        weight = host_weights([0, 1], 1.0, 3.0)
        solution = alternating(transitions, load, capacity, speed, cap, [0, 1], host_weight=3.0, sweeps=12)
        check(solution, transitions, load, capacity, speed, cap, weight)
        allowed = [[d for d in layouts(experts, capacity) if balance([d], [w], speed)[0] <= cap] for w in load]
        best = min(crossings(placed, transitions, weight) for placed in product(*allowed))
        assert solution.bound <= best <= solution.objective
        exact += solution.objective == best
        total, found = total + best, found + solution.objective
    assert exact >= 15
    assert found <= 1.1 * total


def test_alternating_finds_a_hidden_chain():
    rng = np.random.default_rng(3)
    transitions, load = chained(rng, 6, 16)
    capacity, speed = np.full(4, 4), np.ones(4)
    weight = host_weights([0, 0, 1, 1])
    solution = alternating(transitions, load, capacity, speed, np.inf, [0, 0, 1, 1], sweeps=20)
    check(solution, transitions, load, capacity, speed, np.inf, weight)
    # 80 % follow the chain and a quarter of the others stay by chance: 15 % must cross.
    assert solution.objective < 0.2 * transitions.sum()
    assert crossings(greedy_balance(load, speed, capacity).assignment, transitions, weight) > 0.6 * transitions.sum()
    assert solution.gap < 0.5


def test_tight_caps_are_kept_and_cost_crossings():
    rng = np.random.default_rng(4)
    transitions, load = chained(rng, 5, 16)
    load = load * rng.integers(1, 6, load.shape)
    capacity, speed, hosts = np.array([4, 6, 4, 8]), np.array([1.0, 1.0, 0.5, 2.0]), [0, 0, 1, 1]
    greedy = balance(greedy_balance(load, speed, capacity).assignment, load, speed)
    weight = host_weights(hosts)
    values = []
    for cap in (greedy, greedy * 1.1, greedy * 1.5, np.inf):
        solution = alternating(transitions, load, capacity, speed, cap, hosts, sweeps=10)
        check(solution, transitions, load, capacity, speed, cap, weight)
        values.append(solution.objective)
    assert values[0] > values[-1]
    assert values[0] <= crossings(greedy_balance(load, speed, capacity).assignment, transitions, weight)


def test_host_weight_moves_crossings_inside_hosts():
    transitions, load = chained(np.random.default_rng(5), 5, 16, loyalty=0.5)
    arguments = (transitions, load, np.full(4, 4), np.ones(4), 2.0, [0, 0, 1, 1])
    between = host_weights([0, 0, 1, 1], 0.0, 1.0)
    far = []
    for host_weight in (1.0, 20.0):
        solutions = [alternating(*arguments, host_weight=host_weight, seed=seed, sweeps=50) for seed in range(3)]
        far.append(sum(crossings(s.assignment, transitions, between) for s in solutions))
    assert far[1] < 0.99 * far[0]


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_alternating_is_never_worse_than_the_simple_placements(seed):
    rng = np.random.default_rng(seed)
    layers, experts, devices = int(rng.integers(1, 4)), int(rng.integers(2, 9)), int(rng.integers(1, 4))
    transitions, load = chained(rng, layers, experts, tokens=50)
    speed, capacity = random_devices(rng, experts, devices)
    hosts = np.arange(devices) // 2
    greedy, plain = greedy_balance(load, speed, capacity).assignment, np.tile(linear(experts, devices), (layers, 1))
    cap = balance(greedy, load, speed) * rng.uniform(1, 1.5)
    weight = host_weights(hosts, 1.0, 2.0)
    solution = alternating(transitions, load, capacity, speed, cap, hosts, host_weight=2.0, seed=seed, sweeps=4)
    check(solution, transitions, load, capacity, speed, cap, weight)
    assert solution.objective <= crossings(greedy, transitions, weight)
    if (np.bincount(plain[0], minlength=devices) <= capacity).all() and (balance(plain, load, speed) <= cap).all():
        assert solution.objective <= crossings(plain, transitions, weight)


def test_equal_runs_are_equal_and_more_sweeps_never_hurt():
    transitions, load = chained(np.random.default_rng(6), 6, 16, loyalty=0.5)
    arguments = (transitions, load, np.full(4, 5), np.ones(4), 1.3, [0, 0, 1, 1])
    runs = [alternating(*arguments, seed=7, sweeps=sweeps) for sweeps in (0, 2, 8, 8, 30)]
    assert (runs[2].assignment == runs[3].assignment).all()
    values = [run.objective for run in runs]
    assert values == sorted(values, reverse=True)
    assert values[-1] < values[0]


def test_one_device_crosses_nothing_provably():
    transitions, load = chained(np.random.default_rng(7), 3, 4)
    solution = alternating(transitions, load, [4], [1.0], 1.0, [0])
    assert (solution.objective, solution.bound, solution.status) == (0, 0, "optimal")


def test_an_impossible_cap_is_proven_so():
    load = np.array([[10.0, 1, 1, 0]] * 2)
    with pytest.raises(Infeasible, match=r"layer 0: .* balance of 1.2 or less: it is at least 1.667") as error:
        alternating(np.ones((1, 4, 4)), load, [2, 2], [1.0, 1.0], 1.2, [0, 0])
    assert error.value.unit == "balance"
    assert error.value.missing == pytest.approx(10 / 6 - 1.2)


def test_a_cap_that_is_not_met_is_not_called_impossible():
    # 9+1, 5+5, 4+4+2 is perfect; greedy balancing and single swaps stop at 11.
    load = np.array([[4.0, 4, 5, 9, 2, 5, 1]])
    with pytest.raises(NotFound, match=r"layer 0: found no placement with a balance of 1 or less: allow 1\.1"):
        alternating(np.ones((0, 7, 7)), load, [7, 7, 7], [1.0, 1.0, 1.0], 1.0, [0, 0, 0])
    assert (
        balance(alternating(np.ones((0, 7, 7)), load, [7] * 3, [1.0] * 3, 1.1, [0] * 3).assignment, load, [1.0] * 3)[0]
        == 1.1
    )


GOOD = {
    "transitions": np.ones((1, 2, 2)),
    "load": np.ones((2, 2)),
    "capacity": [1, 1],
    "speed": [1.0, 1.0],
    "balance_cap": 2.0,
    "hosts": [0, 0],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"load": np.ones(2)}, "load must be"),
        ({"load": -np.ones((2, 2))}, "load must be"),
        ({"speed": [1.0, 0.0]}, "speed must"),
        ({"capacity": [1]}, "capacity must"),
        ({"capacity": [1.5, 1.0]}, "capacity must"),
        ({"transitions": np.ones((2, 2, 2))}, r"transitions must be .* \[1, 2, 2\], got \[2, 2, 2\]"),
        ({"transitions": np.full((1, 2, 2), np.nan)}, "transitions must"),
        ({"balance_cap": 0.9}, "balance_cap must"),
        ({"balance_cap": [2.0] * 3}, "balance_cap must"),
        ({"hosts": [0]}, "hosts must"),
        ({"hosts": ["a", "b"]}, "hosts must"),
        ({"sweeps": -1}, "must not be negative"),
        ({"host_weight": -1.0}, "must not be negative"),
    ],
)
def test_bad_input(change, message):
    alternating(**GOOD)
    with pytest.raises(ValueError, match=message):
        alternating(**(GOOD | change))
