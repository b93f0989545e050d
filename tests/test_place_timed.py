"""Placement by predicted time on a synthetic cluster of unequal devices."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.layers import document_layers
from moeplan.planner.place.request import Request
from moeplan.planner.place.solve import place
from moeplan.planner.place.timed import Timing
from moeplan.planner.search import solve
from moeplan.solvers.slots import Slots
from moeplan.spec import MoeplanError, Trace, Workload
from moeplan.tests import synthetic

UNEQUAL = ((1.0, 1.0), (0.5, 0.5))


def skewed_trace(seed: int, model, tokens: int = 600) -> Trace:
    rng = np.random.default_rng(seed)
    moe = model.moe_block().moe
    layers = len(model.moe_layers)
    popular = rng.dirichlet(np.full(moe.num_experts, 2.0), layers)
    scores = np.log(popular)[None] + rng.gumbel(size=(tokens, layers, moe.num_experts))
    ids = np.argsort(-scores, axis=2)[:, :, : moe.top_k]
    return Trace.of(ids, moe.num_experts, seq_len=np.full(6, tokens // 6))


def timing_of(model, speeds=UNEQUAL, **settings) -> Timing:
    cluster = synthetic.cluster(model, speeds, **settings)
    return Timing(cluster, model, Workload.from_text("prefill:512"), model.dtype)


def big_model(**settings):
    """Experts large enough that their time decides."""
    return synthetic.tiny_model(layers=3, hidden=512, ffn=2048, experts=16, **settings)


def test_slow_devices_get_less_and_the_prediction_is_far_below_equal_treatment():
    model = big_model()
    trace, timing = skewed_trace(0, model), timing_of(model)
    devices = timing.devices(trace, 16, False)
    found = place(trace, Request(devices, 16, fit=(0.0, 0.5), steps=20_000, timing=timing), model=model)
    scores = {name: both.held_out.step_seconds for name, both in found.scores.items() if both.held_out}
    assert scores["placement"] < 0.8 * scores["eplb"]
    assert scores["placement"] < scores["linear"]
    assert found.solver.objective == pytest.approx(found.scores["placement"].fit.step_seconds)
    assert 0 < found.solver.bound <= found.solver.objective


def test_half_the_memory_is_kept():
    model = big_model()
    expert = sum(model.expert_bytes(i) for i in range(3))
    timing = timing_of(model, memory=[4 * expert * 1.2 + 2**24, *[12 * expert * 1.2 + 2**24] * 3])
    trace = skewed_trace(1, model)
    devices = timing.devices(trace, 16, False)
    assert devices[0].capacity < 8 < devices[1].capacity
    found = place(trace, Request(devices, 16, steps=5_000, timing=timing), model=model)
    for layer in found.layers:
        assert len(layer.slots[0]) <= devices[0].capacity


@pytest.mark.parametrize("speeds", [UNEQUAL, ((1.0, 1.0), (1.0, 1.0))])
def test_tokens_are_divided_as_solve_divides_them(speeds):
    model, workload = big_model(), Workload.from_text("prefill:512@16")
    cluster = synthetic.cluster(model, speeds)
    trace = skewed_trace(7, model)
    timing = Timing(cluster, model, workload, model.dtype)
    devices = timing.devices(trace, 16, False)
    found = place(trace, Request(devices, 16, steps=2_000, timing=timing), model=model)
    plan = solve(model, cluster, workload, trace, placement=found)
    assert timing.division[1].tokens == plan.tokens
    assert (len(set(plan.tokens)) > 1) == (speeds is UNEQUAL)
    assert any("with tokens divided as `solve` tries first (tensor " in note for note in found.notes)


def test_without_attention_curves_tokens_are_divided_evenly_and_it_is_said():
    model = big_model()
    cluster = synthetic.cluster(model, UNEQUAL)
    kinds = tuple(
        kind.model_copy(update={"operators": tuple(o for o in kind.operators if "attention" not in o.operator)})
        for kind in cluster.kinds
    )
    timing = Timing(cluster.model_copy(update={"kinds": kinds}), model, Workload.from_text("prefill:512"), model.dtype)
    assert len(set(timing.division[1].tokens)) == 1
    assert "divided evenly, for want of attention curves in the cluster" in timing.note


def test_copies_that_do_not_pay_are_said():
    model = big_model()
    ids = np.stack([np.arange(16).reshape(8, 2)] * 3, axis=1)[np.arange(480) % 8]  # every expert as often
    trace, timing = Trace.of(ids, 16), timing_of(model, ((1.0, 1.0), (1.0, 1.0)))
    found = place(trace, Request(timing.devices(trace, 20, True), 20, steps=2_000, timing=timing))
    said = [note for note in found.notes if "20 slots are asked for and no expert is copied" in note]
    assert bool(said) != any(sum(map(len, layer.slots)) > 16 for layer in found.layers)
    assert said


@settings(max_examples=10)
@given(st.integers(0, 10**6))
def test_the_bound_is_below_every_placement(seed):
    model = synthetic.tiny_model(layers=1, hidden=128, ffn=256, experts=4)
    timing = timing_of(model, ((1.0,), (0.5,)))
    trace = skewed_trace(seed, model)
    least = timing.bound(trace)
    for order in permutations([0, 0, 1, 1]):
        slots = Slots.from_device_of([order], np.array([4, 4]))
        assert least <= timing.seconds(document_layers(slots), trace) * (1 + 1e-9)


def test_replicas_share_memory_as_evenly_as_it_allows():
    model = big_model()
    trace, timing = skewed_trace(2, model), timing_of(model)
    assert [d.capacity for d in timing.devices(trace, 20, False)] == [5, 5, 5, 5]
    assert [d.capacity for d in timing.devices(trace, 16, True)] == [4, 4, 4, 4]
    found = place(trace, Request(timing.devices(trace, 20, True), 20, steps=5_000, timing=timing, time_limit=10))
    assert sum(map(len, found.layers[0].slots)) in (16, 20)


def test_too_little_memory_says_how_much_is_missing():
    model = big_model()
    timing = timing_of(model, memory=2**25)
    with pytest.raises(MoeplanError, match=r"16 are wanted: \d+ slots, .* MiB are missing"):
        timing.devices(skewed_trace(3, model), 16, False)


def test_what_does_not_go_with_predicted_time_is_refused():
    model = big_model()
    trace, timing = skewed_trace(4, model), timing_of(model)
    devices = timing.devices(trace, 16, False)
    with pytest.raises(MoeplanError, match="--balance-cap does not go with --cluster"):
        place(trace, Request(devices, 16, balance_cap=1.5, timing=timing))


def test_another_models_trace_is_refused():
    model = big_model()
    other = synthetic.tiny_model(layers=2, experts=16)
    with pytest.raises(MoeplanError, match="layers"):
        timing_of(model).devices(skewed_trace(5, other), 16, False)


def test_moves_are_limited_from_the_previous_placement():
    model = big_model()
    trace, timing = skewed_trace(6, model), timing_of(model)
    devices = timing.devices(trace, 16, False)
    old = place(trace, Request(devices, 16, steps=2_000, timing=timing))
    half = trace.part(0.5, 1)
    new = place(half, Request(devices, 16, steps=5_000, timing=timing, previous=old, max_moves=3))
    assert new.moves is not None
    assert new.moves.copies <= 3
    assert new.scores["placement"].fit.step_seconds <= timing.seconds(old.layers, half)
