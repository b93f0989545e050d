"""`moeplan explain`: values on hand-made cases, limits, parts of the trace."""

import numpy as np
import pytest

from moeplan.planner.place import explain as why
from moeplan.planner.place.explain import divide, explain, over_ideal
from moeplan.planner.place.sample import SAMPLES
from moeplan.spec.placement import (
    Moves,
    Placement,
    PlacementDevice,
    TraceSource,
)
from moeplan.spec.trace import Trace
from moeplan.tests.explained import HAND, HOSTS, SPLIT, placement_of, random_placement, random_trace


def test_the_hottest_device_and_its_heaviest_expert_are_named() -> None:
    found = explain(placement_of(SPLIT, HOSTS, HAND), HAND)
    assert found.load_over_ideal == [[1.4, 0.6], [0.6, 1.4]]
    first, second = found.hot_spots
    assert (first.layer, first.device, first.host, first.over_ideal) == (0, 0, "left", 1.4)
    assert (second.layer, second.device, second.host) == (1, 1, "right")
    assert [(e.expert, e.share, e.copies) for e in first.experts] == [(0, 0.7, 1), (1, 0.0, 1)]
    assert first.heaviest_alone == pytest.approx(1.4)
    assert found.busiest_over_ideal == pytest.approx(1.0)  # either device is hot in one of the layers


def test_the_pair_that_crosses_and_the_exchange_that_joins_it() -> None:
    found = explain(placement_of(SPLIT, HOSTS, HAND), HAND)
    assert found.boundaries is not None
    (boundary,) = found.boundaries
    assert (boundary.layer, boundary.cross_host, boundary.cross_device) == (0, 1.0, 1.0)
    heavy, light = boundary.pairs
    assert (heavy.expert, heavy.next_expert, heavy.tokens, heavy.devices) == (0, 2, 7, (0, 1))
    assert (light.expert, light.next_expert, light.tokens, light.devices) == (3, 1, 3, (1, 0))
    # 2 to the left in exchange for 1 joins both pairs, at the price of nothing: 7 tokens are on one device as before
    assert heavy.swap is not None
    assert (heavy.swap.layer, heavy.swap.expert, heavy.swap.partner) == (1, 2, 1)
    assert heavy.swap.crossings == -10
    assert heavy.swap.over_ideal == pytest.approx((1.4, 1.4))


def test_nothing_crosses_when_pairs_are_together() -> None:
    found = explain(placement_of([SPLIT[0], [[0, 2], [1, 3]]], HOSTS, HAND), HAND)
    assert found.boundaries is not None
    assert [(b.cross_host, b.pairs) for b in found.boundaries] == [(0.0, ())]


def test_groups_that_stay_on_their_host_cannot_be_exchanged() -> None:
    found = explain(placement_of(SPLIT, HOSTS, HAND, groups=2), HAND)
    assert found.boundaries is not None
    assert all(pair.swap is None for pair in found.boundaries[0].pairs)


def test_what_one_more_slot_buys_is_told_from_what_locality_costs() -> None:
    # Loads 4 3 2 1 on two devices: 4+3 | 2+1 is 1.4; at best 4+1 | 3+2 is 1.0 without any further slot.
    trace = Trace.of_counts(np.array([[4, 3, 2, 1]]))
    found = explain(placement_of([[[0, 1], [2, 3]]], HOSTS, trace), trace)
    slot = found.one_more_slot
    assert slot is not None
    assert (slot.now, slot.same_slots, slot.same_slots_bound, slot.more_slots) == pytest.approx((1.4, 1, 1, 1))
    # Loads 8 1 1: the first alone is 1.6; with two copies of it 4+1 | 4+1.
    trace = Trace.of_counts(np.array([[8, 1, 1]]))
    slot = explain(placement_of([[[0], [1, 2]]], HOSTS, trace), trace).one_more_slot
    assert slot is not None
    assert (slot.now, slot.same_slots, slot.same_slots_bound) == pytest.approx((1.6, 1.6, 1.6))
    assert (slot.more_slots, slot.more_slots_bound) == pytest.approx((1.0, 1.0))


def test_devices_that_hold_everything_have_no_use_for_a_slot() -> None:
    trace = Trace.of_counts(np.array([[3, 1]]))
    found = explain(placement_of([[[0, 1], [0, 1]]], HOSTS, trace), trace)
    assert found.one_more_slot is None
    assert any("a slot for every expert already" in note for note in found.notes)


def test_bytes_of_a_slot_are_those_of_all_layers() -> None:
    placement = random_placement(0, 8, 16, 4, 2).model_copy(update={"model": "tiny-moe"})
    found = explain(placement, random_trace(0, 8, 16))
    sizes, _ = why.expert_bytes(placement)
    assert sizes is not None
    assert len(sizes) == 8
    assert found.one_more_slot is not None
    assert found.one_more_slot.bytes_per_device == sum(sizes) > 0
    other, reason = why.expert_bytes(placement.model_copy(update={"model": "mixtral"}))
    assert other is None
    assert "mixtral has 32 layers x 8 experts, the placement 8 x 16" in reason
    assert "unknown" in why.expert_bytes(placement.model_copy(update={"model": "none-such"}))[1]


def test_faster_devices_are_less_hot() -> None:
    placement = placement_of([[[0], [1]]], HOSTS, speed=[3.0, 1.0])
    assert over_ideal(placement, np.array([[3.0, 1.0]])).tolist() == [[1.0, 1.0]]
    assert over_ideal(placement, np.array([[0.0, 0.0]])).tolist() == [[1.0, 1.0]]  # no load: balanced


