"""When ``hierarchical`` is among what a search chooses from, and what is said where it is not."""

import numpy as np
import pytest

from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.planner.traffic import Traffic
from moeplan.spec import Cluster, Workload
from moeplan.spec.errors import MissingCurveError, MoeplanError
from moeplan.spec.levels import across_groups, inside_groups
from moeplan.spec.operators import attention_shape, exchange_shape, expert_shape, levels_shape, row_bytes
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import Routing, draw_routing
from moeplan.tests.synthetic import cluster, tiny_model

PREFILL = Workload.from_text("prefill:256@32")
MODEL = tiny_model(layers=2)
TWO = ((1.0, 1.0), (1.0, 1.0))


def without(machines: Cluster, collective: tuple[int, ...] | None = None, operator: str = "") -> Cluster:
    """The cluster less the curves of groups of one shape, or of one operator."""
    kept = tuple(c for c in machines.collectives if c.members != collective)
    kinds = tuple(
        kind.model_copy(update={"operators": tuple(o for o in kind.operators if o.operator != operator)})
        for kind in machines.kinds
    )
    return Cluster.parse(machines.model_copy(update={"collectives": kept, "kinds": kinds}).to_json(), "cluster")


def searched(plan) -> set[str]:
    return {strategy for candidate in plan.candidates for strategy in candidate.strategies}


@pytest.mark.parametrize("speeds", [((1.0, 1.0),), ((1.0,), (1.0,))], ids=str)
def test_one_level_is_not_offered_and_says_so_only_if_asked(speeds):
    plan = solve(MODEL, cluster(MODEL, speeds), PREFILL)
    assert "hierarchical" not in searched(plan)
    assert not any("hierarchical" in note for note in plan.notes)
    with pytest.raises(
        MoeplanError, match="hierarchical is not offered without several hosts, one of them with several"
    ):
        solve(MODEL, cluster(MODEL, speeds), PREFILL, strategy="hierarchical")


@pytest.mark.parametrize(
    ("lack", "named"),
    [({"collective": (1, 1)}, r"all_to_all curve for devices \[0, 2\]"), ({"operator": "hierarchical_relay"}, "relay")],
    ids=str,
)
def test_a_profile_that_lacks_curves_is_searched_without_it_and_says_which(lack, named):
    machines = without(cluster(MODEL, TWO), **lack)
    plan = solve(MODEL, machines, PREFILL)
    assert "hierarchical" not in searched(plan)
    (note,) = [note for note in plan.notes if note.startswith("not searched: hierarchical, for want of curves")]
    assert "moeplan profile" in note
    with pytest.raises(MissingCurveError, match=named) as error:
        solve(MODEL, machines, PREFILL, strategy="hierarchical")
    assert "\n" not in str(error.value)


def test_expected_rows_are_not_foreseen(monkeypatch):
    monkeypatch.setattr("moeplan.planner.search.MOST_CHOICES", 64)
    monkeypatch.setattr("moeplan.planner.search.SAMPLED_CHOICES", 128)
    plan = solve(MODEL, cluster(MODEL, TWO), PREFILL)
    assert "hierarchical" not in searched(plan)
    assert any("not searched: hierarchical, for steps of so many tokens" in note for note in plan.notes)
    with pytest.raises(MoeplanError, match="not counted one by one: give a step of fewer tokens"):
        solve(MODEL, cluster(MODEL, TWO), PREFILL, strategy="hierarchical")


def test_only_degrees_that_span_hosts_are_searched():
    plan = solve(MODEL, cluster(MODEL, TWO), PREFILL, strategy="hierarchical")
    of = {c.degrees.expert for c in plan.candidates if set(c.strategies) == {"hierarchical"}}
    assert of == {4}
    assert "hierarchical (" in plan.solver.space
    assert {layer for record in plan.placements for layer in record.layers} == {0, 1}
    assert Step.of(plan, cluster(MODEL, TWO)).seconds(list(plan.layers)) == pytest.approx(plan.solver.objective)


