"""The loop over two hosts, started by torchrun in two network namespaces as it would be on two machines."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moeplan import Cluster, Plan, Report
from moeplan.runtime.launch import Lab, LabSpec

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root")

TRACE = Path(__file__).parent.parent / "examples" / "tiny_moe" / "trace.npz"
HOSTS = ("left", "right")
SPEC = {
    "name": "two-hosts-test",
    "hosts": [{"name": name, "ranks": 1, "cpu_share": 0.5} for name in HOSTS],
    "uplink_gbit": 1.0,
}


def torchrun(lab: Lab, folder: Path, *arguments: str) -> None:
    """One torchrun per host, as a person would type it on each."""
    torchrun_argv = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    started = []
    for node, host in enumerate(HOSTS):
        argv = [*torchrun_argv, "--node-rank", str(node), "--master-addr", lab.address(HOSTS[0])]
        argv += ["--master-port", "29477", "-m", "moeplan", *arguments]
        options = {"cwd": folder, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(lab.popen(host, argv, {"OMP_NUM_THREADS": "1"}, **options))
    outputs = [process.communicate(timeout=200)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs


def test_profile_and_run_over_two_hosts(tmp_path: Path) -> None:
    with Lab(LabSpec.model_validate(SPEC)) as lab:
        torchrun(lab, tmp_path, "profile", "--model", "tiny-moe", "--budget", "10", "--accept-noise")
        cluster = Cluster.read(tmp_path / "cluster.json")
        assert len(cluster.hosts) == 2
        assert all(host.uplink_out and host.uplink_out < 150e6 for host in cluster.hosts)
        solve = ["solve", "--model", "tiny-moe", "--trace", str(TRACE), "--workload", "prefill:256"]
        subprocess.run([sys.executable, "-m", "moeplan", *solve], cwd=tmp_path, check=True, timeout=120)
        torchrun(lab, tmp_path, "run", "plan.json", "--tolerance", "100", "--repetitions", "5")
        solve[-1:] = ["decode:16@64", "--strategy", "coherent", "-o", "coherent.json"]
        subprocess.run([sys.executable, "-m", "moeplan", *solve], cwd=tmp_path, check=True, timeout=120)
        coherent = ["run", "coherent.json", "-o", "coherent-report.json"]
        torchrun(lab, tmp_path, *coherent, "--tolerance", "100", "--repetitions", "5")
    for name in ("report.json", "coherent-report.json"):
        report = Report.read(tmp_path / name)
        assert report.check is not None
        assert report.check.passed
    assert {layer.strategy for layer in Plan.read(tmp_path / "coherent.json").layers} == {"coherent"}
