"""The script for a GPU, without one: its dry run, the wheels' list, and what is brought home."""

import json
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from moeplan.benchmarks.gpu import bring_home, main, wheels
from moeplan.benchmarks.gpu.page import page, table
from moeplan.benchmarks.gpu.stage import FAILED, Row
from moeplan.spec import MoeplanError

ROOT = Path(__file__).parents[1]
RUN = ROOT / "benchmarks" / "gpu" / "run.sh"
# What the machine with the GPU has not got, and neither has the run: imported, any of these would end it there.
ABSENT = ("ortools", "plotly", "fastapi")


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """All stages, small; packages that the GPU machine lacks cannot be imported."""
    folder = tmp_path_factory.mktemp("dry")
    (folder / "blocked").mkdir()
    names = ", ".join(f"{name!r}: None" for name in ABSENT)
    (folder / "blocked" / "sitecustomize.py").write_text(f"import sys\nsys.modules.update({{{names}}})\n")
    environment = os.environ | {
        "PYTHON": sys.executable,
        "PYTHONPATH": str(folder / "blocked"),
        "MOEPLAN_WHEELS": "0",
    }
    command = [str(RUN), "--dry", "--out", str(folder / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=580)
    return done, folder / "out"


@pytest.mark.timeout(600)
def test_every_stage_runs_and_nothing_fails(dry):
    done, out = dry
    rows = [Row(**json.loads(line)) for line in (out / "results.jsonl").read_text().splitlines()]
    assert done.returncode == 0, f"{done.stdout}\n{(out / 'log.txt').read_text()[-5000:]}"
    assert [row for row in rows if row.verdict == FAILED] == []
    stages = {row.stage for row in rows}
    assert stages == {stage.name for stage in main.STAGES}
    # Each stage has said something of its own, beside how it ended.
    assert all(sum(row.stage == name for row in rows) >= 2 for name in stages)


def test_what_it_prints_and_leaves(dry):
    done, out = dry
    assert done.stdout.rstrip().endswith(f"files in {out}")
    assert len(done.stdout) < 12_000
    files = sorted(path.name for path in out.iterdir())
    assert len(files) <= 8
    assert {"results.jsonl", "log.txt", "gpu-h200.md", "cluster.json", "sm_90.json"} <= set(files)
    text = (out / "gpu-h200.md").read_text()
    assert "**This has not run on a GPU yet.**" in text
    assert "| memcheck |" in text


def test_a_dry_run_is_nothing_to_bring_home(dry):
    with pytest.raises(MoeplanError, match=r"cluster\.json: of a processor: a dry run is nothing to bring home$"):
        bring_home.bring(dry[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the message of a machine without a GPU")
def test_without_a_gpu_it_says_so_in_one_line(tmp_path):
    environment = os.environ | {"PYTHON": sys.executable, "MOEPLAN_WHEELS": "0"}
    command = [str(RUN), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == ["no GPU that torch can use here: --dry shows everything on the processor"]
    assert not (tmp_path / "out").exists()


def test_nothing_to_bring_home(tmp_path):
    with pytest.raises(MoeplanError, match=r"no gpu-h200\.md"):
        bring_home.bring(tmp_path)


def test_a_stage_that_fails_or_hangs_is_told_and_ends(tmp_path, monkeypatch):
    """With all that it started, and the next one runs."""
    row = main.run_stage(main.Stage("no_such_stage", 9, 0), tmp_path, True, 60.0)
    assert row.verdict == FAILED
    assert "exit code 1: ModuleNotFoundError" in row.figure
    row = main.run_stage(main.Stage("facts", 9, 0), tmp_path, True, 0.05)
    assert row.verdict == FAILED
    assert "stopped: its 0 s are over" in row.figure


def test_the_time_of_all_stages_is_well_under_eight_minutes():
    assert main.TOTAL <= 7.5 * 60
    assert all(stage.ceiling is None or stage.ceiling < main.TOTAL for stage in main.STAGES)


def test_the_table_leaves_out_details_and_the_page_does_not():
    rows = [Row("a", "what", "1", "2", "ok"), Row("a", "a|detail", "3", detail=True)]
    assert "detail" not in table(rows)
    assert "a/detail" in page(rows, False, "run.sh")
    assert "not run" not in page(rows, False, "run.sh")


def test_the_wheels_are_pinned_and_what_they_need_is_there():
    """Everything that the package depends on is on the machine, or among the wheels, or not needed there."""
    versions = wheels.pinned((ROOT / "constraints.txt").read_text())
    missing = {name.lower().replace("_", "-") for name in wheels.MISSING}
    assert missing <= versions.keys()
    there = (
        "torch numpy scipy pandas networkx nvidia-ml-py typer rich pyyaml safetensors matplotlib numba threadpoolctl"
    )
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.S | re.M)
    assert listed is not None
    needed = {re.split(r"[<>=~ ]", line)[0] for line in re.findall(r'"(.+?)"', listed[1])}
    assert needed == set(there.split()) | {"threadpoolctl", "pydantic", "pulp", "highspy", "ortools", "packaging"}
    assert {"pydantic", "pydantic-core", "pulp", "highspy"} <= missing


def test_wheels_travel_with_what_they_name(tmp_path):
    """Where they were collected: each one's own requirements are among them or on the machine."""
    found = sorted((ROOT / "build" / "gpu-wheels").glob("*.whl"))
    if not found:
        pytest.skip("benchmarks/gpu/wheels.py has not run here")
    assert len(found) == len(wheels.MISSING)
    names = {wheel.name.split("-")[0].lower().replace("_", "-") for wheel in found} | {"typing-extensions", "numpy"}
    for wheel in found:
        with zipfile.ZipFile(wheel) as archive:
            metadata = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
            text = archive.read(metadata).decode()
        needs = [
            line.split(":")[1] for line in text.splitlines() if line.startswith("Requires-Dist") and "extra" not in line
        ]
        assert {re.split(r"[<>=~! ;(]", need.strip())[0].lower() for need in needs} <= names
