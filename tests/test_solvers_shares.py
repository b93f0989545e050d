import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog

from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.replication.shares import layer_shares, optimal_shares
from moeplan.solvers.slots import EMPTY, Slots

README = np.array(
    [[90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86], [20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27]]
)


def random_layer(seed, windows=1):
    """(slots, load [W, 1, E], speed [G])"""
    rng = np.random.default_rng(seed)
    devices, experts = int(rng.integers(1, 9)), int(rng.integers(1, 20))
    capacity = rng.integers(0, 8, devices)
    while np.minimum(capacity, experts).sum() < experts:
        capacity[rng.integers(devices)] += 1
    device = np.repeat(np.arange(devices), np.minimum(capacity, experts))
    at = np.full(len(device), EMPTY)
    at[rng.permutation(len(device))[:experts]] = np.arange(experts)
    for r in np.flatnonzero(at == EMPTY):
        others = np.setdiff1d(np.arange(experts), at[device == device[r]])
        if len(others) and rng.random() < 0.8:
            at[r] = rng.choice(others)
    load = rng.lognormal(0, 1.5, (windows, 1, experts)) * rng.choice([1, 1, 1, 0], experts)
    return Slots.even(at[None], np.minimum(capacity, experts)), load, rng.choice([1.0, 0.5, 2.0, 0.7], devices)


def by_linear_program(slots, load, speed):
    """Mean over windows of the hottest device under the best shares of one layer, as a plain program."""
    at, device = slots.expert_of[0], slots.device_of_slot
    held = np.flatnonzero(at != EMPTY)
    windows, count = len(load), len(held)
    heat = np.zeros((windows, len(speed), count + windows))
    for w in range(windows):
        heat[w, device[held], np.arange(count)] = load[w, 0, at[held]] / speed[device[held]]
        heat[w, :, count + w] = -1
    total = np.zeros((slots.num_experts, count + windows))
    total[at[held], np.arange(count)] = 1
    cost = np.concatenate([np.zeros(count), np.full(windows, 1 / windows)])
    upper = heat.reshape(-1, count + windows)
    return linprog(cost, A_ub=upper, b_ub=np.zeros(len(upper)), A_eq=total, b_eq=np.ones(len(total))).fun


@given(st.integers(0, 10**6))
def test_shares_are_optimal_and_the_named_devices_prove_it(seed):
    slots, load, speed = random_layer(seed)
    found = optimal_shares(slots, load[0], speed)  # ``Slots`` validates
    hottest = found.hottest(load[0], speed)[0]
    assert hottest == pytest.approx(by_linear_program(slots, load, speed), rel=1e-7, abs=1e-9)
    assert (found.expert_of == slots.expert_of).all()
    _, value, proof = layer_shares(slots.expert_of[0], slots.device_of_slot, load[0, 0], speed)
    assert value == pytest.approx(hottest, rel=1e-9)
    holders = [slots.device_of_slot[slots.expert_of[0] == e] for e in range(slots.num_experts)]
    confined = [e for e, held in enumerate(holders) if proof[held].all()]
    assert load[0, 0, confined].sum() / speed[proof].sum() == pytest.approx(value, rel=1e-9, abs=1e-12)


@given(st.integers(0, 10**6), st.integers(2, 4))
def test_shares_over_windows_minimise_the_mean_of_the_hottest(seed, windows):
    slots, load, speed = random_layer(seed, windows)
    found = optimal_shares(slots, load, speed)
    mean = np.mean([found.hottest(w, speed)[0] for w in load])
    assert mean == pytest.approx(by_linear_program(slots, load, speed), rel=1e-6, abs=1e-8)


def test_uneven_shares_of_eplbs_placement_of_the_published_example():
    placed = eplb(README, 16, 4, 2, 8)
    assert optimal_shares(placed, README, np.ones(8)).hottest(README, np.ones(8)) == pytest.approx([154, 173])


def test_shares_stay_even_where_nothing_is_gained():
    slots = Slots.even([[0, 1, 0, 2]], [2, 2])
    assert optimal_shares(slots, [[4, 1, 1]], [1, 1]).share_of.tolist() == [[0.5, 1, 0.5, 1]]
    assert optimal_shares(slots, [[0, 1, 1]], [1, 1]).share_of.tolist() == [[0.5, 1, 0.5, 1]]
    assert optimal_shares(slots, [[4, 1, 3]], [1, 1]).share_of.tolist() == [[0.75, 1, 0.25, 1]]


def test_a_whole_model_is_fast_and_repeatable():
    load = np.random.default_rng(0).lognormal(0, 1.5, (58, 256))
    placed, speed = eplb(load, 288, 8, 4, 32), np.ones(32)
    first = optimal_shares(placed, load, speed)
    started = time.perf_counter()
    again = optimal_shares(placed, load, speed)
    assert time.perf_counter() - started < 1
    assert (first.share_of == again.share_of).all()
    assert (first.hottest(load, speed) <= placed.hottest(load, speed) * (1 + 1e-12)).all()


def test_wrong_shapes_are_refused():
    slots = Slots.even([[0, 1, 0, 2]], [2, 2])
    with pytest.raises(ValueError, match=r"load must be .* \[1, 3\]"):
        optimal_shares(slots, [[1, 2]], [1, 1])
    with pytest.raises(ValueError, match="speed must"):
        optimal_shares(slots, [[1, 2, 3]], [1, 0])
