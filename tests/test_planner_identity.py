"""Identity experts in plans and placements: they need no device, and what is predicted and scored leaves them out."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.explain import explain
from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.pareto import check_front
from moeplan.planner.place.request import Request
from moeplan.planner.place.solve import place
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.profiler.traces import trace_stats
from moeplan.solvers.placement.affinity import pairs
from moeplan.solvers.placement.fan_out import expert_sets, fan_outs, places
from moeplan.spec import MoeplanError, Plan, Trace, Workload
from moeplan.spec.routing import Routing, draw_routing
from moeplan.spec.selection import Selection
from moeplan.tests.synthetic import cluster, tiny_model

EXPERTS, ZERO = 8, 8
FLEET = ((1.0, 1.0), (1.0, 1.0))
STRATEGIES = ("ep", "hierarchical", "sharded", "gathered", "coherent", "offload")


def identity_trace(tokens: int = 400, layers: int = 3, zero: int = ZERO, seed: int = 0) -> Trace:
    ids = np.random.default_rng(seed).random((tokens, layers, EXPERTS + zero)).argsort(2)[:, :, :2]
    ids[ids >= EXPERTS] = -1
    return Trace.of(ids, EXPERTS, zero_experts=zero, seq_len=np.full(tokens // 20, 20))


@pytest.mark.parametrize("trace", [None, identity_trace(layers=2)], ids=["assumed", "trace"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_is_planned(strategy, trace):
    """Simulated as predicted, and faster than if an expert with weights were chosen in their place."""
    model = tiny_model(layers=2, zero=ZERO)
    machines = cluster(model, FLEET, disk=1e8)
    workload = Workload.from_text("decode:64@64" if strategy in ("coherent", "offload") else "prefill:512@32")
    plan = solve(model, machines, workload, trace, strategy=strategy)
    assert {layer.strategy for layer in plan.layers} == {strategy}
    assert plan.solver.bound <= plan.solver.objective
    step = Step.of(plan, machines, trace)
    assert step.seconds(list(plan.layers)) == pytest.approx(plan.predicted.step_seconds)
    assert step.timeline(list(plan.layers)).makespan == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert Plan.parse(plan.to_json(), "plan") == plan
    ids = step.routing.expert_ids
    full = Routing(np.where(ids < 0, EXPERTS - 1, ids), step.routing.expert_weights)
    busier = Step(step.costs, model, step.layout, full, step.places)
    assert step.seconds(list(plan.layers)) < busier.seconds(list(plan.layers))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_whose_tokens_chose_nothing_else(strategy):
    """Hardly any choice is of an expert with weights, in some layers none: nothing to balance, nothing to send."""
    model = tiny_model(layers=3, top_k=1, zero=400)
    machines = cluster(model, FLEET, disk=1e8)
    workload = Workload.from_text("prefill:4@1" if strategy not in ("coherent", "offload") else "decode:4@64")
    ids = draw_routing(None, model, workload, 0).expert_ids
    assert (ids < 0).all(axis=(0, 2)).any()
    plan = solve(model, machines, workload, strategy=strategy)
    assert plan.solver.bound <= plan.solver.objective == pytest.approx(plan.predicted.step_seconds)
    if strategy == "ep":
        step = Step.of(plan, machines)
        sent = [layer.choices.dispatch([p]) for layer, p in zip(step.layers, plan.layers, strict=True)]
        assert sum(float(one.computed.sum()) for one in sent) == (ids >= 0).sum()


@given(st.integers(0, 2**16), st.integers(1, 4), st.integers(1, 30), st.sampled_from([0, 3, 50]))
@settings(max_examples=60)
def test_sets_places_and_pairs_leave_identity_experts_out(seed, top_k, tokens, zero):
    """Against counting token by token."""
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, 2, EXPERTS + zero)).argsort(2)[:, :, :top_k]
    ids[ids >= EXPERTS] = -1
    device = rng.integers(0, 3, (5, EXPERTS))
    together = pairs(ids, EXPERTS)
    for layer, sets in enumerate(expert_sets(ids)):
        rows = ids[:, layer].tolist()
        members, count = sets
        assert sorted(sorted(row) for row in rows) == sorted(
            row for row, n in zip(members.tolist(), count.tolist(), strict=True) for _ in range(n)
        )
        wide = [[len({of[e] for e in row if e >= 0}) for row in rows] for of in device]
        assert fan_outs(device, sets, [(1.5, np.arange(3))]) == pytest.approx([1.5 * sum(own) for own in wide])
        assert [places(of, ids[:, layer]).tolist() for of in device] == wide
        by_hand = np.zeros((EXPERTS, EXPERTS))
        for row in rows:
            for i, a in enumerate(row):
                for b in row[:i] + row[i + 1 :]:
                    if a >= 0 and b >= 0:
                        by_hand[a, b] += 1
        assert (together[layer] == by_hand).all()


def test_a_trace_with_them_is_placed_for_balance():
    """Its counts are planned with, on the part that is asked for; what moves is not told."""
    trace = identity_trace()
    request = Request(devices=even_fleet(4, 2, 8, False, EXPERTS), slots=8, fit=(0, 0.5), time_limit=5.0)
    found = place(trace, request)
    assert found.trace.digest == trace.digest()
    assert found.trace.counts_only
    assert found.scores["placement"].fit.boundary_cross_device is None
    assert found.scores["placement"].held_out is not None
    assert any("tokens of the trace chose identity experts, too: balance is planned" in note for note in found.notes)
    half = trace.part(0, 0.5)
    assert found.scores["placement"].fit.tokens == half.expert_counts[0].sum()
    explained = explain(found, trace)
    assert explained.fitted
    assert explained.boundaries is None
    assert explained.held_out is not None
    with pytest.raises(MoeplanError, match="--pareto needs expert_ids per token: one with choices of identity experts"):
        check_front(trace, request)
    stats = trace_stats(trace, devices=4, hosts=2)
    assert stats.affinity is None
    assert stats.fan_out is None
    assert stats.halves is not None
    assert stats.expert_counts.sum() == (trace.expert_ids >= 0).sum()


def test_a_trace_of_another_model_is_refused():
    model = tiny_model(layers=3)
    with pytest.raises(MoeplanError, match=r"has 8 identity experts .* tiny has 0"):
        solve(model, cluster(model), Workload.from_text("prefill:64@32"), identity_trace())


def test_counts_alone_say_what_was_assumed():
    model = tiny_model(layers=3, zero=ZERO)
    trace = identity_trace()
    counts = Trace.of_counts(trace.expert_counts)
    plan = solve(model, cluster(model), Workload.from_text("prefill:256@32"), counts)
    assert any(note.startswith("identity experts are not in the trace's counts") for note in plan.notes)


def test_a_selection_is_refused():
    model = tiny_model(layers=1, zero=ZERO)
    with pytest.raises(MoeplanError, match="layer 0 of tiny has identity experts, which cost nothing"):
        Selection.from_text("lynx:4").check(model, Workload.from_text("decode:4"))
