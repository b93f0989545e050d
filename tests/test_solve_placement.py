"""``solve`` with a placement of the user's own: kept exactly, predicted, and refused where it cannot be kept."""

import functools

import numpy as np
import pytest
from rich.console import Console

from moeplan.planner.costs import Costs
from moeplan.planner.place.layers import layer_plan
from moeplan.planner.search import USABLE, solve
from moeplan.planner.splits import layouts
from moeplan.planner.step import Step
from moeplan.planner.units import bytes_text
from moeplan.service.pages.plan import verdict
from moeplan.spec import MoeplanError, Plan, Workload
from moeplan.spec.errors import InfeasibleError
from moeplan.spec.placement import Placement, PlacementLayer
from moeplan.spec.routing import draw_routing
from moeplan.tests.exports import placement_of
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

MODEL, PREFILL = tiny_model(layers=2), Workload.from_text("prefill:256@32")
MACHINES = cluster(MODEL, ((1.0, 1.0), (0.5, 0.5)))
SLOTS = ((0, 1, 2, 3), (3, 0, 7, 4), (0, 5, 6), (2,))
SHARES = ((0.2, 1.0, 0.5, 0.9), (0.1, 0.3, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5,))
COPIES = PlacementLayer(slots=SLOTS, shares=SHARES)
PLAIN = PlacementLayer(slots=((5,), (0, 7, 3, 1), (), (6, 2, 4)))


def own(*layers: PlacementLayer, hosts: int = 2, **fields: object) -> Placement:
    return placement_of(layers or (COPIES, PLAIN), 8, hosts, **fields)


@functools.cache
def solved(**options) -> Plan:
    return solve(MODEL, MACHINES, PREFILL, random_trace(0, 2, 8), placement=own(), placement_path="p.json", **options)


def test_every_layer_keeps_to_the_placement():
    plan = solved()
    assert [(layer.strategy, layer.slots, layer.shares) for layer in plan.layers] == [
        ("ep", COPIES.slots, COPIES.shares),
        ("ep", PLAIN.slots, None),
    ]
    assert plan.degrees.expert == 4
    assert plan.solver.status == "optimal"
    layouts = {c.tokens: c.step_seconds for c in plan.candidates if c.name.startswith("all ep")}
    assert len(layouts) > 1
    assert plan.predicted.step_seconds == min(layouts.values())
    step = Step.of(plan, MACHINES, random_trace(0, 2, 8))
    assert step.seconds(list(plan.layers)) == pytest.approx(plan.predicted.step_seconds)
    assert list(step.memory(plan.layers, 2, [d.memory_bytes for d in plan.devices])) == list(plan.predicted.memory)
    assert Plan.parse(plan.to_json(), "plan") == plan


def test_it_runs_hierarchical_where_that_is_asked_for():
    plan = solved(strategy="hierarchical")
    assert [(layer.strategy, layer.slots, layer.shares) for layer in plan.layers] == [
        ("hierarchical", COPIES.slots, COPIES.shares),
        ("hierarchical", PLAIN.slots, None),
    ]
    assert "hierarchical as p.json places its experts" in plan.solver.space


def test_the_plan_says_that_it_was_given():
    plan = solved()
    (record,) = plan.placements
    assert (record.method, record.layers) == ("given", (0, 1))
    assert record.solver == "given in p.json"
    assert any(note.startswith("the placement was given (p.json)") for note in plan.notes)
    assert "ep as p.json places its experts" in plan.solver.space
    assert plan.digests["placement"] == own().digest()
    assert plan.baselines.keys() == {"linear ep", "greedy ep"}
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(verdict(plan))
    assert "p.json" in console.export_text()


def test_a_baseline_that_is_faster_is_not_taken():
    """Everything on one slow device: whoever asks for that gets it, and sees what it costs."""
    everything = PlacementLayer(slots=((), (), (), tuple(range(8))))
    plan = solve(MODEL, MACHINES, PREFILL, placement=own(everything, everything))
    assert {layer.slots for layer in plan.layers} == {everything.slots}
    assert plan.solver.objective > plan.baselines["linear ep"]


