"""``moeplan place``: rules that every placement keeps, bounds that are bounds."""

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from moeplan.planner.place.baselines import eplb_slots, greedy, linear_slots
from moeplan.planner.place.fleet import Fleet, check_groups, even_fleet
from moeplan.planner.place.interpolation import interpolated, transitions
from moeplan.planner.place.replan import copies_to_load
from moeplan.planner.place.request import Request, tokens_needed
from moeplan.planner.place.sample import coherent_affinity, fan_out_affinity, windows
from moeplan.planner.place.solve import place
from moeplan.solvers.balance import mean_balance
from moeplan.solvers.placement.crossings import crossings, host_weights
from moeplan.spec.errors import InfeasibleError, MoeplanError
from moeplan.spec.placement import Placement, PlacementDevice
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace, topics_trace

STEPS = 1500  # per chain: rules must hold however short the search was
few = settings(max_examples=5, suppress_health_check=[HealthCheck.too_slow])


def asked(trace: Trace, devices: int, hosts: int, slots: int | None = None, **options: Any) -> Request:
    count = slots or trace.num_experts
    fleet = even_fleet(devices, hosts, count, options.get("equal_slots", False))
    return Request(fleet, count, **({"steps": STEPS, "time_limit": 20.0} | options))


def placed(trace: Trace, devices: int, hosts: int, slots: int | None = None, **options: Any) -> Placement:
    return place(trace, asked(trace, devices, hosts, slots, **options))


@cache
def balanced(layers: int, slots: int, devices: int, seed: int) -> Placement:
    """An old placement, of 8 experts."""
    return placed(random_trace(seed, layers, 8), devices, 2, slots, objective="balance")


def check_rules(found: Placement, request: Request) -> None:
    """Capacity, every expert hosted, groups together, equal slots, moves; bound and gap as the document says."""
    for layer in found.layers:
        assert {e for held in layer.slots for e in held} == set(range(found.num_experts))
        for held, device in zip(layer.slots, found.devices, strict=True):
            assert len(held) == len(set(held)) <= device.capacity
        assert sum(map(len, layer.slots)) <= request.slots
        if request.groups > 1:
            size = found.num_experts // request.groups
            hosts: dict[int, set[str]] = {}
            for held, device in zip(layer.slots, found.devices, strict=True):
                for e in held:
                    hosts.setdefault(e // size, set()).add(device.host)
            assert all(len(names) == 1 for names in hosts.values())
    if request.equal_slots:
        assert found.equal_slots
    solver = found.solver
    assert solver.bound <= solver.objective
    assert 0 <= solver.gap <= 1
    assert all(value <= solver.bound + 1e-9 or value <= solver.objective + 1e-6 for value in solver.bounds.values())
    if request.balance_cap is not None:
        assert found.scores["placement"].fit.balance_mean <= request.balance_cap * (1 + 1e-6)
    if request.previous is not None:
        assert found.moves is not None
        assert found.moves.copies == copies_to_load(request.previous, found.layers)
        if request.max_moves is not None:
            assert found.moves.copies <= request.max_moves


@few
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 3),
    shape=st.sampled_from([(8, 2, 1), (8, 4, 2), (9, 4, 2), (12, 3, 3), (8, 5, 2)]),
    top_k=st.integers(1, 3),
    objective=st.sampled_from(["latency", "locality", "balance"]),
    movement=st.sampled_from(["coherent", "ep"]),
)
def test_single_copies_keep_the_rules(seed, layers, shape, top_k, objective, movement):
    experts, devices, hosts = shape
    trace = random_trace(seed, layers, experts, 120, top_k)
    request = asked(trace, devices, hosts, objective=objective, movement=movement, fit=(0.0, 0.5), seed=seed % 5)
    found = place(trace, request)
    check_rules(found, request)
    assert found.single_copy
    assert found.scores["placement"].held_out is not None


@few
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(8, 4, 2, 12), (8, 2, 1, 10), (6, 3, 3, 9), (8, 4, 2, 11)]),
    shares=st.sampled_from(["even", "optimal"]),
    objective=st.sampled_from(["latency", "balance"]),
)
def test_replicas_keep_the_rules(seed, shape, shares, objective):
    experts, devices, hosts, slots = shape
    trace = random_trace(seed, 2, experts)
    equal = slots % devices == 0
    request = asked(trace, devices, hosts, slots, shares=shares, objective=objective, equal_slots=equal)
    found = place(trace, request)
    check_rules(found, request)
    assert found.share_rule == shares
    if shares == "even":
        assert all(layer.shares is None for layer in found.layers)


