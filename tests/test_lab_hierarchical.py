"""``hierarchical`` through profile, solve and run on the lab's two hosts of two devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeplan import Cluster, Plan, Report
from moeplan.spec.levels import across_groups, inside_groups

LAB = Path(__file__).parent.parent / "examples" / "labs" / "two-hosts.yaml"


@pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")
def test_two_hosts_of_two(tmp_path: Path) -> None:
    def moeplan(*arguments: str) -> None:
        done = subprocess.run(
            [sys.executable, "-m", "moeplan", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=300
        )
        assert done.returncode == 0, done.stderr

    moeplan("profile", "--model", "tiny-moe", "--lab", str(LAB), "--budget", "20", "--accept-noise")
    cluster = Cluster.read(tmp_path / "cluster.json")
    hosts = [device.host for device in cluster.devices]
    for group in across_groups(hosts) + inside_groups(hosts):
        cluster.collective("all_to_all", group)
    moeplan("solve", "--model", "tiny-moe", "--workload", "prefill:256@32", "--strategy", "hierarchical")
    plan = Plan.read(tmp_path / "plan.json")
    assert {layer.strategy for layer in plan.layers} == {"hierarchical"}
    assert len({device.host for device in plan.devices}) == 2
    moeplan("run", "plan.json", "--lab", str(LAB), "--tolerance", "1000", "--repetitions", "5")
    report = Report.read(tmp_path / "report.json")
    assert report.check is not None
    assert report.check.passed
    assert report.check.relative_error < 1e-4