def test_copies_without_shares_take_even_ones():
    plan = solve(MODEL, MACHINES, PREFILL, placement=own(PlacementLayer(slots=SLOTS), PLAIN))
    shares = {
        expert: share
        for held, taken in zip(SLOTS, plan.layers[0].shares, strict=True)
        for expert, share in zip(held, taken, strict=True)
    }
    assert shares == {0: 1 / 3, 1: 1, 2: 1 / 2, 3: 1 / 2, 4: 1, 5: 1, 6: 1, 7: 1}


def test_a_plan_without_records_is_read():
    body = solved().model_dump(mode="json")
    del body["placements"]
    assert Plan.model_validate(body).placements == ()


@pytest.mark.parametrize(
    ("placement", "options", "named"),
    [
        (own(COPIES), {}, r"p\.json: places 1 layers x 8 experts; tiny has 2 x 8: name its --model"),
        (
            placement_of([[[0, 1], [2], [3], [4]]] * 2, 5, 2, model="other"),
            {},
            r"2 layers x 5 experts \(made for other\)",
        ),
        (
            placement_of([[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2, 8, 2),
            {},
            r"is for 2 devices, the cluster has 4.*--devices 4",
        ),
        (own(hosts=1), {}, r"on hosts as 0-3, the cluster's as 0-1 \| 2-3: .*--hosts 2"),
        (own(hosts=4), {}, r"on hosts as 0 \| 1 \| 2 \| 3, the cluster's as 0-1 \| 2-3"),
        (own(), {"strategy": "sharded"}, "--placement does not go with --strategy sharded"),
        (own(), {"strategy": "magic"}, "strategy 'magic': expected one of"),
    ],
)
def test_a_placement_for_something_else_is_refused_in_one_line(placement, options, named):
    with pytest.raises(MoeplanError, match=named) as error:
        solve(MODEL, MACHINES, PREFILL, placement=placement, placement_path="p.json", **options)
    assert "\n" not in str(error.value)


def test_hosts_in_another_order_are_told_apart():
    swapped = own()
    devices = tuple(swapped.devices[d].model_copy(update={"host": "ab"[d % 2]}) for d in range(4))
    with pytest.raises(MoeplanError, match=r"on hosts as 0 2 \| 1 3, the cluster's as 0-1 \| 2-3"):
        solve(MODEL, MACHINES, PREFILL, placement=swapped.model_copy(update={"devices": devices}))
    renamed = tuple(swapped.devices[d].model_copy(update={"host": "zzyy"[d]}) for d in range(4))
    assert solve(MODEL, MACHINES, PREFILL, placement=swapped.model_copy(update={"devices": renamed})).layers


@pytest.mark.parametrize("limited", [True, False])
def test_what_a_placement_lacks_in_memory_is_said(limited):
    """In the layout that lacks least, whether the limit is given or the device's own."""
    costs, routing = Costs(MACHINES, MODEL, "f32"), draw_routing(None, MODEL, PREFILL, 0)
    plans = [layer_plan(layer) for layer in own().layers]
    totals = [
        np.array([m.total for m in Step(costs, MODEL, layout, routing).memory(plans, 2, [0] * 4)])
        for layout in layouts(costs, MODEL, PREFILL, routing, False).values()
    ]
    limit = int(min(map(min, totals))) + 10
    lacks = min((np.maximum(total - limit, 0) for total in totals), key=np.sum)
    machines = MACHINES if limited else cluster(MODEL, ((1.0, 1.0), (0.5, 0.5)), memory=limit / USABLE + 1)
    options = {"memory_bytes": limit} if limited else {}
    with pytest.raises(InfeasibleError) as error:
        solve(MODEL, machines, PREFILL, placement=own(), placement_path="p.json", **options)
    said = str(error.value)
    assert said.startswith("p.json: ")
    for device, lack in enumerate(lacks):
        assert (f"device {device} lacks {bytes_text(int(lack))}" in said) == (lack > 0)
    assert "fewer --slots" in said
    assert "\n" not in said


def test_a_strategy_of_its_own_is_allowed():
    assert solved(strategy="ep").layers == solved().layers
