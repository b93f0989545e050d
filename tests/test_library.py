"""``from moeplan import place, profile, run, solve``: documents in, documents out, frames of what they say."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import moeplan
from moeplan import Cluster, MoeplanError, Placement, Plan, Trace, place, profile, run, solve
from moeplan.profiler.traces import trace_stats
from moeplan.spec.placement import Score
from moeplan.tests.routings import chained_trace
from moeplan.tests.synthetic import cluster, tiny_model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def trace() -> Trace:
    return chained_trace(0, 4, 8, 768, 2)


@pytest.fixture(scope="module")
def plan(trace: Trace) -> Plan:
    return solve(tiny_model(), cluster(tiny_model()), "prefill:64@16", trace, time_limit=30)


def test_everything_that_is_promised_is_there() -> None:
    assert {"place", "profile", "run", "solve", "Trace", "Cluster", "Placement"} <= set(moeplan.__all__)
    assert all(getattr(moeplan, name) is not None for name in moeplan.__all__)
    with pytest.raises(AttributeError, match="no attribute 'planner_of_mine'"):
        _ = moeplan.planner_of_mine


def test_importing_it_loads_nothing_heavy() -> None:
    source = "import sys, moeplan; print(*sorted(set(sys.modules) & {'torch', 'numpy', 'pandas', 'pydantic', 'typer'}))"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == []


def test_type_checkers_see_the_types(tmp_path: Path) -> None:
    assert 'moeplan = ["py.typed"]' in (ROOT / "pyproject.toml").read_text()
    assert (ROOT / "py.typed").is_file()
    source = "from moeplan import place\nx: int = place('t.npz', devices='four')\n"
    (tmp_path / "moeplan").symlink_to(ROOT)  # as an installed package lies
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "-c", source]
    environment = os.environ | {"MYPYPATH": str(tmp_path)}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=240, cwd=tmp_path, env=environment
    )
    assert 'Argument "devices" to "place" has incompatible type "str"' in done.stdout
    assert 'variable has type "int"' in done.stdout


def test_a_placement_is_the_commands(trace: Trace, tmp_path: Path) -> None:
    path = trace.write(tmp_path / "trace.npz")
    mine = place(path, devices=2, fit=(0, 0.5), steps=200, time_limit=30)
    argv = ["place", "--trace", str(path), "--devices", "2", "--fit", "0:0.5", "--steps", "200", "--time-limit", "30"]
    written = tmp_path / "place.json"
    subprocess.run([sys.executable, "-m", "moeplan", *argv, "-o", str(written)], check=True, timeout=120)
    theirs = Placement.read(written)
    assert mine.layers == theirs.layers
    assert mine.scores == theirs.scores
    assert place(trace, devices=2, fit=(0, 0.5), steps=200, time_limit=30).layers == mine.layers


def test_scores_as_a_frame(trace: Trace) -> None:
    placement = place(trace, devices=2, fit=(0, 0.5), steps=200)
    frame = placement.scores_frame()
    assert list(frame.columns) == list(Score.model_fields)
    assert set(frame.index) == {(n, p) for n in ("placement", "linear", "eplb") for p in ("fit", "held_out")}
    best = placement.scores["placement"].held_out
    assert best is not None
    assert frame.loc[("placement", "held_out"), "balance_mean"] == best.balance_mean


def test_candidates_and_parts_as_frames(plan: Plan) -> None:
    frame = plan.candidates_frame()
    assert len(frame) == len(plan.candidates)
    assert frame["step_seconds"].dropna().is_monotonic_increasing
    assert frame["step_seconds"].min() == plan.solver.objective
    parts = plan.parts_frame()
    assert list(parts.index) == [-1, *range(len(plan.model.layers))]
    assert parts.to_numpy().sum() == pytest.approx(sum(sum(p.parts.values()) for p in plan.predicted.layers))


def test_statistics_as_a_frame(trace: Trace) -> None:
    stats = trace_stats(trace, devices=4, hosts=2)
    frame = stats.frame()
    assert frame["device_imbalance"].tolist() == stats.device_imbalance.tolist()
    assert np.isnan(frame["affinity_bits"].iloc[-1])
    assert len(frame) == trace.layers
    counts = trace_stats(Trace.of_counts(np.ones((3, 8)))).frame()
    assert list(counts.columns) == ["expert_imbalance", "device_imbalance", "idle_experts"]


def test_wrong_input_is_one_line(plan: Plan, trace: Trace, tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"no\.json"):
        solve("mixtral", tmp_path / "no.json")
    with pytest.raises(MoeplanError, match="workload 4096: expected a Workload, or a text"):
        profile("tiny-moe", workloads=[4096])  # type: ignore[list-item]
    with pytest.raises(MoeplanError, match="workload 2048: expected a Workload, or a text"):
        solve(tiny_model(), cluster(tiny_model()), 2048)  # type: ignore[arg-type]
    for wrong in (0, -1, True, 2.5, "x"):
        with pytest.raises(MoeplanError, match=r"devices .*: expected a whole number from 1"):
            place(trace, devices=wrong)  # type: ignore[arg-type]
    made = cluster(tiny_model())
    for solving, reason in (
        ({"memory_bytes": 1e9}, "memory_bytes 1000000000.0: expected a whole number"),
        ({"seed": -1}, "seed -1: expected a whole number from 0"),
        ({"time_limit": "x"}, "time_limit 'x': expected a number of seconds"),
        ({"time_limit": float("nan")}, "time_limit nan: expected a number of seconds"),
        ({"dtype": "f17"}, "dtype 'f17': expected one of"),
        ({"trace": 5}, "trace 5: expected a Trace, or the path of one"),
        ({"placement": made}, "expected a Placement, or the path of one"),
        ({"strategy": "magic"}, "magic"),
    ):
        with pytest.raises(MoeplanError, match=reason):
            solve(tiny_model(), made, **solving)  # type: ignore[arg-type]
    with pytest.raises(MoeplanError, match="model 5: expected a Model"):
        solve(5, made)  # type: ignore[arg-type]
    for placing, reason in (
        ({"fit": "0:0.5"}, "fit '0:0.5': expected two fractions"),
        ({"objective": "best"}, "objective 'best': expected one of latency"),
        ({"shares": 1}, "shares 1: expected one of even"),
        ({"slots_per_device": [-1, 9]}, "slots_per_device -1: expected a whole number from 1"),
        ({"slots_per_device": "4,4"}, "expected whole numbers, one for each device"),
        ({"time_limit": 0}, "time_limit 0: expected a number of seconds above 0"),
        ({"time_limit": float("inf")}, "time_limit inf: expected a number of seconds"),
        ({"previous": 3}, "previous 3: expected a Placement"),
        ({"seed": -1}, "seed -1"),
    ):
        with pytest.raises(MoeplanError, match=reason):
            place(trace, **placing)  # type: ignore[arg-type]
    with pytest.raises(MoeplanError, match="needs --model"):
        place(trace, cluster=cluster(tiny_model()))
    with pytest.raises(MoeplanError, match="--dtype needs --cluster"):
        place(trace, dtype="bf16")
    assert plan.routing.path == ""
    with pytest.raises(MoeplanError, match="in no file: give the trace"):
        run(plan)


def test_a_cluster_and_a_model_make_time_the_objective(trace: Trace) -> None:
    made: Cluster = cluster(tiny_model())
    placement = place(trace, cluster=made, model=tiny_model(), workload="prefill:64@16", time_limit=10, steps=50)
    seconds = placement.scores["placement"].fit.step_seconds
    assert seconds is not None
    assert seconds > 0


def test_the_example_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["library.py"])
    runpy.run_path(str(ROOT / "examples" / "library.py"), run_name="__main__")
    assert "boundary_cross_host" in capsys.readouterr().out
