"""What a command loads: time limits count from its start, so nothing heavy is imported before it is needed."""

import subprocess
import sys
from pathlib import Path

import pytest

from moeplan.service.app import COMMANDS
from moeplan.tests.routings import chained_trace

HEAVY = {"numba", "scipy", "pulp", "highspy", "ortools", "torch", "matplotlib", "plotly", "networkx", "pandas"}
HEAVY |= {"transformers", "huggingface_hub"}
LOADED = "print(*sorted({name.partition('.')[0] for name in sys.modules}))"
PLACE = ["moeplan", "place", "--trace", "trace.npz", "--fit", "0:0.5", "--devices", "4", "--hosts", "2"]


def loaded(program: str, folder: Path) -> set[str]:
    """The packages that a new process has after ``program``."""
    return loaded_saying(program, folder)[0]


def loaded_saying(program: str, folder: Path) -> tuple[set[str], str]:
    """The same, and what it wrote to standard error."""
    source = f"import sys\n{program}\nsys.stdout.flush()\n{LOADED}"
    command = [sys.executable, "-c", source]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split()), done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_imports_nothing_heavy(name: str, tmp_path: Path) -> None:
    found = loaded(f"import moeplan.service.commands.{name}", tmp_path)
    assert "typer" in found
    assert not found & HEAVY


@pytest.mark.parametrize("options", [[], ["--slots", "20"], ["--movement", "ep"], ["--pareto", "front.png"]])
def test_a_first_answer_needs_no_solver(options: list[str], tmp_path: Path) -> None:
    """Where loading what annealing needs would take longer than the limit allows."""
    chained_trace(0, 4, 16, 512, 2).write(tmp_path / "trace.npz")
    argv = [*PLACE, *options, "--time-limit", "1"]
    slow = "from moeplan.planner.place import ready\nready.LOAD_TIME = 60.0"
    found = loaded(
        f"sys.argv = {argv}\n{slow}\nfrom moeplan.service.cli import _guarded\nassert _guarded() == 0", tmp_path
    )
    assert (tmp_path / "place.json").exists()
    assert "numpy" in found
    assert not found & HEAVY


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["plan.json"], "plan.json: no such file"),
        (["trace.npz"], "cannot be read as UTF-8 text"),
        (["place.json"], "place.json: "),
        (["--placement", "plan.json", "--model", "mixtral"], "no such file"),
        (["plan.json", "--model", "mixtral"], "--model goes with --placement"),
        ([], "run needs a PLAN"),
    ],
)
def test_a_wrong_plan_is_refused_without_torch(arguments: list[str], said: str, tmp_path: Path) -> None:
    chained_trace(0, 4, 16, 512, 2).write(tmp_path / "trace.npz")
    (tmp_path / "place.json").write_text('{"kind": "placement"}')
    refused = "from moeplan.service.cli import _guarded\nassert _guarded() == 2"
    found, err = loaded_saying(f"sys.argv = {['moeplan', 'run', *arguments]}\n{refused}", tmp_path)
    assert said in " ".join(err.split())
    assert "torch" not in found


def test_the_library_refuses_a_wrong_plan_without_torch(tmp_path: Path) -> None:
    refused = """
from moeplan import run
from moeplan.spec.errors import MoeplanError
try:
    run("plan.json")
except MoeplanError as error:
    assert "plan.json: no such file" in str(error)
else:
    raise SystemExit("not refused")
"""
    assert "torch" not in loaded(refused, tmp_path)


def test_only_one_file_imports_numba() -> None:
    """Its cache must be chosen first: what it finds there is run."""
    root = Path(__file__).parents[1]
    files = [path for path in (root / "solvers").rglob("*.py") if path.name != "jit.py"]
    assert len(files) > 30
    assert [path.name for path in files if "import numba" in path.read_text() or "from numba" in path.read_text()] == []