# ---- limits


def limits(placement: Placement, trace: Trace = HAND) -> dict[str, tuple[bool, str]]:
    return {x.name: (x.binding, x.text) for x in why.limits(placement, trace)}


def test_a_cap_binds_where_the_balance_is_at_it() -> None:
    counts = Trace.of_counts(HAND.expert_counts)  # a balance of 1.4
    for cap, binds in ((1.4, True), (1.406, True), (1.41, False), (1.3, True)):
        assert limits(placement_of(SPLIT, HOSTS, balance_cap=cap), counts)["balance cap"][0] is binds
    # Samples of a trace of few sequences are two windows, here of one token: one device has both, or each has one.
    pairs = np.random.default_rng(0).integers(0, 10, (SAMPLES, 2)) < 7
    mean = 1.0 + float((pairs[:, 0] == pairs[:, 1]).mean())
    for cap, of, binds, reached in (
        (mean, "samples", True, f"{mean:.4f} as a mean over load samples"),
        (mean + 0.1, "samples", False, f"{mean:.4f} as a mean over load samples"),
        (1.9, "fit", False, "1.4000"),
    ):
        found, text = limits(placement_of(SPLIT, HOSTS, balance_cap=cap, balance_cap_of=of))["balance cap"]
        assert found is binds
        assert f"{reached} of at most {cap:.4f}" in text
    assert "balance cap" not in limits(placement_of(SPLIT, HOSTS))


def test_slots_bind_where_no_device_has_a_free_slot() -> None:
    binds, text = limits(placement_of(SPLIT, HOSTS))["slots"]
    assert binds
    assert "all 2 devices are full in every layer, 4 slots per layer for 4 experts: no slot for a second copy" in text
    larger = [PlacementDevice(host="left", capacity=2), PlacementDevice(host="right", capacity=3)]
    binds, text = limits(placement_of(SPLIT, HOSTS, devices=larger))["slots"]
    assert not binds
    assert "1 of 2 devices are full, 1.0 slots free per layer; 5 slots per layer for 4 experts" in text


def test_moves_bind_at_their_limit() -> None:
    for copies, limit, binds in ((3, 4, False), (4, 4, True), (9, None, False)):
        placement = placement_of(SPLIT, HOSTS, moves=Moves(previous="old.json", copies=copies, limit=limit))
        assert limits(placement)["moves"][0] is binds


def test_groups_bind_where_they_force_a_worse_balance() -> None:
    binds, text = limits(placement_of(SPLIT, HOSTS, groups=2))["groups"]
    # layer 0 has loads 7 0 | 0 3, layer 1 has 0 3 | 7 0: one expert has 7 of 10 with groups or without
    assert not binds
    assert "at best 1.4000 in balance with them, 1.4000 without" in text
    placement = placement_of([[[0, 1], [2, 3]]], HOSTS, groups=2)
    (bound,) = [x for x in why.limits(placement, Trace.of_counts(np.array([[4.0, 4, 1, 1]]))) if x.name == "groups"]
    assert bound.binding
    assert "at best 1.6000 in balance with them, 1.0000 without" in bound.text
    torn = limits(placement_of([[[0, 2], [1, 3]]] * 2, HOSTS, groups=2))["groups"][1]
    assert "not kept: 4 (layer, group)" in torn


# ---- parts of the trace


def test_held_out_is_what_lies_around_the_fitted_part() -> None:
    trace = random_trace(0, 2, 4, tokens=100)
    placement = random_placement(0, 2, 4, 2, 2)

    def fitted(low: float, high: float, digest: str = trace.digest()) -> Placement:
        return placement.model_copy(update={"trace": TraceSource(digest=digest, fit=(low, high))})

    fit, rest, notes = divide(trace, {"the placement": fitted(0.2, 0.6)})
    assert fit is not None
    assert rest is not None
    assert np.array_equal(fit.expert_ids, trace.expert_ids[20:60])
    assert np.array_equal(rest.expert_ids, np.concatenate([trace.expert_ids[:20], trace.expert_ids[60:]]))
    assert notes == []
    assert divide(trace, {"the placement": fitted(0, 1)})[1] is None
    fit, rest, notes = divide(trace, {"A": fitted(0, 0.3), "B": fitted(0.2, 0.5)})
    assert fit is not None
    assert rest is not None
    assert (fit.tokens, rest.tokens) == (50, 50)
    assert "counts as fitted for both" in notes[0]
    fit, rest, notes = divide(trace, {"the placement": fitted(0, 0.5, "feed")})
    assert fit is None
    assert rest is trace
    assert notes == [f"the placement was fitted on another trace (digest feed, this one has {trace.digest()})"]


def test_counts_leave_movement_out_and_say_so() -> None:
    trace = Trace.of_counts(HAND.expert_counts)
    found = explain(placement_of(SPLIT, HOSTS, trace), trace)
    assert found.boundaries is None
    assert found.fanout is None
    assert found.fit.boundary_cross_host is None
    assert any("counts only" in note for note in found.notes)
    assert found.load_over_ideal == [[1.4, 0.6], [0.6, 1.4]]


def test_copies_leave_crossings_out_and_say_so() -> None:
    found = explain(placement_of([[[0, 1, 2], [2, 3]]] * 2, HOSTS, HAND), HAND)
    assert found.boundaries is None
    assert found.fanout is not None
    assert any("several copies" in note for note in found.notes)
