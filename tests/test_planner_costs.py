"""Curves read in bulk, and bytes between devices turned into seconds."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.costs import Costs
from moeplan.planner.curves import Table
from moeplan.planner.flows import FlowModel
from moeplan.planner.traffic import Traffic
from moeplan.spec.curve import Axis, Curve
from moeplan.spec.errors import MissingCurveError
from moeplan.spec.workload import Workload
from moeplan.tests.synthetic import CALL, LATENCY, SIZES, cluster, tiny_model

ALL = (0, 1, 2, 3)
MODEL = tiny_model()
CLUSTER = cluster(MODEL)


def traffic(sizes):
    """One exchange of [source, target] bytes."""
    return Traffic.of(np.array([sizes]))


@pytest.fixture
def costs():
    return Costs(CLUSTER, MODEL, "f32")


@st.composite
def curves(draw):
    axes = []
    for name in draw(st.sampled_from(["a", "ab", "abc"])):
        values = sorted(draw(st.sets(st.integers(1, 50), min_size=1, max_size=3)))
        axes.append(Axis(name=name, values=tuple(values), beyond=draw(st.sampled_from(["linear", "flagged"]))))
    size = int(np.prod([len(axis.values) for axis in axes]))
    median = draw(st.lists(st.floats(0, 10), min_size=size, max_size=size))
    return Curve(axes=tuple(axes), median=tuple(median), spread=(0.0,) * size)


@given(curves(), st.data())
@settings(deadline=None)
def test_a_table_reads_what_the_curve_says(curve, data):
    count = data.draw(st.integers(1, 4))
    number = st.one_of(st.floats(-1, 80), st.integers(0, 60).map(float))
    points = {axis.name: data.draw(st.lists(number, min_size=count, max_size=count)) for axis in curve.axes}
    seconds, beyond = Table(curve).read(**points)
    for i in range(count):
        reading = curve.at(**{name: values[i] for name, values in points.items()})
        assert seconds[i] == pytest.approx(reading.seconds, abs=1e-12)
        assert beyond[i] == reading.extrapolated


@pytest.mark.parametrize("size", [1024, 5000, 65536, 1_000_000, 1 << 24])
@pytest.mark.parametrize("name", ["all_to_all", "all_gather", "reduce_scatter"])
def test_equal_traffic_costs_what_was_measured(costs, name, size):
    measured = CLUSTER.collective(name, ALL).curve.at(bytes=size).seconds
    exchange = (
        costs.all_to_all(ALL, traffic(np.full((4, 4), size)))
        if name == "all_to_all"
        else getattr(costs, name)(ALL, np.full((1, 4), size))
    )
    assert exchange.seconds[0] == pytest.approx([measured] * 4, rel=1e-6)
    assert not str(costs.beyond)


def test_a_devices_own_share_is_free(costs):
    sizes = np.full((4, 4), 65536.0)
    more = sizes + np.diag([1e9] * 4)
    assert (costs.all_to_all(ALL, traffic(more)).seconds == costs.all_to_all(ALL, traffic(sizes)).seconds).all()


def test_skew_over_the_uplink_takes_as_long_as_the_uplink_needs():
    """All bytes go from host 0 to host 1: the flow time is bytes / uplink, the calibration the equal exchange's."""
    flow = FlowModel(CLUSTER, ALL)
    sizes = np.zeros((4, 4))
    sizes[0, 2] = sizes[1, 3] = 8e6
    seconds = flow.seconds(traffic(sizes))
    assert seconds[0] == pytest.approx([LATENCY + 16e6 / 1e9] * 4)
    # An equal exchange sends 4 s over each uplink.
    assert flow.equal_size(seconds.max(1)) == pytest.approx([4e6], rel=1e-6)


def test_only_those_with_traffic_wait_for_it(costs):
    sizes = np.zeros((4, 4))
    sizes[0, 1] = 4e6
    seconds = costs.all_to_all(ALL, traffic(sizes)).seconds[0]
    assert seconds[0] == seconds[1] > 10 * seconds[2]
    assert seconds[2] == seconds[3] == pytest.approx(CALL + LATENCY + 4 * 1024 / 1e9)


