"""Shares decided for the batch: as good as the exact ones, the same for runtime and planner, and what plans may say."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.choices import Choices
from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.runtime.strategies import ep
from moeplan.runtime.strategies.by_batch import ByBatch
from moeplan.solvers.replication.shares import layer_shares
from moeplan.spec import Workload
from moeplan.spec.batch_shares import BatchShares, poured
from moeplan.spec.errors import MoeplanError
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing
from moeplan.tests.synthetic import cluster, tiny_model

EXPERTS = 8
CLOSE = 0.02  # of the best level; the rounds end where little moves


@st.composite
def copies(draw):
    """Slots of every device that hold each expert at least once, speeds, and rows of each expert."""
    devices = draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    slots = [[] for _ in range(devices)]
    for expert in range(EXPERTS):
        slots[rng.integers(devices)].append(expert)
    for own in slots:
        more = [e for e in rng.permutation(EXPERTS)[: draw(st.integers(0, 4))].tolist() if e not in own]
        own += more
    speeds = draw(st.lists(st.sampled_from([0.25, 1.0, 1.5, 4.0]), min_size=devices, max_size=devices))
    rows = rng.integers(0, draw(st.sampled_from([1, 5, 300])), EXPERTS) * rng.integers(0, 2, EXPERTS)
    return tuple(map(tuple, slots)), tuple(speeds), rows.astype(float)


def highest(slots, speeds, load, weights, copied) -> float:
    share = np.zeros((EXPERTS, len(slots)))
    for g, own in enumerate(slots):
        share[list(own), g] = 1.0
    share[copied] = weights / weights.sum(1, keepdims=True)
    return float((load @ share / np.array(speeds)).max())


@given(copies())
@settings(max_examples=200, deadline=None)
def test_the_last_device_ends_as_early_as_it_can(case):
    slots, speeds, load = case
    decided = BatchShares(slots, speeds, EXPERTS)
    weights = decided.weights(load)
    expert_of = np.concatenate([np.array(own, np.int64) for own in slots])
    device = np.repeat(np.arange(len(slots)), [len(own) for own in slots])
    best = layer_shares(expert_of, device, load, np.array(speeds))[1]
    assert (weights >= 0).all()
    assert highest(slots, speeds, load, weights, decided.copied) <= best * (1 + CLOSE) + 1e-9


@given(st.floats(0, 100), st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 5)), min_size=1, max_size=5))
@settings(max_examples=200, deadline=None)
def test_pouring_ends_at_one_level(rows, devices):
    held, speeds = (list(values) for values in zip(*devices, strict=True))
    taken = poured(rows, held, speeds)
    assert sum(taken) == pytest.approx(rows, abs=1e-6)
    levels = [(n + h) / s for n, h, s in zip(taken, held, speeds, strict=True)]
    filled = [level for level, n in zip(levels, taken, strict=True) if n > 1e-9]
    if filled:
        assert max(filled) == pytest.approx(min(filled), rel=1e-6, abs=1e-6)
        assert min(levels) >= max(filled) * (1 - 1e-6) - 1e-6


@given(copies(), st.integers(0, 2**16), st.sampled_from([0, 4]))
@settings(max_examples=60, deadline=None)
def test_the_planner_sends_tokens_where_the_runtime_does(case, seed, identity):
    slots, speeds, _ = case
    plan, rng, devices = LayerPlan(strategy="ep", slots=slots, speeds=speeds), np.random.default_rng(seed), len(slots)
    sequences = rng.multinomial(40, np.ones(devices) / devices)
    layout = Layout.of(Workload.from_text("decode:40@8"), 1, tuple(sequences.tolist()))
    ids = np.argsort(rng.random((40, EXPERTS + identity)), axis=1)[:, :2]
    ids[ids >= EXPERTS] = -1
    planned = Choices(ids[None], layout, np.zeros(devices, int), EXPERTS).dispatch([plan])
    load = np.bincount(ids[ids >= 0], minlength=EXPERTS)
    tables, first = ByBatch(plan, EXPERTS, torch.device("cpu")).tables(load), 0
    rows = np.zeros((devices, EXPERTS))
    for count in sequences:
        own = torch.from_numpy(ids[first : first + count])
        target, place = ep.served(own, tables, ep.phases(first, int(count), torch.device("cpu")))
        assert ((target == devices) == (own < 0)).all()
        for g, i in zip(target[own >= 0].tolist(), place[own >= 0].tolist(), strict=True):
            rows[g, slots[g][i]] += 1
        first += count
    np.testing.assert_array_equal(planned.experts.devices[0], rows)


MODEL = tiny_model(layers=2)
PREFILL = Workload.from_text("prefill:512@32")


def test_it_is_planned_where_it_is_asked_for():
    """With one device much slower than the other, copies are worth it; their tokens are divided by batch."""
    machines = cluster(MODEL, ((1.0, 0.2),), local=1e11)
    plan = solve(MODEL, machines, PREFILL, by_batch=True)
    assert {layer.strategy for layer in plan.layers} == {"ep"}
    copied = [layer for layer in plan.layers if sum(map(len, layer.slots)) > EXPERTS]
    assert all((layer.speeds is not None) == (layer in copied) for layer in plan.layers)
    static = solve(MODEL, machines, PREFILL, strategy="ep")
    assert not any(layer.speeds for layer in static.layers)


def test_shares_by_batch_gain_on_another_batch():
    """Shares of a plan are for the batch that it was made for; of a batch with other hot experts they are wrong."""
    model = tiny_model(layers=2, hidden=256, ffn=512)
    machines = cluster(model, ((1.0, 1.0),), local=1e12)
    everywhere = (tuple(range(EXPERTS)),) * 2
    shares = (
        tuple(1.0 if e < 2 else 0.0 for e in range(EXPERTS)),
        tuple(0.0 if e < 2 else 1.0 for e in range(EXPERTS)),
    )
    static = LayerPlan(strategy="ep", slots=everywhere, shares=shares)
    batch = LayerPlan(strategy="ep", slots=everywhere, speeds=(1.0, 1.0))
    ids = np.tile(np.array([0, 1]), (512, 2, 1))  # every token chooses experts 0 and 1
    routing = Routing(ids, np.full(ids.shape, 0.5, np.float32))
    step = Step(Costs(machines, model, "f32"), model, Layout.of(PREFILL, 1, (8, 8)), routing)
    assert step.seconds([batch] * 2) < 0.8 * step.seconds([static] * 2)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"strategy": "gathered", "speeds": (1.0, 1.0)}, "speeds belong to strategy ep, not gathered"),
        ({"strategy": "ep", "speeds": (1.0,)}, "speeds need one number for each device, and no shares"),
        ({"strategy": "ep", "speeds": (1.0, 1.0), "shares": ((1.0,), (1.0,))}, "and no shares"),
        ({"strategy": "ep", "speeds": (1.0, 0.0)}, "greater than 0"),
    ],
)
def test_layers_that_contradict_themselves(fields, said):
    with pytest.raises(ValueError, match=said):
        LayerPlan(slots=((0,), (1,)), **fields)


def test_other_strategies_are_refused():
    with pytest.raises(MoeplanError, match="--by-batch does not go with --strategy sharded"):
        solve(MODEL, cluster(MODEL, ((1.0, 1.0),)), PREFILL, strategy="sharded", by_batch=True)
