"""`moeplan explain` and `moeplan compare`: values on hand-made cases, counting by brute force, the commands."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place import explain as why
from moeplan.planner.place.compare import changed_experts, to_load
from moeplan.planner.place.compare import compare as between
from moeplan.planner.place.crossings import boundaries, crossing, device_of, fanout
from moeplan.planner.place.explain import divide, explain, over_ideal
from moeplan.planner.place.sample import SAMPLES
from moeplan.planner.place.score import score
from moeplan.service.commands import compare as compare_command
from moeplan.service.commands import explain as explain_command
from moeplan.spec.errors import MoeplanError
from moeplan.spec.placement import (
    Moves,
    Placement,
    PlacementDevice,
    PlacementLayer,
    PlacementSolver,
    Score,
    Scores,
    TraceSource,
)
from moeplan.spec.trace import Trace

app = typer.Typer()
app.command(name="explain")(explain_command.explain)
app.command(name="compare")(compare_command.compare)

Run = Callable[..., str]


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*args: object) -> str:
        app([str(a) for a in args], standalone_mode=False)
        return capfd.readouterr().out

    return run


def placement_of(slots: list[list[list[int]]], hosts: tuple[str, ...], trace: Trace | None = None, **fields: object):
    """slots: [layers][devices][experts]."""
    shares = fields.pop("shares", None)
    capacity = [max(len(layer[d]) for layer in slots) for d in range(len(hosts))]
    speed = fields.pop("speed", [1.0] * len(hosts))
    layers = [
        PlacementLayer(slots=tuple(map(tuple, layer)), shares=None if shares is None else shares[i])
        for i, layer in enumerate(slots)
    ]
    values: dict[str, object] = {
        "num_experts": 1 + max(e for device in slots[0] for e in device),
        "devices": [
            PlacementDevice(host=h, capacity=c, speed=s) for h, c, s in zip(hosts, capacity, speed, strict=True)
        ],
        "layers": layers,
        "objective": "locality",
        "movement": "coherent",
        "solver": PlacementSolver(
            status="feasible", objective=0.5, bound=0.4, gap=0.2, seconds=1, minimised="moves", bounds={"spectral": 0.4}
        ),
        "scores": {},
        "trace": TraceSource(digest=trace.digest() if trace else "", fit=(0.0, 1.0)),
    }
    return Placement(**(values | fields))


def random_placement(seed: int, layers: int, experts: int, devices: int, hosts: int, copies: int = 0) -> Placement:
    """Single copies at random, as many on each device; then ``copies`` more per layer where they fit."""
    rng = np.random.default_rng(seed)
    slots = []
    for _ in range(layers):
        held = [part.tolist() for part in np.array_split(rng.permutation(experts), devices)]
        for _ in range(copies):
            device, expert = int(rng.integers(devices)), int(rng.integers(experts))
            if expert not in held[device]:
                held[device].append(expert)
        slots.append(held)
    return placement_of(slots, tuple(f"host{d * hosts // devices}" for d in range(devices)))


def random_trace(seed: int, layers: int, experts: int, tokens: int = 200, top_k: int = 2) -> Trace:
    rng = np.random.default_rng(seed)
    gumbel = rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts))
    return Trace.of(np.argsort(-gumbel, axis=2)[:, :, :top_k], experts)


# Two layers, four experts, two devices on two hosts, top-1. Ten tokens: seven take 0 then 2, three take 3 then 1.
HAND = Trace.of(np.array([[[0], [2]]] * 7 + [[[3], [1]]] * 3), 4)
SPLIT = [[[0, 1], [2, 3]], [[0, 1], [2, 3]]]
HOSTS = ("left", "right")


# ---- values that are known


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
    assert any("room for every expert already" in note for note in found.notes)


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
    return {x.name: (x.binding, x.words) for x in why.limits(placement, trace)}


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
        found, words = limits(placement_of(SPLIT, HOSTS, balance_cap=cap, balance_cap_of=of))["balance cap"]
        assert found is binds
        assert f"{reached} of at most {cap:.4f}" in words
    assert "balance cap" not in limits(placement_of(SPLIT, HOSTS))


def test_slots_bind_where_no_device_has_room() -> None:
    binds, words = limits(placement_of(SPLIT, HOSTS))["slots"]
    assert binds
    assert "all 2 devices are full in every layer, 4 slots per layer for 4 experts: no room for a second copy" in words
    roomy = [PlacementDevice(host="left", capacity=2), PlacementDevice(host="right", capacity=3)]
    binds, words = limits(placement_of(SPLIT, HOSTS, devices=roomy))["slots"]
    assert not binds
    assert "1 of 2 devices are full, 1.0 slots free per layer; 5 slots per layer for 4 experts" in words


def test_moves_bind_at_their_limit() -> None:
    for copies, limit, binds in ((3, 4, False), (4, 4, True), (9, None, False)):
        placement = placement_of(SPLIT, HOSTS, moves=Moves(previous="old.json", copies=copies, limit=limit))
        assert limits(placement)["moves"][0] is binds


def test_groups_bind_where_they_force_a_worse_balance() -> None:
    binds, words = limits(placement_of(SPLIT, HOSTS, groups=2))["groups"]
    # layer 0 has loads 7 0 | 0 3, layer 1 has 0 3 | 7 0: one expert has 7 of 10 with groups or without
    assert not binds
    assert "at best 1.4000 in balance with them, 1.4000 without" in words
    placement = placement_of([[[0, 1], [2, 3]]], HOSTS, groups=2)
    (bound,) = [x for x in why.limits(placement, Trace.of_counts(np.array([[4.0, 4, 1, 1]]))) if x.name == "groups"]
    assert bound.binding
    assert "at best 1.6000 in balance with them, 1.0000 without" in bound.words
    torn = limits(placement_of([[[0, 2], [1, 3]]] * 2, HOSTS, groups=2))["groups"][1]
    assert "not kept: 4 (layer, group)" in torn


# ---- the same by brute force


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


# ---- comparing


def test_each_is_better_in_something() -> None:
    # B joins the pairs (nothing crosses), and is as hot; A is cooler with 0 and 3 together.
    a = placement_of([[[0, 1], [2, 3]], [[0, 1], [2, 3]]], HOSTS, HAND)
    b = placement_of([[[0, 1], [2, 3]], [[0, 2], [1, 3]]], HOSTS, HAND)
    found = between(a, b, HAND)
    assert (found.a["fit"].boundary_cross_host, found.b["fit"].boundary_cross_host) == (1.0, 0.0)
    better = {d.measure: d.better for d in found.differences}
    assert better["boundary_cross_host"] == "B"
    assert better["balance_mean"] == "same"
    assert found.changed == (0, 2)
    assert found.copies == (0, 2)
    assert found.verdict == (
        "B is better on the fitted part in boundaries that cross hosts (0 against 1, -100.0%); "
        "boundaries that cross devices (0 against 1, -100.0%)",
    )
    same = between(a, a, HAND)
    assert same.verdict == ("neither is better on the fitted part: all scores are the same within 0.5%",)
    swapped = between(b, a, HAND)
    assert swapped.verdict[0].startswith("A is better on the fitted part in boundaries that cross hosts (0 against 1")


def test_without_a_trace_the_documents_speak() -> None:
    scores = [Scores(fit=Score(tokens=9, balance_mean=x, balance_max=x), held_out=None) for x in (1.2, 1.1)]
    a, b = (
        placement_of(SPLIT, HOSTS, HAND, scores={"linear": scores[0], "placement": own, "eplb": scores[0]})
        for own in scores
    )
    found = between(a, b, None)
    assert not found.rescored
    assert (found.a["fit"].balance_mean, found.b["fit"].balance_mean) == (1.2, 1.1)
    assert "B is better on the fitted part in everything that is scored" in found.verdict[0]
    assert not any("different traces" in note for note in found.notes)
    other = b.model_copy(update={"trace": TraceSource(digest="feed")})
    assert any("different traces" in note for note in between(a, other, None).notes)
    empty = placement_of(SPLIT, HOSTS, HAND)
    assert between(empty, a, None).verdict == ("no scores to compare: pass a trace with --trace",)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (random_placement(0, 3, 4, 2, 2), "A has 2 layers, B 3"),
        (random_placement(0, 2, 6, 2, 2), "A has 4 experts, B 6"),
        (random_placement(0, 2, 4, 4, 2), "A has 2 devices, B 4"),
    ],
)
def test_other_shapes_are_refused(other: Placement, words: str) -> None:
    with pytest.raises(MoeplanError, match=words) as refused:
        between(placement_of(SPLIT, HOSTS), other, None)
    assert "\n" not in str(refused.value)


# ---- the commands


@pytest.fixture
def place(moeplan: Run) -> Path:
    """place.json of tiny-moe's shape with its trace beside it, fitted on the first half."""
    trace = random_trace(5, 8, 16)
    trace.write("trace.npz")
    placement = random_placement(5, 8, 16, 4, 2)
    source = TraceSource(path="trace.npz", digest=trace.digest(), fit=(0.0, 0.5), tokens=trace.tokens)
    fitted, rest = trace.part(0, 0.5), trace.part(0.5, 1)
    scores = {
        name: Scores(fit=why.measure(placement, fitted), held_out=why.measure(placement, rest))
        for name in ("placement", "linear", "eplb")
    }
    placement = placement.model_copy(update={"model": "tiny-moe", "trace": source, "scores": scores})
    return placement.write("place.json")


