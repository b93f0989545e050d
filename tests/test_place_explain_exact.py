"""What `moeplan explain` and `moeplan compare` count, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.compare import changed_experts, to_load
from moeplan.planner.place.crossings import boundaries, crossing, device_of, fanout
from moeplan.planner.place.explain import over_ideal
from moeplan.planner.place.score import score
from moeplan.spec.placement import (
    Placement,
)
from moeplan.tests.explained import HOSTS, placement_of, random_placement, random_trace


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), hosts=st.sampled_from([1, 2, 4]))
def test_exchanges_do_what_they_say(seed: int, hosts: int) -> None:
    placement, trace = random_placement(seed, 3, 8, 4, hosts), random_trace(seed + 1, 3, 8)
    device, over = device_of(placement), over_ideal(placement, trace.expert_counts)
    zone_of_device = placement.hosts if hosts > 1 else np.arange(4)
    top1 = trace.expert_ids[:, :, 0].astype(np.int64)

    def crossings(placed: np.ndarray) -> int:
        zone = zone_of_device[placed]
        return sum(int(zone[j, t[j]] != zone[j + 1, t[j + 1]]) for t in top1 for j in range(2))

    def exchanged(layer: int, a: int, b: int) -> np.ndarray:
        placed = device.copy()
        placed[layer, [a, b]] = placed[layer, [b, a]]
        return placed

    found = boundaries(placement, trace, over, 2)
    for boundary in found:
        for pair in boundary.pairs:
            swap, j = pair.swap, boundary.layer
            assert swap is not None
            after = exchanged(swap.layer, swap.expert, swap.partner)
            assert crossings(after) - crossings(device) == swap.crossings
            zone = zone_of_device[after]
            assert zone[j, pair.expert] == zone[j + 1, pair.next_expert]
            load = np.bincount(after[swap.layer], trace.expert_counts[swap.layer], 4)
            assert swap.over_ideal[1] == pytest.approx(load.max() / load.mean())
            assert swap.over_ideal[0] == pytest.approx(over[swap.layer].max())
            zones = zone_of_device[device]
            others = [
                crossings(exchanged(layer, e, x)) - crossings(device)
                for layer, e, to in (
                    (j, pair.expert, zones[j + 1, pair.next_expert]),
                    (j + 1, pair.next_expert, zones[j, pair.expert]),
                )
                for x in np.flatnonzero(zones[layer] == to).tolist()
            ]
            assert swap.crossings == min(others)
            tokens = ((top1[:, j] == pair.expert) & (top1[:, j + 1] == pair.next_expert)).sum()
            assert pair.tokens == tokens


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), hosts=st.sampled_from([1, 2]))
def test_sums_over_layers_are_the_scores(seed: int, hosts: int) -> None:
    placement, trace = random_placement(seed, 3, 6, 4, hosts), random_trace(seed + 1, 3, 6)
    scores = score(placement.layers, placement.devices, trace)
    over = over_ideal(placement, trace.expert_counts)
    found, wide = boundaries(placement, trace, over, 1), fanout(placement, trace.expert_ids)
    assert sorted(b.layer for b in found) == [0, 1]
    assert np.mean([b.cross_host for b in found]) == pytest.approx(scores.boundary_cross_host)
    assert np.mean([b.cross_device for b in found]) == pytest.approx(scores.boundary_cross_device)
    assert np.mean([f.hosts for f in wide]) == pytest.approx(scores.fanout_host)
    assert np.mean([f.devices for f in wide]) == pytest.approx(scores.fanout_device)
    assert over.max(axis=1).mean() == pytest.approx(scores.balance_mean)
    assert [f.hosts for f in wide] == sorted((f.hosts for f in wide), reverse=True)


def test_fan_out_of_copies_is_the_expectation() -> None:
    # expert 0 on both devices (a quarter left), 1 left, 2 right; tokens take {0, 1} and {1, 2}
    shares = (((0.25, 1.0), (0.75, 1.0)),)
    placement = placement_of([[[0, 1], [0, 2]]], HOSTS, shares=shares)
    (wide,) = fanout(placement, np.array([[[0, 1]], [[1, 2]]]))
    assert (wide.devices, wide.hosts) == pytest.approx(((1 + 0.75 + 2) / 2,) * 2)


def test_fan_out_in_small_pieces_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    placement, trace = random_placement(3, 2, 8, 4, 2, copies=3), random_trace(4, 2, 8)
    whole = fanout(placement, trace.expert_ids)
    monkeypatch.setattr("moeplan.planner.place.crossings.CELLS", 28)
    pieces = fanout(placement, trace.expert_ids)
    assert [f.layer for f in pieces] == [f.layer for f in whole]
    assert [(f.devices, f.hosts) for f in pieces] == [pytest.approx((f.devices, f.hosts)) for f in whole]


def test_crossing_is_counted_token_by_token() -> None:
    zone, top1 = np.array([[0, 1], [1, 0]]), np.array([[0, 0], [0, 1], [1, 0]])
    assert crossing(zone, top1).tolist() == [[True, False, False]]


@settings(max_examples=60, deadline=None)
@given(a=st.integers(0, 10**6), b=st.integers(0, 10**6), copies=st.integers(0, 4))
def test_changed_experts_are_those_with_another_set_of_devices(a: int, b: int, copies: int) -> None:
    first, second = random_placement(a, 3, 6, 3, 1, copies), random_placement(b, 3, 6, 3, 1, copies)

    def places(placement: Placement, layer: int, expert: int) -> set[int]:
        return {d for d, experts in enumerate(placement.layers[layer].slots) if expert in experts}

    changed = [sum(places(first, i, e) != places(second, i, e) for e in range(6)) for i in range(3)]
    load = [sum(len(places(second, i, e) - places(first, i, e)) for e in range(6)) for i in range(3)]
    assert changed_experts(first, second).tolist() == changed
    assert changed_experts(second, first).tolist() == changed
    assert to_load(first, second).tolist() == load
    assert changed_experts(first, first).sum() == to_load(first, first).sum() == 0
    if not copies:
        assert changed == load  # a single copy that is elsewhere must be loaded there


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), swaps=st.integers(0, 3))
def test_exchanges_of_disjoint_pairs_change_two_experts_each(seed: int, swaps: int) -> None:
    before = random_placement(seed, 1, 6, 2, 1)
    left, right = (list(experts) for experts in before.layers[0].slots)
    for i in range(swaps):
        left[i], right[i] = right[i], left[i]
    after = placement_of([[left, right]], ("host0", "host0"))
    assert changed_experts(before, after).tolist() == [2 * swaps]
