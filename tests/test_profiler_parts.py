"""What the profiler decides without measuring: memory limits, flows, groups, tasks, merging."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moeplan.benchmarks.gpu import nvml_standin
from moeplan.profiler import merge, profile
from moeplan.profiler.collectives import group_families, hot_counts
from moeplan.profiler.devices import device_name, host_memory, memory_available, nvml_details
from moeplan.profiler.links import uplink_flows
from moeplan.profiler.tasks import EXCHANGES, HOSTED, LEVELS, OFFLOAD, tasks, tensor_degrees
from moeplan.spec import Cluster, Model, MoeplanError
from moeplan.spec.cluster import Device, DeviceKind, Host, OperatorCurve, Provenance
from moeplan.spec.curve import Axis, Curve
from moeplan.spec.model import Attention, Block, Dense, Moe
from moeplan.spec.operators import OF_FAMILIES, OPERATORS

GIB = 2**30


def model(name: str = "small", **changes) -> Model:
    attention = Attention(heads=8, kv_heads=2, head_dim=16)
    moe = Moe(num_experts=8, top_k=2, ffn_size=96, shared_ffn_size=64)
    blocks = (
        Block(count=1, hidden_size=128, attention=attention, dense=Dense(ffn_size=256)),
        Block(count=3, hidden_size=128, attention=attention, moe=moe),
    )
    return Model(**{"name": name, "family": "test", "vocab_size": 512, "blocks": blocks, "dtype": "f32", **changes})


def fake_host(tmp_path, cgroup: str, files: dict[str, str]) -> tuple[str, str]:
    proc, cgroups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {8 * GIB // 1024} kB\n")
    (proc / "self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(proc), str(cgroups)


def test_memory_is_what_the_host_has_available(tmp_path):
    assert host_memory(*fake_host(tmp_path, "0::/\n", {})) == 8 * GIB


def test_memory_is_less_where_a_cgroup_v2_above_has_a_limit(tmp_path):
    files = {
        "jobs/memory.max": f"{4 * GIB}\n",
        "jobs/memory.current": f"{3 * GIB}\n",
        "jobs/memory.stat": f"anon 1\ninactive_file {GIB}\n",
        "jobs/one/memory.max": "max\n",
        "jobs/one/memory.current": "0\n",
    }
    assert host_memory(*fake_host(tmp_path, "0::/jobs/one\n", files)) == 2 * GIB


def test_memory_is_less_where_a_cgroup_v1_has_a_limit(tmp_path):
    files = {
        "memory/job/memory.limit_in_bytes": f"{6 * GIB}\n",
        "memory/job/memory.usage_in_bytes": f"{5 * GIB}\n",
        "memory/job/memory.stat": "total_inactive_file 0\n",
    }
    assert host_memory(*fake_host(tmp_path, "4:memory:/job\n3:cpu:/\n", files)) == GIB


def test_this_machine_has_a_name_and_memory_that_its_ranks_divide():
    cpu = torch.device("cpu")
    assert device_name(cpu)
    assert 0 < memory_available(cpu, 4) < memory_available(cpu, 1)
    assert nvml_details(cpu) == {}


def test_what_nvml_tells_of_a_gpu(monkeypatch):
    """Bytes or text, as drivers answer; what one does not answer is left out."""
    monkeypatch.setitem(sys.modules, "pynvml", nvml_standin)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(uuid=nvml_standin.UUID))
    found = nvml_details(torch.device("cuda:0"))
    assert found["uuid"] == f"GPU-{nvml_standin.UUID}"
    assert (found["driver"], found["pci_bus"]) == ("580.159.04", "00000000:19:00.0")
    assert (found["nvlinks"], found["topology"]) == ("2", "gpu1: SYS")
    assert "numa_node" not in found


def test_a_host_without_nvml_says_so(monkeypatch):
    """A container may have the driver and not its management library."""

    def fail() -> None:
        raise nvml_standin.NVMLError("library not found")

    monkeypatch.setitem(sys.modules, "pynvml", nvml_standin)
    monkeypatch.setattr(nvml_standin, "nvmlInit", fail)
    assert nvml_details(torch.device("cuda:0")) == {"nvml": "not available: library not found"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the error of a machine without a GPU")
def test_a_missing_gpu_is_one_clear_line():
    with pytest.raises(MoeplanError, match="device cuda: torch finds no NVIDIA GPU here") as error:
        profile(None, [model()], device="cuda")  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


@given(st.lists(st.sampled_from(["a", "b", "c"]), min_size=2, max_size=9).filter(lambda hosts: len(set(hosts)) > 1))
def test_uplink_flows_use_all_devices_and_only_that_uplink(hosts):
    for outward in (True, False):
        flows = uplink_flows(tuple(hosts), hosts[0], outward)
        inner = {f.source if outward else f.target for f in flows}
        outer = {f.target if outward else f.source for f in flows}
        assert inner == {r for r, host in enumerate(hosts) if host == hosts[0]}
        assert outer == {r for r, host in enumerate(hosts) if host != hosts[0]}
        assert len(set(flows)) == len(flows)


@given(st.integers(0, 10**7), st.integers(1, 64))
def test_skewed_traffic_moves_as_many_rows_most_of_them_to_the_first(rows, members):
    counts = hot_counts(rows, members)
    assert len(counts) == members
    assert sum(counts) == rows
    assert members == 1 or counts[0] >= 0.75 * rows


def test_groups_are_the_world_the_hosts_and_the_tensor_groups_each_once():
    assert group_families("aabb", [1, 2]) == [((0, 1, 2, 3),), ((0, 1), (2, 3)), ((0, 2), (1, 3))]
    assert group_families("aaaa", [1, 2, 4]) == [((0, 1, 2, 3),), ((0, 1), (2, 3))]
    assert group_families("aaab", [1]) == [((0, 1, 2, 3),), ((0, 1, 2),)]  # all relay through b's only device
    assert group_families("aaabb", [1]) == [((0, 1, 2, 3, 4),), ((0, 1, 2), (3, 4)), ((0, 2, 3), (1, 4))]
    assert group_families("ab", [1]) == [((0, 1),)]
    assert group_families("a", [1]) == []


def test_tensor_degrees_divide_the_heads_and_stay_inside_a_host():
    assert tensor_degrees(model(), "aa") == [1, 2]
    assert tensor_degrees(model(), "aaaa") == [1, 2]  # two key/value heads
    assert tensor_degrees(model(), "aabb") == [1, 2]
    assert tensor_degrees(model(), "abab") == [1]
    assert tensor_degrees(model(), "aaabbb") == [1]
    assert tensor_degrees(model(), "a") == [1]


def test_a_model_needs_every_operator_and_each_curve_is_measured_once():
    needed = tasks([model(), model("twin")], ["f32", "f32"], "aa")
    assert {task.operator for task in needed} == set(OPERATORS) - set(LEVELS) - set(OFFLOAD) - set(OF_FAMILIES)
    levels = [task for task in tasks([model()], ["f32"], "aabb") if task.operator in LEVELS]
    assert sorted(task.operator for task in levels) == sorted(LEVELS)
    assert all(task.shape == {"hidden": 128, "top_k": 2, "devices": 4, "hosts": 2} for task in levels)
    assert not any(task.operator in LEVELS for task in tasks([model()], ["f32"], "ab"))
    for hosted, wanted in ((False, set(OFFLOAD) - set(HOSTED)), (True, set(OFFLOAD))):
        beyond = [t for t in tasks([model()], ["f32"], "aa", offload=True, hosted=hosted) if t.operator in OFFLOAD]
        assert sorted(task.operator for task in beyond) == sorted(wanted)
    assert not any(t.operator in OFFLOAD for t in tasks([model()], ["f32"], "aa", hosted=True))
    assert len(needed) == len({task.key for task in needed})
    attentions = [task for task in needed if task.operator == "attention_decode"]
    assert sorted(task.tensor for task in attentions) == [1, 2]
    assert sum(task.operator == "dense_ffn" for task in needed) == 2  # the dense layer and the shared expert
    assert len(tasks([model(), model()], ["f32", "bf16"], "aa")) == 2 * len(needed)
    assert set(EXCHANGES + LEVELS) < set(OPERATORS)


def test_calls_rotate_over_the_layers_weights_but_not_over_big_ones():
    by_operator = {task.operator: task for task in tasks([model()], ["f32"], "aa")}
    copies = {name: task.copies(task.grid.start) for name, task in by_operator.items()}
    assert copies["attention_decode"] == 4  # layers
    assert copies["route"] == 3
    assert copies["head"] == copies["ep_pack"] == copies["expert_ffn"] == 1
    wide = Block(
        hidden_size=8192, attention=Attention(heads=64, kv_heads=64, head_dim=128), moe=model().moe_block().moe
    )
    (first, *_) = (t for t in tasks([model(blocks=(wide,) * 9)], ["f32"], "a") if t.operator == "attention_decode")
    assert first.copies(first.grid.start) == 1


def cluster(tokens: tuple[float, ...], operator: str = "route", model_name: str = "model", **device) -> Cluster:
    curve = Curve(axes=(Axis(name="tokens", values=tokens),), median=(1e-3,) * len(tokens), spread=(0.1,) * len(tokens))
    entry = OperatorCurve(operator=operator, shape={"hidden": 8}, dtype="f32", curve=curve)
    at = {"host": "a", "memory_bytes": GIB}
    at |= {name: device.pop(name) for name in tuple(device) if name in at}
    fields = {"name": "cpu", "type": "cpu", "product": "cpu", "stream_bandwidth": 1e9, **device}
    return Cluster(
        kinds=(DeviceKind(**fields, operators=(entry,)),),
        devices=(Device(kind=fields["name"], **at),),
        hosts=(Host(name=at["host"]),),
        provenance=Provenance(created="now", command="test", versions={}, seconds=1.0, models=(model_name,)),
    )


def test_merging_keeps_old_curves_and_takes_new_ones_where_both_are():
    merged = merge(cluster((1, 2)), cluster((1, 4), model_name="other"))
    assert [entry.curve.axes[0].values for entry in merged.kinds[0].operators] == [(1, 4)]
    merged = merge(cluster((1, 2)), cluster((1, 4), operator="embed", model_name="other", memory_bytes=2 * GIB))
    assert [entry.operator for entry in merged.kinds[0].operators] == ["route", "embed"]
    assert merged.devices[0].memory_bytes == 2 * GIB
    assert merged.provenance.models == ("model", "other")
    Cluster.parse(merged.to_json(), "merged")


@pytest.mark.parametrize("change", [{"host": "b"}, {"product": "faster"}, {"threads": 2}, {"cpu_share": 0.5}])
def test_merging_refuses_other_devices_and_names_the_difference(change):
    (field,) = change
    with pytest.raises(MoeplanError, match=f"device 0 had {field}"):
        merge(cluster((1, 2)), cluster((1, 2), **change))


def test_merging_refuses_another_lab():
    with pytest.raises(MoeplanError, match=r"1 devices \(real hosts\).*lab slow"):
        merge(cluster((1, 2)), cluster((1, 2)).model_copy(update={"lab": "slow"}))
