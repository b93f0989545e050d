"""``moeplan systems``: what is known of GPUs that one does not own."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from moeplan.service.app import app
from moeplan.spec.errors import MoeplanError
from moeplan.tests.silicon_cases import write_example


def run(*arguments: str | Path) -> str:
    result = CliRunner().invoke(app, ["systems", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0
    return result.output


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_example(tmp_path / "systems", lambda frame: frame.assign(latency=frame["latency"] + 0.1)).parent


def test_all_and_one(folder: Path) -> None:
    lines = run("--tables", folder).splitlines()
    (first,) = (line.split() for line in lines if line.startswith("gpu_a"))
    assert first == ["gpu_a", "Hopper", "80", "2.00", "400", "800", "300", "432"]
    (second,) = (line.split() for line in lines if line.startswith("gpu_b"))
    assert second[-1] == "0"
    assert "scaled from the nearest GPU" in run("gpu_b", "--tables", folder)
    (row,) = (line.split() for line in run("gpu_a", "--tables", folder).splitlines() if "sglang" in line)
    assert row == ["gemm", "sglang", "144", "0.5.14"]


def test_json_has_tables_and_faults(folder: Path) -> None:
    entries = {entry["name"]: entry for entry in json.loads(run("--tables", folder, "--json", "--audit"))}
    assert entries["gpu_b"]["tables"] == entries["gpu_b"]["faults"] == []
    assert {"operator": "gemm", "engine": "vllm", "version": "0.24.0", "rows": 144} in entries["gpu_a"]["tables"]
    condemned = [fault for fault in entries["gpu_a"]["faults"] if fault["condemned"]]
    assert {(fault["engine"], fault["dtype"], fault["check"]) for fault in condemned} == {("vllm", "fp8", "slow start")}
    assert {fault["replaced_by"] for fault in condemned} == {"sglang 0.5.14"}
    assert "faults" not in json.loads(run("gpu_a", "--tables", folder, "--json"))[0]


def test_the_audit_is_told_in_lines(folder: Path) -> None:
    output = run("gpu_a", "--tables", folder, "--audit")
    assert "1 faults that condemn" in output
    (line,) = (line for line in output.splitlines() if "slow start" in line)
    assert line.startswith("gpu_a: gemm, vllm 0.24.0, fp8: slow start: ")
    assert line.endswith("replaced by sglang 0.5.14")


def test_unknown_names_and_folders_are_one_line(folder: Path) -> None:
    for arguments, message in (
        (["gpu_c", "--tables", str(folder)], "not known; nearest: gpu_"),
        (["--tables", str(folder / "none")], "no such folder"),
        (["--tables", str(folder / "systems" / "data")], "expected a folder with"),
    ):
        with pytest.raises(MoeplanError, match=message):
            run(*arguments)
