"""``hierarchical`` for a family that only Transformers computes, on the lab's two hosts of two devices."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from moeplan import Plan, Report

LAB = Path(__file__).parent.parent / "examples" / "labs" / "two-hosts.yaml"
CONFIG = {
    "model_type": "gpt_oss", "dtype": "float32", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 8,
    "num_experts_per_tok": 2, "intermediate_size": 32, "sliding_window": 16,
}  # fmt: skip


@pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")
@pytest.mark.timeout(600)
def test_two_hosts_of_two(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))

    def moeplan(*arguments: str) -> None:
        command = [sys.executable, "-m", "moeplan", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr

    moeplan("profile", "--model", ".", "--lab", str(LAB), "--budget", "15", "--accept-noise")
    moeplan("solve", "--model", ".", "--workload", "prefill:128@16", "--strategy", "hierarchical")
    plan = Plan.read(tmp_path / "plan.json")
    assert {layer.strategy for layer in plan.layers} == {"hierarchical"}
    assert len({device.host for device in plan.devices}) == 2
    moeplan("run", "plan.json", "--lab", str(LAB), "--tolerance", "1000", "--repetitions", "3")
    report = Report.read(tmp_path / "report.json")
    assert report.check is not None
    assert report.check.layers == len(plan.model.layers)
    assert report.check.relative_error < 1e-4
