"""A real profile of two local ranks, small but whole."""

import time
from itertools import product

import pytest

from moeplan.profiler import merge, profile
from moeplan.profiler.tasks import LEVELS, OFFLOAD, tasks
from moeplan.runtime.launch import LocalLauncher
from moeplan.spec import Cluster, Model
from moeplan.spec.curve import Curve
from moeplan.spec.model import Attention, Block, Moe
from moeplan.spec.operators import COLLECTIVES, OF_FAMILIES, OPERATORS
from moeplan.spec.workload import Workload

BUDGET = 12.0


def tiny() -> Model:
    """One layer of every kind of operator but small; the shared expert stands for dense layers too."""
    block = Block(
        count=4,
        hidden_size=256,
        attention=Attention(heads=8, kv_heads=4, head_dim=32),
        moe=Moe(num_experts=8, top_k=2, ffn_size=512, shared_ffn_size=256),
    )
    return Model(name="tiny", family="test", vocab_size=512, blocks=(block,), dtype="f32")


@pytest.fixture(scope="module")
def measured() -> tuple[Cluster, float, list[dict]]:
    events: list[dict] = []
    start = time.monotonic()
    cluster = profile(LocalLauncher(2), [tiny()], budget_seconds=BUDGET, accept_noise=True, on_event=events.append)
    return cluster, time.monotonic() - start, events


def test_a_single_device_has_operators_and_nothing_to_exchange():
    asked = [Workload.from_text("prefill:96@48"), Workload.from_text("decode:3@70")]
    cluster = profile(LocalLauncher(1), [tiny()], budget_seconds=5.0, accept_noise=True, workloads=asked)
    assert len(cluster.devices) == 1
    sizes = {entry.operator: {a.name: a.values for a in entry.curve.axes} for entry in cluster.kinds[0].operators}
    assert {1, 2} <= set(sizes["attention_prefill"]["sequences"])
    assert 48 in sizes["attention_prefill"]["length"]
    assert 3 in sizes["attention_decode"]["sequences"]
    assert 70 in sizes["attention_decode"]["context"]
    assert {3, 96} <= set(sizes["route"]["tokens"])
    assert cluster.link_classes == cluster.collectives == ()
    assert {entry.operator for entry in cluster.kinds[0].operators} == set(OPERATORS) - set(LEVELS) - set(
        OFFLOAD
    ) - set(OF_FAMILIES)


@pytest.fixture
def cluster(measured) -> Cluster:
    return measured[0]


def end(curve: Curve, which: int) -> dict[str, float]:
    return {axis.name: axis.values[which] for axis in curve.axes}


def test_it_ends_in_time_and_tells_its_progress(measured):
    cluster, seconds, events = measured
    assert cluster.provenance.seconds <= seconds < 60
    steps = [event for event in events if not event["what"].startswith("waiting for ")]
    assert [event["done"] for event in steps] == list(range(len(steps)))
    assert events[-1]["done"] == events[-1]["of"]
    assert all(event["what"] for event in events)


def test_every_operator_of_the_model_has_a_curve_on_every_device(cluster):
    needed = tasks([tiny()], ["f32"], "aa")
    assert {task.operator for task in needed} == set(OPERATORS) - set(LEVELS) - set(OFFLOAD) - set(OF_FAMILIES)
    for device, task in product((0, 1), needed):
        curve = cluster.operator(device, task.operator, task.shape, "f32", "tiny")
        assert min(curve.median) > 0
        assert curve.at(**{axis.name: 3 for axis in curve.axes}).seconds > 0
        assert len(cluster.kind_of(device).operators) == len(needed)


def test_much_more_work_takes_longer(cluster):
    for entry in cluster.kinds[0].operators:
        if entry.operator in ("expert_ffn", "attention_prefill"):  # the last point is over a hundred times the first
            first, last = entry.curve.median[0], entry.curve.median[-1]
            assert last > 1.5 * first, entry.operator


def test_both_ranks_took_the_same_decisions(cluster):
    for first, second in zip(*(cluster.kind_of(device).operators for device in (0, 1)), strict=True):
        assert first.curve.axes == second.curve.axes


def test_devices_and_links_are_sane(cluster):
    assert all(device.memory_bytes > 2**26 for device in cluster.devices)
    for kind in cluster.kinds:
        assert kind.type == "cpu"
        assert 2e8 < kind.stream_bandwidth < 2e12
    for link in (cluster.link(0, 1), cluster.link(1, 0)):
        assert 1e-7 < link.latency < 0.1
        size = link.curve.axes[0].values[-1]
        assert size >= 2**20
        assert 1e6 < size / link.curve.median[-1] < 1e12
    assert [host.uplink_out for host in cluster.hosts] == [None]


def test_collectives_are_measured_with_their_processor_time(cluster):
    for name in COLLECTIVES:
        entry = cluster.collective(name, (0, 1))
        assert end(entry.curve, 0) == {"bytes": 1024}
        assert min(entry.curve.median) > 0
        assert end(entry.curve, -1)["bytes"] >= 2**20
        assert 1e6 < end(entry.curve, -1)["bytes"] / entry.curve.median[-1] < 1e12
        assert 0 < entry.busy.median[-1] < 4 * entry.curve.median[-1]
        assert entry.busy.axes == entry.curve.axes
        # Whoever comes last waits for nobody, and lateness is no more than a part of the whole.
        assert entry.last.axes == entry.curve.axes
        assert all(0 < last <= whole for last, whole in zip(entry.last.median, entry.curve.median, strict=True))
    assert any(entry.traffic == "skewed" for entry in cluster.collectives)


def test_the_document_can_be_read_again_and_be_added_to(cluster):
    text = cluster.to_json()
    assert Cluster.parse(text, "cluster.json") == cluster
    assert cluster.provenance.models == ("tiny",)
    assert {"moeplan", "torch", "python"} <= set(cluster.provenance.versions)
    merged = merge(cluster, cluster)
    assert merged == cluster


def test_two_hosts_have_uplinks_and_a_rank_without_a_group_waits_for_the_others():
    launcher = LocalLauncher(3)
    for seat, host in zip(launcher.seats, "aab", strict=True):
        seat.host, seat.cpu_share = host, 1.0  # a full share keeps the pace quick although two ranks share a core
    cluster = profile(launcher, [tiny()], budget_seconds=1.0, accept_noise=True)
    assert [host.name for host in cluster.hosts] == ["a", "b"]
    for host in cluster.hosts:
        assert host.uplink_out is not None
        assert host.uplink_in is not None
        assert 1e6 < host.uplink_out < 1e12
        assert 1e6 < host.uplink_in < 1e12
    assert {entry.group for entry in cluster.collectives} == {(0, 1, 2), (0, 1)}
    assert cluster.link_counts().sum() == 6
    assert all(entry.shape["heads"] == 8 for entry in cluster.kind_of(2).operators if "heads" in entry.shape)
