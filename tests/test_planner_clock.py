"""The closed form against the event simulation, and the longest chains against their definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.clock import longest_chains, run
from moeplan.planner.costs import Costs
from moeplan.planner.graph import Graph
from moeplan.planner.layout import Layout
from moeplan.planner.simulator import simulate
from moeplan.planner.stages import Partition, exchange
from moeplan.planner.step import Step, build
from moeplan.spec import Workload
from moeplan.spec.plan import CHUNKED, LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.spec.shortcut import slots
from moeplan.tests.synthetic import cluster, shortcut_model, tiny_model

MODELS = {
    "plain": tiny_model(layers=2),
    "dense and shared": tiny_model(layers=2, dense=1, shared=32),
    "output": shortcut_model("output", shared=32),
    "mid": shortcut_model("mid", beside=True),
    "input": shortcut_model("input"),
}
FLEETS = {
    ((1.0,),): (1,),
    ((1.0, 0.5),): (1, 2),
    ((1.0, 0.5), (0.3, 1.0)): (1, 2),
    ((1.0, 1.0, 0.5, 0.2), (0.05, 1.0, 1.0, 1.0)): (1, 2, 4),
    ((1.0, 0.5, 0.1), (0.3, 1.0)): (1,),
    ((1.0,), (0.3, 0.1), (1.0, 0.7)): (1,),
}


@st.composite
def steps(draw):
    """A small step and a plan for each of its layers: any strategy, phase, tensor degree, uplink and division."""
    model = MODELS[draw(st.sampled_from(sorted(MODELS)))]
    speeds = draw(st.sampled_from(list(FLEETS)))
    shortcut = any(block.shortcut != "none" for block in model.blocks)
    tensor = 1 if shortcut else draw(st.sampled_from(FLEETS[speeds]))
    workload = Workload.from_text(draw(st.sampled_from(["prefill:512@32", "decode:16@512"])))
    devices = sum(map(len, speeds))
    groups = devices // tensor
    cuts = sorted(draw(st.lists(st.integers(0, workload.sequences), min_size=groups - 1, max_size=groups - 1)))
    sequences = tuple(np.diff([0, *cuts, workload.sequences]).tolist())
    machines = cluster(
        model,
        speeds,
        uplink=draw(st.sampled_from([1e7, 1e9, 1e11])),
        local=draw(st.sampled_from([1e8, 4e9])),
        busy=draw(st.sampled_from([0.0, 1.0, 30.0])),
        late=draw(st.sampled_from([0.0, 1e-5, 1e-3, 1.0])),
    )
    costs = Costs(machines, model, "f32")
    step = Step(costs, model, Layout.of(workload, tensor, sequences), draw_routing(None, model, workload, 0))
    return step, [draw(plans(devices, model.layers[i])) for i in model.moe_layers]


@st.composite
def plans(draw, devices, block):
    strategy = "ep"
    if block.shortcut == "none":
        strategy = draw(st.sampled_from(["ep", "hierarchical", "sharded", "gathered"]))
    if strategy == "sharded":
        cuts = sorted(draw(st.lists(st.integers(0, 128), min_size=devices - 1, max_size=devices - 1)))
        split = tuple(np.diff([0, *cuts, 128]).tolist())
        return LayerPlan(strategy="sharded", slots=((),) * devices, split=split, chunks=draw(st.integers(1, 4)))
    held = [set() for _ in range(devices)]
    for expert in range(8):
        copies = draw(st.sets(st.integers(0, devices - 1), min_size=1, max_size=1 if strategy == "gathered" else 3))
        for device in copies:
            held[device].add(expert)
    chunks = draw(st.integers(1, 4)) if strategy in CHUNKED else 1
    slot = draw(st.integers(0, slots(block) - 1))
    held = tuple(tuple(sorted(experts)) for experts in held)
    return LayerPlan(strategy=strategy, slots=held, chunks=chunks, slot=slot)


@given(steps())
@settings(deadline=None, max_examples=60)
def test_the_closed_form_is_the_simulation(case):
    step, chosen = case
    graph = Graph(step.costs, range(step.layout.devices), [0.0] * step.layout.devices)
    for layer, stages in step.pieces(chosen):
        graph.add(stages, 0, layer)
    timeline = simulate(graph.operations)
    assert step.seconds(chosen) == pytest.approx(timeline.makespan, rel=1e-9)
    predicted = step.predict(chosen, len(step.model.layers), [1 << 40] * step.layout.devices)
    expected = parts(graph, timeline.end)
    for layer in predicted.layers:
        for part, seconds in layer.parts.items():
            assert seconds == pytest.approx(expected.get((layer.layer, part), 0.0), rel=1e-9, abs=1e-12)


@given(steps(), st.integers(0, 2**20))
@settings(deadline=None, max_examples=60)
def test_a_layers_cost_says_when_it_ends_from_any_beginning(case, seed):
    step, chosen = case
    begin = np.random.default_rng(seed).uniform(0, 2e-3, (1, step.layout.devices))
    for i, plan in enumerate(step.by_layer(chosen)):
        layer, plans = step.layer([i]), None if plan is None else [plan]
        expected = run(step.costs, build(layer, plans), begin)
        assert step.cost(layer, plans).after(step.costs, begin) == pytest.approx(expected, rel=1e-9)


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), min_size=1, max_size=4), st.data())
def test_who_comes_last_but_one(groups, data):
    """groups: when each member comes; their devices are shuffled where groups need not be consecutive."""
    count = sum(map(len, groups))
    order = data.draw(st.permutations(range(count))) if data.draw(st.booleans()) else list(range(count))
    members = np.split(np.array(order), np.cumsum([len(group) for group in groups])[:-1])
    now = np.zeros((1, count))
    for group, times in zip(members, groups, strict=True):
        now[0, group] = times
    found = Partition.apart([tuple(group.tolist()) for group in members]).together(now)
    for group, times in zip(members, groups, strict=True):
        expected = sorted(times)[-2] if len(times) > 1 else -np.inf
        assert (found[0, group] == expected).all()


def test_lateness_counts_among_those_who_come_together():
    """Devices that come together wait for the latest of them; one that comes long after all others for nobody."""
    model = tiny_model(layers=1)
    for late in (0.0, 1e-3):
        costs = Costs(cluster(model, ((1.0, 1.0, 1.0),), late=late), model, "f32")
        stage = exchange("dispatch", "all_reduce", [costs.all_reduce((0, 1, 2), 1e4)])
        ends = run(costs, [stage], np.array([[0.0, 0.0, 0.0], [0.0, 0.0, 4e-4], [0.0, 0.0, 5e-3]]))
        assert ends - stage.seconds == pytest.approx(np.array([[late] * 3, [max(late, 4e-4)] * 3, [5e-3] * 3]))


@given(steps())
@settings(deadline=None, max_examples=60)
def test_longest_chains_are_those_of_the_operations(case):
    step, chosen = case
    devices = step.layout.devices
    for i, plan in enumerate(step.by_layer(chosen)):
        stages = build(step.layer([i]), None if plan is None else [plan])
        chains = longest_chains(stages, 1, devices)
        graph = Graph(step.costs, range(devices), [0.0] * devices)
        graph.add(stages, 0, i)
        for origin in range(devices):
            expected = longest_from(graph, origin)
            begin = np.full((1, devices), -np.inf)
            begin[0, origin] = 0.0
            assert chains.ends(begin)[0] == pytest.approx(expected, rel=1e-9)


def longest_from(graph, origin):
    """Seconds of the longest chain of operations from one device's beginning to each device's end."""
    end = [-np.inf] * len(graph.operations)
    for i, op in enumerate(graph.operations):
        if i == graph.chains[origin][0]:
            end[i] = 0.0
        elif op.after:
            end[i] = max(end[j] for j in op.after) + op.seconds
    return [end[graph.chains[device][-1]] for device in range(len(graph.chains))]


def parts(graph, ends):
    """Seconds of each (layer, part), mean over devices, by the end of every operation.

    A device's time between the end of one operation and the end of the next belongs to the next, so that waiting
    counts in the part that waits.
    """
    total = {}
    for chain in graph.chains.values():
        before = 0.0
        for i in chain:
            op = graph.operations[i]
            key = op.layer, op.part
            total[key] = total.get(key, 0.0) + (ends[i] - before) / len(graph.chains)
            before = ends[i]
    return {key: seconds for key, seconds in total.items() if seconds > 0}