@few
@given(seed=st.integers(0, 10**6), slack=st.floats(0, 0.5), objective=st.sampled_from(["latency", "locality"]))
def test_an_explicit_cap_is_kept_on_the_fitted_part(seed, slack, objective):
    trace = random_trace(seed, 3, 8)
    fleet = Fleet.of(even_fleet(4, 2, 8, False))
    fitted = trace.part(0, 0.5)
    cap = slack + mean_balance(greedy(fitted.expert_counts, fleet), fitted.expert_counts[None], fleet.speed)
    request = asked(trace, 4, 2, fit=(0.0, 0.5), balance_cap=cap, objective=objective)
    found = place(trace, request)
    check_rules(found, request)
    assert found.balance_cap == cap


@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(seed=st.integers(0, 10**6), groups=st.sampled_from([2, 4]), slots=st.sampled_from([None, 20]))
def test_groups_stay_on_one_host(seed, groups, slots):
    trace = random_trace(seed, 2, 16)
    request = asked(trace, 4, 2, slots, groups=groups)
    check_rules(place(trace, request), request)


@few
@given(seed=st.integers(0, 10**6), moves=st.integers(0, 10), slots=st.sampled_from([8, 12]))
def test_moves_are_bounded(seed, moves, slots):
    old, trace = balanced(2, slots, 4, seed % 2), random_trace(seed, 2, 8)
    request = asked(trace, 4, 2, slots, previous=old, max_moves=moves)
    found = place(trace, request)
    check_rules(found, request)
    if moves == 0:
        assert found.layers == old.layers


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"movement": "ep"},
        {"groups": 2},
        {"slots": 12},
        {"slots": 12, "shares": "optimal"},
        {"objective": "balance"},
    ],
    ids=str,
)
def test_same_seed_same_document(options):
    trace, whole = random_trace(3, 2, 8), {"fit": (0.0, 0.5), "seed": 7, "time_limit": 1000.0}
    first, second = (placed(trace, 4, 2, **whole, **options).model_dump() for _ in range(2))
    for document in (first, second):
        del document["solver"]["seconds"]
    assert first == second


def test_bounds_hold_against_every_placement():
    rows = [np.array(row) for row in itertools.product(range(2), repeat=4) if sum(row) == 2]
    for seed in range(4):
        trace = random_trace(seed, 3, 4, 60)
        found = placed(trace, 2, 2, objective="locality")
        counts, weight = interpolated(trace) / 2, host_weights(np.arange(2), 0.3, 1.3)
        best = min(crossings(np.stack(choice), counts, weight) for choice in itertools.product(rows, repeat=3))
        chosen = np.array([[int(e in layer.slots[1]) for e in range(4)] for layer in found.layers])
        assert found.solver.objective == pytest.approx(crossings(chosen, counts, weight))
        assert found.solver.bound <= best + 1e-9 <= found.solver.objective + 2e-9


@pytest.mark.parametrize("movement", ["coherent", "ep"])
@pytest.mark.parametrize("objective", ["latency", "locality"])
def test_two_topics_are_separated_onto_two_hosts(movement, objective):
    trace, topic_of = topics_trace(2, 3, 8)
    found = placed(trace, 4, 2, fit=(0.0, 0.5), movement=movement, objective=objective, steps=5000)
    held = found.scores["placement"].held_out
    assert held is not None
    assert held.fanout_host == 1
    if movement == "coherent":  # with ep a topic may change hosts from layer to layer
        assert held.boundary_cross_host == 0
    for layer, topics in zip(found.layers, topic_of, strict=True):
        for host in (layer.slots[:2], layer.slots[2:]):
            assert len({int(topics[e]) for device in host for e in device}) == 1
    linear = found.scores["linear"].held_out
    assert linear is not None
    assert linear.fanout_host is not None
    assert linear.fanout_host > 1.2


@pytest.mark.parametrize("seed", range(3))
def test_ep_fans_out_less_than_linear_and_locality_crosses_no_more_than_latency(seed):
    trace, _ = topics_trace(seed, 3, 16, topics=4)
    fan_out = placed(trace, 4, 2, movement="ep", steps=5000).scores
    ours, linear = fan_out["placement"].fit, fan_out["linear"].fit
    assert ours.fanout_host is not None
    assert linear.fanout_host is not None
    assert ours.fanout_host < linear.fanout_host
    assert ours.fanout_device <= linear.fanout_device
    near, usual = (placed(trace, 4, 2, objective=o, steps=5000) for o in ("locality", "latency"))
    assert near.balance_cap is None
    assert near.solver.objective <= usual.solver.objective * (1 + 1e-9)


