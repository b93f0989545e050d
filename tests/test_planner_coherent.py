"""Coherent steps as planned: rows are those of the runtime's own functions, clocks those of the event simulation."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.costs import Costs
from moeplan.planner.graph import Graph
from moeplan.planner.layout import Layout
from moeplan.planner.simulator import simulate
from moeplan.planner.step import Step
from moeplan.planner.strategies.coherent import Walk
from moeplan.planner.traffic import Traffic
from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.norms import rms_norm
from moeplan.runtime.strategies import coherent, ep
from moeplan.runtime.weights import RouterWeights
from moeplan.spec import Workload
from moeplan.spec.errors import DocumentError
from moeplan.spec.operators import (
    NUMBER_BYTES,
    attention_shape,
    cache_row_bytes,
    cache_shape,
    exchange_shape,
    expert_shape,
    row_bytes,
)
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing, draw_routing
from moeplan.tests.plans import hand_made_plan
from moeplan.tests.synthetic import cluster, tiny_model

EXPERTS, HIDDEN = 8, 16
FLEETS = {1: ((1.0,),), 2: ((1.0,), (0.5,)), 3: ((1.0, 0.5), (0.3,)), 4: ((1.0, 0.5), (0.3, 1.0))}


@st.composite
def placements(draw, devices: int):
    """Slots, every expert at least once, some on several devices, some devices possibly empty; shares or none."""
    holders = draw(st.lists(st.sets(st.integers(0, devices - 1), min_size=1), min_size=EXPERTS, max_size=EXPERTS))
    slots = tuple(tuple(e for e in range(EXPERTS) if g in holders[e]) for g in range(devices))
    if not draw(st.booleans()):
        return LayerPlan(strategy="coherent", slots=slots)
    weight = np.random.default_rng(draw(st.integers(0, 99))).uniform(0.1, 1.0, (devices, EXPERTS))
    held = np.array([[e in own for e in range(EXPERTS)] for own in slots])
    taken = weight * held / (weight * held).sum(0)
    shares = tuple(tuple(float(taken[g, e]) for e in own) for g, own in enumerate(slots))
    return LayerPlan(strategy="coherent", slots=slots, shares=shares)


@st.composite
def steps(draw, **model):
    """A decoding step on up to four devices, some possibly without tokens, and a plan for each of its layers."""
    devices, top_k = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    made = tiny_model(layers=3, top_k=top_k, zero=draw(st.sampled_from([0, 0, 4, 40])), **model)
    counts = draw(st.lists(st.integers(0, 9), min_size=devices, max_size=devices).filter(any))
    workload = Workload.from_text(f"decode:{sum(counts)}@{draw(st.sampled_from([0, 64, 700]))}")
    machines = cluster(made, FLEETS[devices], uplink=draw(st.sampled_from([1e7, 1e10])))
    step = Step(
        Costs(machines, made, "f32"),
        made,
        Layout.of(workload, 1, tuple(counts)),
        draw_routing(None, made, workload, draw(st.integers(0, 99))),
    )
    return step, [draw(placements(devices)) for _ in range(3)]


def executed(step: Step, plan: LayerPlan, ids: np.ndarray, here: list[tuple[torch.Tensor, torch.Tensor]]):
    """One layer on all devices, message by message: rows and partial outputs sent [source, target], and the tokens
    (number, residual stream) of each device afterwards."""
    devices, hosts, top_k = step.layout.devices, step.costs.hosts, ids.shape[1]
    moe = step.model.moe_block().moe
    g = torch.Generator().manual_seed(0)
    gate_up = torch.randn(EXPERTS, 2, 12, HIDDEN, generator=g) / 4
    down = torch.randn(EXPERTS, HIDDEN, 12, generator=g) / 4
    router = RouterWeights(1e-6, torch.linspace(0.5, 1.5, HIDDEN), torch.zeros(EXPERTS, HIDDEN), None, None)
    gates = torch.linspace(1.0, 0.3, top_k).expand(len(ids), -1)
    packed, sent = [], []
    for rank, (number, x) in enumerate(here):
        table = ep.serving(plan, hosts, EXPERTS, rank, x.device)
        own = torch.from_numpy(ids)[number].long()
        home = rank if moe.zero_experts else None
        rows, counts = coherent.pack(x, own, gates[number], number, table, coherent.phases(number), home)
        assert rows.shape[1] == HIDDEN * 4 + 8 * top_k + NUMBER_BYTES
        packed.append(rows.split(counts.tolist()))
        sent.append(counts.tolist())
    came = [
        coherent.receive(torch.cat([packed[q][rank] for q in range(devices)]), router, moe, rank, devices)
        for rank in range(devices)
    ]
    outputs = []
    for rank, got in enumerate(came):
        held = list(plan.slots[rank])
        y = expert_ffn(got.normed, gate_up[held], down[held], got.ids, got.weights, activation="silu")
        outputs.append((y, y[got.away].split(got.counts[0].tolist())))
    partial = [got.counts[0].tolist() for got in came]
    assert [got.counts[1].tolist() for got in came] == np.transpose(partial).tolist()  # those who wait know it
    after = []
    for rank, got in enumerate(came):
        arrived = torch.cat([outputs[q][1][rank] for q in range(devices)])
        after.append((got.number, coherent.combine(outputs[rank][0], arrived, got)))
    before = torch.empty(len(ids), HIDDEN)
    for number, x in here:
        before[number] = x
    normed = rms_norm(before, router.norm, router.eps)
    y = expert_ffn(normed, gate_up, down, torch.from_numpy(ids).long(), gates, activation="silu")
    y += (gates * torch.from_numpy(ids < 0)).sum(1, keepdim=True) * normed
    for number, x in after:
        torch.testing.assert_close(x, (before + y)[number], rtol=1e-4, atol=1e-5)
        assert (number[1:] > number[:-1]).all()
    return np.array(sent), np.array(partial), after


@settings(max_examples=60)
@given(steps())
def test_what_moves_is_what_the_planner_counts_and_adds_up_to_the_layer(case):
    step, plans = case
    bounds = np.cumsum([0, *step.layout.tokens])
    x = torch.randn(int(bounds[-1]), HIDDEN)
    here = [(torch.arange(a, b), x[a:b]) for a, b in pairwise(bounds.tolist())]
    walk = Walk.of(step.costs, step.blocks, step.layout, step.routing.by_layer, plans)
    for (layer, moved), plan, ids in zip(walk.layers, plans, step.routing.by_layer, strict=True):
        assert layer.tokens.tolist() == [len(number) for number, _ in here]
        alone = [np.flatnonzero(np.diff(number.numpy(), prepend=-2) != 1).size for number, _ in here]
        assert layer.layout.stretches.tolist() == alone
        sent, partial, here = executed(step, plan, ids, here)
        off = ~np.eye(len(sent), dtype=bool)
        assert (moved.rows.sizes(0) == sent * off).all()
        assert moved.received[0].tolist() == sent.sum(0).tolist()
        assert (moved.partial.sizes(0) == partial).all()
        assert moved.after.tokens.tolist() == [len(number) for number, _ in here]


@settings(max_examples=40)
@given(st.one_of(steps(), steps(dense=1, shared=32)))
def test_the_closed_form_is_the_simulation(case):
    step, plans = case
    graph = Graph(step.costs, range(step.layout.devices), [0.0] * step.layout.devices)
    for layer, stages in step.pieces(plans):
        graph.add(stages, 0, layer)
    makespan = simulate(graph.operations).makespan
    assert step.seconds(plans) == pytest.approx(makespan, rel=1e-9)
    predicted = step.predict(plans, len(step.model.layers), [1 << 40] * step.layout.devices)
    assert predicted.step_seconds == pytest.approx(makespan, rel=1e-9)
    assert sum(sum(layer.parts.values()) for layer in predicted.layers) <= makespan * (1 + 1e-9)


def test_a_step_by_hand():
    """Two devices, one token each, one layer, top-1: both tokens go to device 1, and home again."""
    model = tiny_model(layers=1, experts=2, top_k=1)
    workload = Workload.from_text("decode:2@64")
    costs = Costs(cluster(model, ((1.0, 0.5),)), model, "f32")
    ids = np.array([[[1]], [[1]]])
    step = Step(costs, model, Layout.of(workload, 1, (1, 1)), Routing(ids, np.ones(ids.shape, np.float32)))
    plan = LayerPlan(strategy="coherent", slots=((0,), (1,)))
    block = model.layers[0]
    shape = exchange_shape(block, 2)

    def read(device, operator, shape, **at):
        return costs.cluster.operator(device, operator, shape, "f32", "tiny").at(**at).seconds

    def exchange(collective, size):
        return costs.cluster.collective(collective, (0, 1)).curve.at(bytes=size).seconds

    def one_way(size):
        return costs.all_to_all((0, 1), Traffic.of(np.array([size], float))).seconds.max()

    def begin(device):
        return sum(
            (
                read(device, "embed", {"hidden": 64, "vocabulary": 256}, tokens=1),
                read(device, "attention_decode", attention_shape(block), sequences=1, context=64),
                read(device, "route", {"hidden": 64, "experts": 2, "top_k": 1}, tokens=1),
                read(device, "coherent_pack", shape, tokens=1),
            )
        )

    row = row_bytes(block, 4) + NUMBER_BYTES
    expected = max(map(begin, (0, 1))) + exchange("all_to_all", 8) + one_way([[0, row], [0, 0]])
    expected += read(1, "coherent_unpack", shape, tokens=2)
    expected += read(1, "expert_ffn", expert_shape(block), ffn=128, experts=1, tokens=2)
    expected += read(1, "coherent_combine", shape, tokens=2) + read(1, "coherent_home", shape, tokens=1.5)
    expected += exchange("all_to_all", 16) + one_way([[0, 0], [64 * 4 + NUMBER_BYTES, 0]])
    expected += read(1, "coherent_cache", cache_shape(block, 2), tokens=2)
    expected += exchange("all_gather", cache_row_bytes(block, 4))
    expected += read(1, "head", {"hidden": 64, "vocabulary": 256}, tokens=1)
    assert step.seconds([plan]) == pytest.approx(expected)


def test_every_device_keeps_the_keys_of_all_sequences():
    model = tiny_model(layers=3)
    workload = Workload.from_text("decode:16@100")
    costs = Costs(cluster(model), model, "f32")
    step = Step(costs, model, Layout.of(workload, 1, (4, 4, 4, 4)), draw_routing(None, model, workload, 0))
    slots = ((0, 1), (2, 3), (4, 5), (6, 7))
    kept, usual = (
        step.memory([LayerPlan(strategy=name, slots=slots)] * 3, 3, [10**9] * 4) for name in ("coherent", "ep")
    )
    assert {m.cache for m in kept} == {3 * 16 * 101 * 2 * 4 * 16 * 4} == {4 * usual[0].cache}
    assert [m.weights for m in kept] == [m.weights for m in usual]
    assert all(m.activations > 0 for m in kept)


@pytest.mark.parametrize(
    ("workload", "tensor", "second", "message"),
    [
        ("decode:4", 1, "ep", "layers are coherent and ep: all must be coherent, or none"),
        ("prefill:4@2", 1, "coherent", "coherent layers need a decode workload: one new token of each sequence"),
        ("decode:4", 2, "coherent", "coherent layers need tensor 1, got 2"),
    ],
)
def test_plans_that_cannot_be_coherent_are_refused(workload, tensor, second, message):
    slots = ((0, 1, 2, 3), (4, 5, 6, 7))
    layers = [LayerPlan(strategy="coherent", slots=slots), LayerPlan(strategy=second, slots=slots)]
    with pytest.raises((DocumentError, ValueError), match=message):
        hand_made_plan(tiny_model(layers=2), workload, layers, tokens=(2, 2), tensor=tensor)
