"""Expected counts against counting one by one, and a search that uses them."""

import numpy as np
import pytest

from moeplan.planner import search
from moeplan.planner.choices import Choices
from moeplan.planner.costs import Costs
from moeplan.planner.expected import Expected
from moeplan.planner.layout import Layout
from moeplan.planner.step import Step
from moeplan.spec import MoeplanError, Plan, Workload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing, sample_routing
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=2)
WORKLOAD = Workload.from_text("prefill:16384@32")
HOSTS = np.repeat(np.arange(4), 2)
IDS = draw_routing(None, MODEL, WORKLOAD, 0).by_layer


def grouped(size):
    """Experts by number over groups of ``size`` of the 8 devices."""
    each = 8 // size
    return LayerPlan(
        strategy="ep", slots=tuple(tuple(range(d * each, (d + 1) * each)) for d in range(size)) * (8 // size)
    )


def near(expected, counted):
    """Within what independent draws vary by, and nothing where nothing is expected."""
    return (abs(expected - counted) <= 5 * np.sqrt(expected)).all()


@pytest.mark.parametrize("identity", [False, True], ids=["", "identity experts"])
@pytest.mark.parametrize("hosts", ["00112233", "00111122", "01010101", "00000000", "00000001"])
@pytest.mark.parametrize("sequences", [(64,) * 8, (100, 28, 64, 64, 10, 118, 64, 64)], ids=str)
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_expected_rows_are_those_of_the_tokens_on_average(size, sequences, hosts, identity):
    none = np.random.default_rng(0).random(IDS.shape) < 0.4  # a sixth of the tokens have no other choice
    ids = np.where(none, -1, IDS) if identity else IDS
    layout = Layout.of(WORKLOAD, 1, sequences)
    plans, of = [grouped(size)] * 2, np.array([int(host) for host in hosts])
    exact = Choices(ids, layout, of, 8).dispatch(plans)
    expected = Expected(ids, layout, of, 8).dispatch(plans)
    assert expected.computed.sum(1) == pytest.approx(exact.computed.sum(1))
    assert near(expected.computed, exact.computed)
    assert near(expected.kept, exact.kept)
    assert near(expected.rows.sent(), exact.rows.sent())
    for mine, others in zip(expected.rows.across(of), exact.rows.across(of), strict=True):
        assert near(mine, others)
    assert expected.experts.devices.sum((1, 2)) == pytest.approx(exact.experts.devices.sum((1, 2)))
    assert near(expected.experts.devices, exact.experts.devices)
    assert expected.rows.sent().sum() == pytest.approx(expected.rows.received().sum())


@pytest.mark.parametrize("speeds", [((1.0,) * 4,), ((1.0,) * 4,) * 2, ((1.0, 1.0), (1.0,) * 4, (1.0, 1.0))], ids=str)
@pytest.mark.parametrize("switches", [1, 2])
@pytest.mark.parametrize("size", [2, 4])
def test_expected_seconds_are_near_whatever_the_links(speeds, switches, size):
    """Where links inside hosts differ, the slowest counts: never much faster than token by token, nor twice as slow."""
    machines = cluster(MODEL, speeds, switches=switches, uplink=1e8, local=2e8)
    devices = len(machines.devices)
    layout = Layout.of(WORKLOAD, 1, (512 // devices,) * devices)
    plan = LayerPlan(strategy="ep", slots=grouped(size).slots[:devices])
    routings = draw_routing(None, MODEL, WORKLOAD, 0), sample_routing(None, MODEL, WORKLOAD, 0, 2**13)
    costs = Costs(machines, MODEL, "f32")
    exact, expected = (Step(costs, MODEL, layout, routing).seconds([plan] * 2) for routing in routings)
    assert 0.95 * exact < expected < 2 * exact
    if switches == 1:
        assert expected == pytest.approx(exact, rel=0.1)


def test_many_devices_on_scattered_hosts_are_refused():
    hosts = np.arange(512) % 2
    layout = Layout.of(WORKLOAD, 1, (1,) * 512)
    plan = LayerPlan(strategy="ep", slots=grouped(8).slots * 64)
    with pytest.raises(MoeplanError, match="for at most 256 devices on such hosts, not 512"):
        Expected(IDS, layout, hosts, 8).dispatch([plan] * 2)


def test_own_rows_and_totals():
    layout = Layout.of(WORKLOAD, 1, (100, 28, 64, 64, 10, 118, 64, 64))
    exact, expected = (kind(IDS, layout, HOSTS, 8) for kind in (Choices, Expected))
    assert expected.total == pytest.approx(exact.total)
    assert expected.own.devices.sum(2) == pytest.approx(exact.own.devices.sum(2))
    assert len(expected.own.counts[0]) == 5  # devices with equally many tokens are one


def test_uneven_copies_cannot_be_expected():
    uneven = LayerPlan(strategy="ep", slots=(tuple(range(8)), *(((0,),) * 7)))
    with pytest.raises(MoeplanError, match="give a step of fewer tokens"):
        Expected(IDS, Layout.of(WORKLOAD, 1, (64,) * 8), HOSTS, 8).dispatch([uneven] * 2)


def test_a_sample_keeps_whole_sequences():
    found = sample_routing(None, MODEL, WORKLOAD, 0, 2**13)
    assert found.expert_ids.shape == (2048, 2, 2)
    assert found.scale == 8
    assert found.counts(8).sum(1) == pytest.approx([2 * 16384] * 2)


def test_a_search_by_expectation_is_near_to_one_by_tokens_and_says_so(monkeypatch):
    machines = cluster(MODEL, ((1.0, 1.0), (0.5, 0.5)))
    exact = search.solve(MODEL, machines, WORKLOAD)
    monkeypatch.setattr(search, "MOST_CHOICES", 0)
    monkeypatch.setattr(search, "SAMPLED_CHOICES", 2**14)
    found = search.solve(MODEL, machines, WORKLOAD)
    assert found.solver.objective == pytest.approx(exact.solver.objective, rel=0.03)
    assert found.solver.bound <= found.solver.objective
    assert any(note.startswith("expected counts: ") for note in found.notes)
    assert not any(note.startswith("expected counts: ") for note in exact.notes)
    assert Plan.parse(found.to_json(), "plan") == found