def test_the_default_cap_keeps_about_the_greedy_balance():
    trace = random_trace(5, 4, 16, 2000)
    found = placed(trace, 4, 2, fit=(0.0, 0.5), steps=5000)
    ours, eplb, near = (
        s.held_out
        for s in (
            *(found.scores[n] for n in ("placement", "eplb")),
            placed(trace, 4, 2, fit=(0.0, 0.5), steps=5000, objective="locality").scores["placement"],
        )
    )
    assert ours is not None
    assert eplb is not None
    assert near is not None
    assert ours.balance_mean <= eplb.balance_mean + 0.1
    assert near.balance_mean > ours.balance_mean + 0.1


def test_counts_alone_plan_balance_and_say_so():
    trace = Trace.of_counts(random_trace(1, 2, 8).expert_counts)
    found = placed(trace, 4, 2)
    assert found.objective == "balance"
    assert found.trace.counts_only
    assert found.scores["placement"].fit.fanout_device is None
    assert "balance was planned instead" in " ".join(found.notes)
    assert "balance was planned instead" not in " ".join(placed(trace, 4, 2, objective="balance").notes)
    with pytest.raises(MoeplanError, match="no tokens to divide"):
        placed(trace, 4, 2, fit=(0.0, 0.5))


def test_a_fitted_part_that_ends_the_trace_has_no_rest():
    trace = random_trace(1, 2, 8, 200)
    whole = Trace.of(trace.expert_ids, 8, seq_len=np.full(5, 40))
    assert placed(whole, 2, 1, fit=(0.0, 0.95)).scores["placement"].held_out is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slots": 7}, "8 experts need 8 slots, got 7: raise --slots"),
        ({"max_moves": 3}, "--max-moves needs --previous"),
        ({"balance_cap": 0.9}, "--balance-cap 0.9: the hottest device over the mean is at least 1"),
        ({"balance_cap": 1.0001}, r"no placement has a mean balance of 1\.0001 or less: it is proven to be at least 2"),
        ({"balance_cap": 1.0001, "slots": 10}, r"a (mean )?balance of 1\.0001 or less: (it is proven|allow 1\.\d+)"),
        ({"groups": 3}, "experts % groups == 0 is broken: 8 experts in 3 groups"),
        ({"groups": 1, "fit": (0.5, 0.4)}, "expected 0 <= from < to <= 1"),
    ],
    ids=str,
)
def test_bad_requests_are_refused_in_words(options, message):
    trace = random_trace(0, 2, 8)
    hot = trace.expert_ids.copy()
    hot[:, :, 0] = 0
    hot[:, :, 1] = 1 + hot[:, :, 1] % 7
    with pytest.raises(MoeplanError, match=message):
        placed(Trace.of(hot, 8), 4, 2, **options)


def test_groups_must_divide_over_hosts():
    with pytest.raises(MoeplanError, match="groups % hosts == 0 is broken: 2 groups on 4 hosts"):
        placed(random_trace(0, 2, 8), 4, 4, groups=2)
    assert check_groups(4, 8, 2) == 2


def test_previous_of_another_form_is_refused():
    trace = random_trace(0, 2, 8)
    old = balanced(2, 12, 4, 0)
    for options, message in [
        ({"previous": balanced(4, 8, 4, 0)}, "--previous has 4 layers x 8 experts, the trace 2 x 8"),
        ({"previous": balanced(2, 8, 2, 0)}, "--previous is for 2 devices, not 4"),
        ({"previous": old}, r"--previous has \d experts on device \d in layer 0, and there are 2 slots"),
    ]:
        with pytest.raises(MoeplanError, match=message):
            placed(trace, 4, 2, **options)
    mixed = placed(topics_trace(2, 2, 8)[0], 4, 2, objective="locality")
    with pytest.raises(MoeplanError, match="--previous splits expert groups over hosts in layer 0"):
        placed(trace, 4, 2, previous=mixed, groups=2)


def test_a_trace_too_short_says_how_many_tokens_are_needed():
    with pytest.raises(MoeplanError, match="3 tokens cannot say how 8 experts are used: record about 1000 tokens"):
        placed(random_trace(0, 2, 8, 3), 4, 2)
    assert "about 1000 are needed" in placed(random_trace(0, 2, 8, 50), 4, 2, objective="balance").notes[0]
    assert placed(random_trace(0, 2, 8, 1000), 4, 2, objective="balance").notes == ()