def test_the_page_says_why(moeplan: Run, place: Path) -> None:
    page = " ".join(moeplan("explain", place, "--picture", "place.png").split())  # however lines break
    for words in (
        "tiny-moe: 8 layers x 16 experts on 4 devices of 2 hosts, 16 slots per layer",
        "at most 20.0% could still be saved",
        "what limits it",
        "beside the usual placements",
        "hottest devices, on the fitted part",
        "Over all layers together device",
        "what still crosses",
        "widest fan-out",
        "what one more slot per device would buy",
        "on every device, all layers together",
        "wrote place.png",
    ):
        assert words in page
    assert Path("place.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_is_complete(moeplan: Run, place: Path) -> None:
    body = json.loads(moeplan("explain", place, "--json"))
    found = body["explanation"]
    assert body["solver"]["bounds"] == {"spectral": 0.4}
    assert set(body["scores"]) == {"placement", "linear", "eplb"}
    assert np.array(found["load_over_ideal"]).shape == (8, 4)
    assert len(found["boundaries"]) == 7
    assert len(found["fanout"]) == 8
    assert found["fit"] == pytest.approx(body["scores"]["placement"]["fit"])
    assert found["held_out"] == pytest.approx(body["scores"]["placement"]["held_out"])
    assert found["one_more_slot"]["more_slots"] <= found["one_more_slot"]["same_slots"] <= found["one_more_slot"]["now"]
    assert json.loads(moeplan("explain", place, "--json")) == body  # the same again


@pytest.mark.parametrize(
    ("status", "bound", "words"),
    [
        ("optimal", 0.5, "proven optimal"),
        ("feasible", 0.0, "nothing is proven"),
        ("time_limit", 0.4, "stopped at its time limit"),
    ],
)
def test_the_verdict_in_words(moeplan: Run, place: Path, status: str, bound: float, words: str) -> None:
    solver = PlacementSolver(
        status=status, objective=0.5, bound=bound, gap=1 - bound / 0.5, seconds=1, minimised="moves"
    )
    Placement.read(place).model_copy(update={"solver": solver}).write("other.json")
    assert words in moeplan("explain", "other.json")


@pytest.mark.parametrize("kind", ["copies", "counts", "one host", "one layer"])
def test_every_kind_of_placement_has_a_page_and_a_picture(moeplan: Run, kind: str) -> None:
    layers, hosts = (1 if kind == "one layer" else 3), (1 if kind == "one host" else 2)
    placement = random_placement(1, layers, 8, 4, hosts, copies=2 if kind == "copies" else 0)
    trace = random_trace(1, layers, 8)
    if kind == "counts":
        trace = Trace.of_counts(trace.expert_counts)
    trace.write("trace.npz")
    placement.write("place.json")
    page = moeplan("explain", "place.json", "--trace", "trace.npz", "--picture", "place.png")
    assert ("what still crosses" in page) == (kind == "one host")
    assert ("widest fan-out" in page) == (kind != "counts")
    assert Path("place.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_is_missing_other_or_of_another_shape(
    moeplan: Run, place: Path, capfd: pytest.CaptureFixture
) -> None:
    Path("trace.npz").rename("elsewhere.npz")
    with pytest.raises(MoeplanError, match=r"its trace trace\.npz is not here; pass one with --trace"):
        moeplan("explain", place)
    moeplan("explain", place, "--trace", "elsewhere.npz")
    random_trace(6, 8, 16).write("other.npz")
    app(["explain", "place.json", "--trace", "other.npz"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert "the placement was fitted on another trace" in err
    assert "the whole trace, of which nothing was fitted" in out
    random_trace(6, 7, 16).write("short.npz")
    with pytest.raises(MoeplanError, match="the trace has 7 layers x 16 experts, the placement 8 x 16"):
        moeplan("explain", place, "--trace", "short.npz")
    Placement.read(place).model_copy(update={"trace": TraceSource()}).write("unnamed.json")
    with pytest.raises(MoeplanError, match="it names no trace; pass one with --trace"):
        moeplan("explain", "unnamed.json")


def test_documents_of_other_kinds_are_refused_with_a_hint(moeplan: Run, place: Path) -> None:
    Path("plan.json").write_text('{"kind": "moeplan.plan", "version": 1}')
    for args in (("explain", "plan.json"), ("compare", place, "plan.json"), ("compare", "plan.json", place)):
        with pytest.raises(MoeplanError, match=r"expected 'moeplan.placement', got 'moeplan.plan'; make one with"):
            moeplan(*args)
    with pytest.raises(MoeplanError, match=r"none\.json: no such file; make one with `moeplan place`"):
        moeplan("explain", "none.json")


def test_compare_rescores_on_the_trace_that_both_name(moeplan: Run, place: Path) -> None:
    other = random_placement(9, 8, 16, 4, 2)
    own = Placement.read(place)
    own.model_copy(update={"layers": other.layers, "scores": {}}).write("other.json")
    body = json.loads(moeplan("compare", place, "other.json", "--json"))
    assert body["rescored"]
    assert body["a"]["held_out"] == pytest.approx(own.scores["placement"].held_out.model_dump())
    assert body["documents"]["b"]["file"] == "other.json"
    assert body["documents"]["a"]["solver"] == own.solver.model_dump()
    assert (body["documents"]["a"]["devices"], body["documents"]["a"]["slots"]) == (4, 16)
    assert body["changed_in_all"] == sum(body["changed"]) == int(changed_experts(own, other).sum())
    assert body["copies_in_all"] == body["changed_in_all"]  # single copies
    assert body["bytes"] == body["copies_in_all"] * why.expert_bytes(own)[0][0]
    assert {d["part"] for d in body["differences"]} == {"fit", "held_out"}
    page = moeplan("compare", place, "other.json")
    assert f"From A to B the devices load {body['copies_in_all']} copies" in page
    assert "better" in page
    assert "A and B hold the same experts on the same devices" in moeplan("compare", place, place)
    Path("trace.npz").unlink()
    assert not json.loads(moeplan("compare", place, "other.json", "--json"))["rescored"]


def test_names_with_markup_are_printed_as_they_are(moeplan: Run) -> None:
    placement = random_placement(1, 2, 8, 4, 1)
    odd = [device.model_copy(update={"host": "[red]$h_{$[/]"}) for device in placement.devices]
    scores = {"[/] odd": Scores(fit=Score(tokens=1, balance_mean=1, balance_max=1))}
    bounds = placement.solver.model_copy(update={"minimised": "[/]", "bounds": {"[/a]": 0.1, "[/b]": 0.2}})
    update = {"devices": tuple(odd), "scores": scores, "solver": bounds, "model": "[/model]$_$"}
    placement.model_copy(update=update).write("odd.json")
    random_trace(1, 2, 8).write("trace.npz")
    page = moeplan("explain", "odd.json", "--trace", "trace.npz", "--picture", "odd.png")
    for text in ("on [red]$h_{$[/]", "[/] odd", "[/b]", "[/model]$_$"):
        assert text in page
    assert "[/model]$_$" in moeplan("compare", "odd.json", "odd.json", "--trace", "trace.npz")


def test_a_picture_of_an_unknown_kind_is_refused(moeplan: Run, place: Path) -> None:
    with pytest.raises(MoeplanError, match=r"place\.xyz: no picture of kind '\.xyz': use \.png"):
        moeplan("explain", place, "--picture", "place.xyz")
    assert not Path("place.xyz").exists()