def test_uneven_all_gather_and_reduce_scatter_are_each_others_mirror(costs):
    own = np.array([[4e6, 0.0, 0.0, 0.0]])
    gather, scatter = costs.all_gather(ALL, own), costs.reduce_scatter(ALL, own)
    assert (gather.traffic.sizes(0) == scatter.traffic.sizes(0).T).all()
    assert gather.traffic.sizes(0)[0].tolist() == [0, 4e6, 4e6, 4e6]
    # Both copies for the other host cross the uplink, one by one.
    assert gather.seconds.max() == pytest.approx(CALL + LATENCY + 8e6 / 1e9, rel=0.02)


@given(st.lists(st.floats(0, 1e7), min_size=16, max_size=16), st.integers(0, 15), st.floats(1, 1e7))
@settings(deadline=None, max_examples=50)
def test_more_bytes_never_take_less(sizes, at, more):
    costs = Costs(CLUSTER, MODEL, "f32")
    matrix = np.array(sizes).reshape(4, 4)
    grown = matrix.copy()
    grown[at // 4, at % 4] += more
    before, after = (costs.all_to_all(ALL, traffic(sizes)).seconds.max() for sizes in (matrix, grown))
    assert after >= before * (1 - 1e-9)


@given(st.lists(st.floats(0, 1e7), min_size=16, max_size=16))
@settings(deadline=None, max_examples=50)
def test_a_collective_alone_never_exceeds_a_capacity(sizes):
    costs = Costs(CLUSTER, MODEL, "f32")
    exchange = costs.all_to_all(ALL, traffic(np.array(sizes).reshape(4, 4)))
    used = {}
    for demands in costs.demands(exchange, 0, range(len(exchange.group))):
        for resource, fraction in demands.items():
            used[resource] = used.get(resource, 0.0) + fraction
    assert max(used.values(), default=0.0) <= 1 + 1e-9


def test_what_lies_beyond_the_measured_range_is_noted(costs):
    costs.all_to_all(ALL, traffic(np.full((4, 4), 1e9)))
    costs.expert_ffn(MODEL.moe_block(), 128, np.array([9000]), 2)
    measured = f"(measured to {SIZES[-1]:,.0f})"
    assert str(costs.beyond) == (
        f"all_to_all over devices [0, 1, 2, 3] at bytes 1,000,000,000 {measured}; "
        "expert_ffn at tokens 9,000 (measured to 4,096)"
    )
    (note,) = costs.beyond.notes(MODEL, "its path", Workload.from_text("prefill:512"), "bf16")
    assert note.startswith("extrapolated: all_to_all over ")
    assert "`moeplan profile --model 'its path' --dtype bf16 --workload prefill:512@128` on the same devices" in note


def test_equal_rows_per_expert_read_the_curve_itself(costs):
    block = MODEL.moe_block()
    curve = CLUSTER.kinds[0].operators
    entry = next(c.curve for c in curve if c.operator == "expert_ffn")
    counts = np.array([30, 0, 30, 30, 0])
    assert float(costs.expert_ffn(block, 100, counts, 0)) == pytest.approx(
        entry.at(ffn=100, experts=3, tokens=30).seconds
    )


def test_unequal_rows_are_the_mean_over_active_experts(costs):
    block = MODEL.moe_block()
    entry = next(c.curve for c in CLUSTER.kinds[0].operators if c.operator == "expert_ffn")
    parts = [entry.at(ffn=128, experts=2, tokens=n).seconds for n in (10, 500)]
    assert float(costs.expert_ffn(block, 128, np.array([10, 500, 0]), 0)) == pytest.approx(sum(parts) / 2)
    several = costs.expert_ffn(block, np.array([0, 64, 128]), np.tile([10, 500, 0], (3, 1)), 0)
    assert several[0] == 0.0
    assert several[2] == pytest.approx(sum(parts) / 2)


def test_a_group_of_one_communicates_for_free(costs):
    assert costs.all_to_all((2,), traffic(np.ones((1, 1)))).seconds.tolist() == [[0.0]]


def test_a_missing_curve_says_how_to_measure_it():
    with pytest.raises(MissingCurveError, match=r"moeplan profile --model tiny --dtype bf16"):
        Costs(CLUSTER, MODEL, "bf16").operator("route", {"hidden": 64, "experts": 8, "top_k": 2}, tokens=1)
    with pytest.raises(MissingCurveError, match=r"no all_to_all curve for devices \[0, 1, 3\]"):
        Costs(CLUSTER, MODEL, "f32").all_to_all((0, 1, 3), traffic(np.ones((3, 3))))