def test_tokens_needed_follow_the_measured_points():
    assert tokens_needed(8) == 1000
    assert tokens_needed(64) == 3000
    needed = [tokens_needed(experts) for experts in (8, 16, 64, 128, 256)]
    assert needed == sorted(needed)


def test_even_fleet_divides_devices_and_slots():
    devices = even_fleet(5, 2, 12, False)
    assert [d.capacity for d in devices] == [3, 3, 2, 2, 2]
    assert [d.host for d in devices] == ["host0"] * 3 + ["host1"] * 2
    assert {d.capacity for d in even_fleet(4, 2, 12, True)} == {3}
    assert even_fleet(12, 12, 24, True)[-1].host == "host11"
    assert Fleet.of(even_fleet(12, 12, 24, True)).hosts.tolist() == list(range(12))
    with pytest.raises(
        InfeasibleError, match=r"10 slots .* 4 devices.*SGLang \(physical experts % ep_size\).*--slots 12"
    ):
        even_fleet(4, 2, 10, True)
    with pytest.raises(InfeasibleError, match="3 slots on 4 devices: every device needs one"):
        even_fleet(4, 2, 3, False)
    for devices_asked, hosts in ((0, 1), (4, 5), (4, 0)):
        with pytest.raises(MoeplanError, match="need at least 1 device"):
            even_fleet(devices_asked, hosts, 8, False)


def test_fleet_of_unequal_devices():
    fleet = Fleet.of(
        [
            PlacementDevice(host="b", capacity=2),
            PlacementDevice(host="a", capacity=3, speed=2.0),
            PlacementDevice(host="b", capacity=1),
        ]
    )
    assert fleet.names == ("a", "b")
    assert fleet.hosts.tolist() == [1, 0, 1]
    assert fleet.by_host.tolist() == [1, 0, 2]
    assert not fleet.alike
    assert Fleet.of(even_fleet(4, 2, 9, False)).alike  # unequal slots are no unequal speed


@given(st.integers(0, 10**6))
@settings(max_examples=15)
def test_baselines_are_placed_by_host_even_where_hosts_alternate(seed):
    load = random_trace(seed, 2, 8).expert_counts
    alternating = Fleet.of([PlacementDevice(host=h, capacity=2) for h in "abab"])
    usual = Fleet.of([PlacementDevice(host=h, capacity=2) for h in "aabb"])
    ours, theirs = (eplb_slots(load, 8, 2, fleet) for fleet in (alternating, usual))
    assert ours is not None
    assert theirs is not None
    order = [0, 2, 1, 3]
    assert [held for held, _ in ours.to_lists()] == [
        [held[order[g]] for g in range(4)] for held, _ in theirs.to_lists()
    ]
    linear = linear_slots(2, 8, usual)
    assert linear is not None
    assert linear.to_lists()[0][0] == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert linear_slots(2, 8, Fleet.of([PlacementDevice(host="a", capacity=c) for c in (1, 7)])) is None


def test_affinities_count_tokens():
    trace = random_trace(4, 3, 6, 100, 3)
    moved = transitions(trace)
    assert moved.shape == (2, 6, 6)
    assert moved.sum(axis=(1, 2)).tolist() == [100, 100]
    assert moved[0, 2, 5] == ((trace.expert_ids[:, 0, 0] == 2) & (trace.expert_ids[:, 1, 0] == 5)).sum()
    assert coherent_affinity(trace).transitions.sum(axis=(1, 2)) == pytest.approx([1, 1])
    together = fan_out_affinity(trace).together
    assert together.sum(axis=(1, 2)) == pytest.approx([3, 3, 3])  # every expert of a token, with its others
    both = [{1, 4} <= set(row.tolist()) for row in trace.expert_ids[:, 2]]
    assert together[2, 1, 4] == pytest.approx(sum(both) / 200)
    assert transitions(random_trace(0, 1, 6)).shape == (0, 6, 6)
    assert windows(trace).sum(axis=0) == pytest.approx(trace.expert_counts)


@few
@given(st.integers(0, 10**6))
def test_windows_of_few_tokens(seed):
    trace = random_trace(seed, 2, 8, 5)
    assume(trace.tokens < 16)
    assert len(windows(trace)) == 5
    assert windows(trace).sum(axis=0) == pytest.approx(trace.expert_counts)
