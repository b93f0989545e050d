"""Coherent plans in the search: chosen where they win, left out where they cannot be, and refused in one line."""

import functools

import numpy as np
import pytest

from moeplan.planner import search as search_module
from moeplan.planner.costs import Costs
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.spec import Plan, Trace, Workload
from moeplan.spec.errors import InfeasibleError, MissingCurveError, MoeplanError
from moeplan.spec.model import Attention, Block, Moe
from moeplan.spec.plan import LayerPlan
from moeplan.tests.synthetic import cluster, tiny_model

DECODE = Workload.from_text("decode:32@64")
LAYERS, EXPERTS = 12, 8
ATTENTION = Attention(heads=8, kv_heads=1, head_dim=16)  # keys and values of one token: an eighth of its activation
BLOCK = Block(count=LAYERS, hidden_size=256, attention=ATTENTION, moe=Moe(num_experts=EXPERTS, top_k=1, ffn_size=32))
MODEL = tiny_model().model_copy(update={"blocks": (BLOCK,)})
APART = ((1.0,), (1.0,))


@functools.cache
def followed_trace(follow: float = 0.9) -> Trace:
    """Top-1 routing in which the expert of a layer tells the next one's, through a permutation, in most tokens."""
    rng = np.random.default_rng(0)
    ids = np.zeros((2000, LAYERS), np.int32)
    ids[:, 0] = rng.integers(EXPERTS, size=2000)
    for layer in range(1, LAYERS):
        told = rng.permutation(EXPERTS)[ids[:, layer - 1]]
        ids[:, layer] = np.where(rng.random(2000) < follow, told, rng.integers(EXPERTS, size=2000))
    return Trace.of(ids[:, :, None], EXPERTS, seq_len=np.full(20, 100))


@functools.cache
def solved(uplink: float = 2e6, trace: bool = True, **options) -> Plan:
    machines = cluster(MODEL, APART, uplink=uplink, local=uplink)
    return solve(MODEL, machines, DECODE, followed_trace() if trace else None, **options)


def test_it_is_chosen_over_a_slow_link_and_placed_by_affinity():
    """Where memory does not hold every expert on every device, which would move nothing at all."""
    limit = max(m.total for m in solved(strategy="coherent").predicted.memory) + 2**20
    found, ep = solved(memory_bytes=limit), solved(strategy="ep", memory_bytes=limit)
    assert {layer.strategy for layer in found.layers} == {"coherent"}
    assert found.solver.objective < 0.75 * ep.solver.objective
    assert found.placements[0].method.startswith("affinity")
    assert found.placements[0].bound <= found.placements[0].objective
    machines = cluster(MODEL, APART, uplink=2e6, local=2e6)
    assert Step.of(found, machines, followed_trace()).seconds(list(found.layers)) == pytest.approx(
        found.solver.objective
    )
    assert "or coherent in every layer (linear, greedy, speed-weighted" in found.solver.space
    assert "affinity placement)" in found.solver.space
    assert Plan.parse(found.to_json(), "plan") == found
    assert found.degrees.tensor == 1


def test_a_fast_link_leaves_it_alone_and_the_bound_holds_for_it():
    found, forced = solved(uplink=1e11), solved(uplink=1e11, strategy="coherent")
    assert {layer.strategy for layer in found.layers} != {"coherent"}
    assert found.solver.objective <= forced.solver.objective
    best = min(c.step_seconds for c in found.candidates if c.name.startswith("all coherent"))
    assert best == pytest.approx(forced.solver.objective)
    assert found.solver.bound <= best


def test_forced_it_is_in_every_layer_and_the_bound_is_that_of_what_was_enumerated():
    found = solved(strategy="coherent")
    assert {layer.strategy for layer in found.layers} == {"coherent"}
    assert all(set(c.strategies) == {"coherent"} for c in found.candidates if c.name not in found.baselines)
    assert found.solver.bound == found.solver.objective
    assert found.solver.space.startswith("coherent in every layer (")
    costs = Costs(cluster(MODEL, APART, uplink=2e6, local=2e6), MODEL, "f32")
    linear = LayerPlan(strategy="coherent", slots=(tuple(range(4)), tuple(range(4, 8))))
    own = Step.of(found, costs.cluster, followed_trace())
    assert own.seconds([linear] * LAYERS) >= found.solver.bound


def test_without_a_trace_nothing_is_placed_for_moves():
    found = solved(trace=False, strategy="coherent")
    assert "affinity" not in found.solver.space
    assert {layer.strategy for layer in found.layers} == {"coherent"}


def test_prompts_are_refused_and_never_searched():
    machines, prompts = cluster(MODEL, APART), Workload.from_text("prefill:64@32")
    with pytest.raises(
        MoeplanError, match=r"--strategy coherent only decodes: .*decode:SEQUENCES\[@CONTEXT\]"
    ) as error:
        solve(MODEL, machines, prompts, strategy="coherent")
    assert "\n" not in str(error.value)
    found = solve(MODEL, machines, prompts)
    assert not any("coherent" in c.name for c in found.candidates)
    assert "coherent" not in found.solver.space


@pytest.mark.parametrize("operator", ["attention_scattered", "coherent_combine", "coherent_cache"])
def test_a_profile_without_its_curves_says_what_to_do(operator):
    machines = cluster(MODEL, APART)
    kinds = tuple(
        kind.model_copy(update={"operators": tuple(c for c in kind.operators if c.operator != operator)})
        for kind in machines.kinds
    )
    older = type(machines).model_validate(machines.model_dump() | {"kinds": [k.model_dump() for k in kinds]})
    with pytest.raises(MissingCurveError, match=rf"no {operator} curve .* `moeplan profile --model tiny"):
        solve(MODEL, older, DECODE, strategy="coherent")
    found = solve(MODEL, older, DECODE)
    assert not any("coherent" in c.name for c in found.candidates)
    assert any("not searched, for want of curves: coherent" in note for note in found.notes)


def test_the_replicated_cache_counts_against_the_limit():
    long = Workload.from_text("decode:32@4096")
    machines = cluster(MODEL, APART, uplink=2e6, local=2e6)
    ample = solve(MODEL, machines, long, followed_trace(), strategy="coherent")
    need = max(m.total for m in ample.predicted.memory)
    cache = ample.predicted.memory[0].cache
    found = solve(MODEL, machines, long, followed_trace(), memory_bytes=need - cache // 4)
    assert {layer.strategy for layer in found.layers}.isdisjoint({"coherent"})
    assert any(c.reason for c in found.candidates if c.name.startswith("all coherent"))
    with pytest.raises(InfeasibleError, match=r"device 0 lacks .*raise --memory"):
        solve(MODEL, machines, long, followed_trace(), strategy="coherent", memory_bytes=need - cache // 4)


def test_too_many_choices_are_not_followed(monkeypatch):
    monkeypatch.setattr(search_module, "MOST_CHOICES", 100)
    monkeypatch.setattr(search_module, "SAMPLED_CHOICES", 100)
    machines = cluster(MODEL, APART)
    with pytest.raises(MoeplanError, match="--strategy coherent: coherent steps are followed token by token"):
        solve(MODEL, machines, DECODE, strategy="coherent")
    assert any("followed token by token" in note for note in solve(MODEL, machines, DECODE).notes)
