"""The order of a hierarchical layer's chunks, chosen for every layer: against every order, each simulated by itself."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.budget import Budget
from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.options import Classes
from moeplan.planner.ordering import fastest_orders, in_order
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.service.pages.plan import layers_text
from moeplan.spec import Plan, Workload
from moeplan.spec.chunk_order import calls, check_order, led, orders
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing
from moeplan.tests.plans import even_slots
from moeplan.tests.synthetic import cluster, tiny_model
from moeplan.tests.yardsticks.chunk_order import every_order

PROMPTS = Workload.from_text("prefill:2048@64")
LIMIT = 250.0  # seconds that no search here needs


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_of_few_chunks_every_order_is_offered(count):
    offered = [calls(count, order) for order in orders(count)]
    assert offered[0] == calls(count)
    assert len(set(offered)) == len(offered)
    assert set(offered) == set(every_order(count))


@pytest.mark.parametrize("count", [5, 8, 64])
def test_of_many_chunks_some_are_and_all_of_them_can_be_made(count):
    assert 10 <= len(orders(count)) <= count * (count + 3) // 2 + 2
    for order in orders(count):
        check_order(order, count)
    assert led(count, 0, 0) == ("relay", "experts", "add") * count


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chunks": 1}, "order belongs to layers in two chunks or more"),
        ({"order": ("relay", "experts", "add")}, "expected relay, experts and add 2 times each"),
        ({"order": ("relay", "experts", "add") * 3}, "expected relay, experts and add 2 times each"),
        ({"order": ("relay", "add", "experts", "relay", "experts", "add")}, "a chunk is relayed before its experts"),
        ({"order": ("relay", "wait")}, "'relay', 'experts' or 'add'"),
        ({"strategy": "ep"}, "order belongs to strategy hierarchical, not ep"),
    ],
)
def test_orders_that_cannot_be_made_are_refused(changes, said):
    given = {"strategy": "hierarchical", "slots": ((0,),), "chunks": 2, "order": led(2, 0, 0)} | changes
    with pytest.raises(ValueError, match=re.escape(said)):
        LayerPlan(**given)


def step_of(seed: int, layers: int, uplink: float, local: float, busy: float, fast: float) -> Step:
    """Layers whose tokens choose experts by laws of their own, from nearly even to all the same."""
    model, rng = tiny_model(layers=layers, hidden=256, ffn=512, top_k=2), np.random.default_rng(seed)
    machines = cluster(model, ((1.0, fast), (1.0, 1.0)), uplink=uplink, local=local, busy=busy)
    ids = []
    for _ in range(layers):
        popular = rng.random(8) ** rng.uniform(0, 12) + 1e-6
        noise = rng.gumbel(size=(PROMPTS.tokens, 8)) + np.log(popular)
        ids.append((-noise).argsort(1)[:, :2])
    chosen = np.stack(ids, axis=1)
    routing = Routing(chosen, np.full(chosen.shape, 0.5, np.float32))
    return Step(Costs(machines, model, "f32"), model, Layout.of(PROMPTS, 1, (8,) * 4), routing)


def alone(step: Step, ordinal: int, plan: LayerPlan) -> float:
    """Simulated seconds of one layer."""
    return float(step.cost(step.layer([step.model.moe_layers[ordinal]]), [plan]).seconds[0])


rates = st.sampled_from([1e8, 3e8, 1e9, 3e9])


@given(
    st.integers(0, 2**16), st.integers(2, 3), rates, rates, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1, 3])
)
@settings(max_examples=25, deadline=None)
def test_no_order_is_faster_for_any_layer(seed, count, uplink, local, busy, fast):
    step = step_of(seed, 2, uplink, local, busy, fast)
    plan = LayerPlan(strategy="hierarchical", slots=even_slots(8, 4), chunks=count)
    found = fastest_orders(step, [plan] * 2, [[0], [1]], Budget.of(LIMIT))
    for j in range(2):
        every = [alone(step, j, plan.model_copy(update={"order": order})) for order in orders(count)]
        assert found.seconds[j] == pytest.approx(min(every), rel=1e-7)
        chosen = plan.model_copy(update={"order": found.orders[j]})
        assert alone(step, j, chosen) == pytest.approx(min(every), rel=1e-7)


def test_of_four_chunks_none_of_462_is_faster():
    step = step_of(3, 1, 3e8, 1e9, 1.0, 2.0)
    plan = LayerPlan(strategy="hierarchical", slots=even_slots(8, 4), chunks=4)
    found = fastest_orders(step, [plan], [[0]], Budget.of(LIMIT))
    every = [alone(step, 0, plan.model_copy(update={"order": order})) for order in orders(4)]
    assert len(every) == 462
    assert found.seconds[0] == pytest.approx(min(every), rel=1e-7)


def test_layers_that_share_storage_have_one_order_the_best_for_both():
    step = step_of(5, 4, 3e8, 1e9, 0.5, 3.0)
    plan = LayerPlan(strategy="hierarchical", slots=even_slots(8, 4), chunks=2)
    classes = Classes.of(step.model.moe_layers, 2)
    assert classes.members == ((0, 2), (1, 3))
    found = fastest_orders(step, [plan] * 2, classes.members, Budget.of(LIMIT))
    for c, members in enumerate(classes.members):
        every = [sum(alone(step, j, plan.model_copy(update={"order": o})) for j in members) for o in orders(2)]
        assert found.seconds[c] == pytest.approx(min(every), rel=1e-7)
    planned = in_order(step, classes, (plan, plan), Budget.of(LIMIT))
    assert [calls(2, p.order) for p in planned] == [calls(2, order) for order in found.orders]


def test_without_time_the_order_is_the_usual_one():
    step = step_of(5, 2, 3e8, 1e9, 0.5, 3.0)
    plan = LayerPlan(strategy="hierarchical", slots=even_slots(8, 4), chunks=4)
    assert in_order(step, Classes.of(step.model.moe_layers, 2), (plan, plan), Budget.of(0.0)) == (plan, plan)


def test_a_search_gives_layers_their_own_orders():
    """Hosts of unequal speed, layers whose experts are chosen unequally."""
    model = tiny_model(layers=2, hidden=256, ffn=512, top_k=4)
    machines = cluster(model, ((1.0, 1.0), (2.0, 2.0)), uplink=3e9, local=4e9, busy=0.0)
    plan = solve(model, machines, Workload.from_text("prefill:4096@64"), strategy="hierarchical", time_limit=LIMIT)
    step = Step.of(plan, machines)
    assert step.seconds(plan.layers) == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert step.timeline(plan.layers).makespan == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert "in every layer's own order" in plan.solver.space
    usual = [layer.model_copy(update={"order": None}) for layer in plan.layers]
    assert plan.predicted.step_seconds < step.seconds(usual)
    own = sum(layer.order is not None for layer in plan.layers)
    assert own
    assert f"({own} in an order of their own)" in layers_text(plan.layers)
    assert Plan.parse(plan.to_json(), "plan") == plan
