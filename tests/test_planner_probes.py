"""Which points of a cluster's curves a plan takes along."""

import pytest

from moeplan.planner.probes import MOST_BYTES, probe_points
from moeplan.planner.search import solve
from moeplan.spec import Model, Plan, Workload
from moeplan.spec.load import Load
from moeplan.spec.model import Block, Moe
from moeplan.spec.operators import expert_shape
from moeplan.tests.synthetic import cluster
from moeplan.tests.test_profiler import tiny

FOREIGN = Load(seconds=75, foreign=0.25)


def test_one_point_for_each_limit_with_what_was_measured_there():
    measured = cluster(tiny(), ((1.0, 0.5),))
    compute, memory, exchange = probe_points(measured, tiny(), "f32")
    assert (compute.kind, memory.kind, exchange.kind) == ("compute", "memory", "exchange")
    assert compute.at["tokens"] >= 64 * memory.at["tokens"]
    shape = expert_shape(tiny().moe_block())
    for point in (compute, memory):
        curves = [measured.operator(device, "expert_ffn", shape, "f32", "tiny") for device in (0, 1)]
        assert all(value in axis.values for axis in curves[0].axes for value in [point.at[axis.name]])
        assert point.seconds == pytest.approx([curve.at(**point.at).seconds for curve in curves])
    assert exchange.operator == "all_to_all"
    assert exchange.seconds == (measured.collective("all_to_all", (0, 1)).curve.at(**exchange.at).seconds,) * 2


def test_a_probe_of_large_experts_stays_small():
    block = Block(hidden_size=4096, moe=Moe(num_experts=8, top_k=2, ffn_size=14336))
    large = Model(name="large", family="test", vocab_size=0, blocks=(block,), dtype="f32")
    compute, memory, _ = probe_points(cluster(large, ((1.0, 1.0),)), large, "f32")
    for point in (compute, memory):
        assert point.at["experts"] * point.at["ffn"] * 3 * 4096 * 4 <= max(MOST_BYTES, 14336 // 8 * 3 * 4096 * 4)


def test_a_single_device_exchanges_nothing():
    assert [point.kind for point in probe_points(cluster(tiny(), ((1.0,),)), tiny(), "f32")] == ["compute", "memory"]


def test_a_plan_takes_them_along_and_the_load_of_its_profile():
    measured = cluster(tiny(), ((1.0, 1.0),))
    provenance = measured.provenance.model_copy(update={"load": FOREIGN})
    plan = solve(tiny(), measured.model_copy(update={"provenance": provenance}), Workload.from_text("prefill:64"))
    assert plan.probes == probe_points(measured, tiny(), "f32")
    assert plan.profile_load == FOREIGN
    disturbed = "other programs used 25% of the cores while the cluster was measured; profile again on an idle machine"
    assert disturbed in plan.notes
    assert Plan.parse(plan.to_json(), "plan") == plan
    quiet = solve(tiny(), measured, Workload.from_text("prefill:64"))
    assert [known for known in plan.notes if known != disturbed] == list(quiet.notes)
    without = plan.model_dump(mode="json", exclude={"probes", "profile_load"})
    assert Plan.model_validate(without).probes == ()  # a plan of before