@pytest.mark.parametrize(("top_k", "wins"), [(8, True), (1, False)])
def test_it_wins_over_a_thin_wire_where_tokens_need_several_devices_of_a_host(top_k, wins):
    """Each expert on one device: of top-8 every token needs all devices, of top-1 one, and there is nothing to save."""
    model = tiny_model(layers=2, top_k=top_k)
    costs = Costs(cluster(model, TWO, uplink=2e7), model, "f32")
    step = Step(costs, model, Layout.of(PREFILL, 1, (2, 2, 2, 2)), draw_routing(None, model, PREFILL, 0))
    linear = ((0, 1), (2, 3), (4, 5), (6, 7))
    ep, levels = (step.seconds([LayerPlan(strategy=s, slots=linear)] * 2) for s in ("ep", "hierarchical"))
    assert levels < 0.75 * ep if wins else ep < levels


def test_a_layer_by_hand():
    """One token on each device, each needing both devices of the other host: equal traffic, so every message is read
    from a measured curve as it is."""
    model = tiny_model(layers=1, experts=4, top_k=2)
    machines = cluster(model, TWO)
    workload = Workload.from_text("decode:4@64")
    ids = np.array([[[2, 3]], [[2, 3]], [[0, 1]], [[0, 1]]])
    routing = Routing(ids, np.ones(ids.shape, np.float32))
    step = Step(Costs(machines, model, "f32"), model, Layout.of(workload, 1, (1, 1, 1, 1)), routing)
    block, row, activation = model.layers[0], row_bytes(model.layers[0], 4), 64 * 4
    levels = levels_shape(block, 4, 2)

    def read(operator, shape, **at):
        return machines.operator(0, operator, shape, "f32", "tiny").at(**at).seconds

    def moved(group, size):
        return machines.collective("all_to_all", group).curve.at(bytes=size).seconds

    expected = read("attention_decode", attention_shape(block), sequences=1, context=64)
    expected += read("route", {"hidden": 64, "experts": 4, "top_k": 2}, tokens=1)
    expected += read("hierarchical_pack", levels, tokens=1) + moved((0, 1, 2, 3), 16)
    expected += moved((0, 2), row) + read("hierarchical_relay", levels, tokens=1) + moved((0, 1), row)
    expected += read("ep_unpack", exchange_shape(block, 4), tokens=2)
    expected += read("expert_ffn", expert_shape(block), ffn=128, experts=1, tokens=2)
    expected += moved((0, 1), activation) + read("hierarchical_add", levels, tokens=1) + moved((0, 2), activation)
    expected += read("hierarchical_combine", levels, tokens=1)
    plan = LayerPlan(strategy="hierarchical", slots=((0,), (1,), (2,), (3,)))
    assert step.cost(step.layer([0]), [plan]).seconds == pytest.approx([expected])


@pytest.mark.parametrize("uplink", [1e7, 1e9])
def test_groups_that_exchange_at_once_share_an_uplink(uplink):
    """One group's traffic alone takes less than the same in both; skew in one is felt in the other."""
    costs = Costs(cluster(MODEL, TWO, uplink=uplink), MODEL, "f32")
    across = across_groups(costs.hosts)
    both, one, hot = np.zeros((4, 4)), np.zeros((4, 4)), np.zeros((4, 4))
    for source, target in ((0, 2), (2, 0), (1, 3), (3, 1)):
        both[source, target] = 1e6
        one[source, target] = 1e6 if source % 2 == 0 else 0.0
        hot[source, target] = 1e6 if source % 2 else 4e6
    taken = {
        name: costs.all_to_all_in(across, Traffic.of(sizes[None])).seconds[0]
        for name, sizes in {"both": both, "one": one, "hot": hot}.items()
    }
    curve = costs.cluster.collective("all_to_all", (0, 2)).curve
    assert taken["both"] == pytest.approx([curve.at(bytes=1e6).seconds] * 4)
    if uplink == 1e7:
        assert taken["one"][0] < 0.6 * taken["both"][0]
        assert taken["hot"][1] > 2 * taken["both"][1]
    exchange = costs.all_to_all_in(across, Traffic.of(hot[None]))
    used = sum((wanted.get("uplink out 0", 0.0) for wanted in costs.demands(exchange, 0, range(4))), 0.0)
    assert used <= 1 + 1e-9
    assert exchange.waiting == across
    assert costs.all_to_all_in(inside_groups(costs.hosts), Traffic.of(np.ones((1, 4, 4)))).seconds.max() > 0
