"""Synthetic clusters of any size: what they hold, how large they are, and that the first version says the same."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from moeplan.benchmarks.synthetic_clusters import deepseek_v3_like, synthetic_cluster
from moeplan.planner.search import solve
from moeplan.spec import Cluster, Workload
from moeplan.spec.catalogue import load_model
from moeplan.spec.cluster import MAX_DEVICES
from moeplan.spec.operators import COLLECTIVES, attention_shape
from moeplan.tests.spelled_out import first_version, spelled_out, usual_groups


def test_the_largest_is_small_on_disk_and_answers_for_any_pair_and_group(tmp_path: Path) -> None:
    model = load_model("mixtral")
    path = synthetic_cluster(model, 512, 8, speeds=(1.0, 0.5), switches=2).write(tmp_path / "large.json")
    assert path.stat().st_size < 2e6
    found = Cluster.read(path)
    assert len(found.devices) == MAX_DEVICES
    assert found.link_counts().sum() == MAX_DEVICES * (MAX_DEVICES - 1)
    assert [found.link(*pair).name for pair in ((0, 3), (0, 4), (0, 8), (4095, 4094))] == [
        "switch",
        "host",
        "cluster",
        "switch",
    ]
    rng = np.random.default_rng(0)
    sources, targets = rng.integers(0, MAX_DEVICES, (2, 1000))
    host, switch = sources // 8 != targets // 8, sources // 4 != targets // 4
    expected = np.where(sources == targets, -1, host.astype(int) + switch)
    assert (found.link_class_index(sources, targets) == expected).all()
    for group in (range(MAX_DEVICES), range(8, 12), range(8, 16), range(4090, 4092)):
        members = tuple(sorted(Counter(device // 8 for device in group).values(), reverse=True))
        assert all(found.collective(name, tuple(group)).members == members for name in COLLECTIVES)
    for tensor in (1, 2, 4, 8):
        shape = attention_shape(model.moe_block(), tensor)
        times = [
            found.operator(i, "attention_prefill", shape, model.dtype, "").at(sequences=4, length=256) for i in (0, 8)
        ]
        assert times[0].seconds < times[1].seconds


def test_the_first_version_gives_the_same_plan() -> None:
    model = load_model("tiny-moe")
    made = synthetic_cluster(model, 2, 4, speeds=(1.0, 0.5), switches=2)
    old = Cluster.parse(first_version(spelled_out(made)), "old.json")
    for group in usual_groups(made):
        if len(group) in (2, 8):
            assert old.collective("all_gather", group).curve == made.collective("all_gather", group).curve
    plans = [solve(model, cluster, Workload.from_text("prefill:512")) for cluster in (made, old)]
    assert plans[0].layers == plans[1].layers
    assert plans[0].predicted.step_seconds == pytest.approx(plans[1].predicted.step_seconds, rel=1e-12)


def test_deepseek_v3_like_layers_are_executed() -> None:
    model = deepseek_v3_like()
    assert (len(model.layers), model.moe_block().moe.num_experts) == (61, 256)
    assert synthetic_cluster(model, 1, 2).collectives


@pytest.mark.parametrize(("hosts", "devices", "speeds"), [(0, 8, (1.0,)), (513, 8, (1.0,)), (1, 1, (1.0, -1.0))])
def test_impossible_sizes_are_refused(hosts: int, devices: int, speeds: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"at (least|most)|above 0"):
        synthetic_cluster(load_model("tiny-moe"), hosts, devices, speeds=speeds)
