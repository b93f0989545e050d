"""The command line: the loop end to end, help, and bad input as a person would give it."""

import json
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moeplan import Cluster, Plan, Report
from moeplan.service import cli

TRACE = Path(__file__).parent.parent / "examples" / "tiny_moe" / "trace.npz"


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    """Run a command in this process: exit code, standard output, standard error (without line breaks)."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capfd.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


@pytest.fixture(scope="module")
def loop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder after profile, solve and run of the tiny model from its real trace."""
    folder = tmp_path_factory.mktemp("loop")
    commands = [
        ["profile", "--model", "tiny-moe", "--budget", "12", "--accept-noise"],
        ["solve", "--model", "tiny-moe", "--trace", str(TRACE), "--workload", "prefill:512"],
        ["run", "plan.json", "--tolerance", "100", "--repetitions", "5", "--picture", "report.png"],
    ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "moeplan", *command], cwd=folder, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr
    return folder


def test_loop_writes_readable_documents(loop: Path) -> None:
    cluster, plan = Cluster.read(loop / "cluster.json"), Plan.read(loop / "plan.json")
    report = Report.read(loop / "report.json")
    assert len(cluster.devices) == len(plan.devices) == 2
    assert plan.routing.kind == "trace"
    assert report.check is not None
    assert report.check.passed
    assert report.plan == plan.digest()
    assert report.step.measured > 0
    assert {row.part for row in report.parts} >= {"attention", "route", "expert", "head"}
    assert (loop / "report.png").stat().st_size > 5000


def test_solve_is_deterministic_and_free_choice_is_no_worse(
    loop: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(loop)
    arguments = ("solve", "-m", "tiny-moe", "--trace", TRACE, "--workload", "prefill:512", "--json")
    plans = []
    for name in ("a.json", "b.json"):
        code, out, _ = moeplan(monkeypatch, capfd, *arguments, "-o", name)
        assert code == 0
        plans.append({k: v for k, v in json.loads(out).items() if k != "solve_seconds"})
    assert plans[0] == plans[1]
    free = plans[0]["predicted"]["step_seconds"]
    for strategy in ("ep", "sharded", "gathered"):
        code, out, _ = moeplan(monkeypatch, capfd, *arguments, "--strategy", strategy, "-o", "c.json")
        assert code == 0
        assert free <= json.loads(out)["predicted"]["step_seconds"] * (1 + 1e-9)


def test_models_lists_the_catalogue(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    code, out, _ = moeplan(monkeypatch, capfd, "models", "--json")
    rows = {row["name"]: row for row in json.loads(out)}
    assert code == 0
    assert rows["mixtral"]["total_parameters"] == pytest.approx(46.7e9, rel=0.01)
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = moeplan(monkeypatch, capfd, "models")
    assert code == 0
    assert "…" not in out
    assert set(rows) <= set(out.split())


@pytest.mark.parametrize(
    "command",
    [
        ["profile"],
        ["solve"],
        ["run"],
        ["models"],
        ["trace", "capture"],
        ["trace", "stats"],
        ["trace", "import"],
        ["export"],
        ["place"],
        ["explain"],
        ["compare"],
    ],
)
def test_every_command_has_help_with_an_example(
    command: list[str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = moeplan(monkeypatch, capfd, *command, "--help")
    assert code == 0
    assert re.search(rf"Example: moeplan {' '.join(command)}", out)


def test_bad_input_is_one_line_and_exit_2(
    loop: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    cluster, plan = loop / "cluster.json", loop / "plan.json"
    (tmp_path / "half.json").write_text(cluster.read_text()[:1000])
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "half.npz").write_bytes(TRACE.read_bytes()[:2000])
    np.savez(tmp_path / "other.npz", expert_ids=np.zeros((8, 3, 1), np.uint8), num_experts=np.int64(4))
    np.savez(tmp_path / "objects.npz", expert_ids=np.array([{}], dtype=object))
    broken = json.loads(plan.read_text())
    broken["tokens"][0] += 1
    (tmp_path / "broken.json").write_text(json.dumps(broken))
    foreign = json.loads(plan.read_text())
    for device in foreign["devices"]:
        device["host"] = "elsewhere"
    (tmp_path / "foreign.json").write_text(json.dumps(foreign))
    tiny = ["solve", "-m", "tiny-moe", "-o", "new.json"]
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        cases: list[tuple[list[object], str]] = [
            (["solve", "-m", "mixtrall", "--cluster", cluster], "mixtral"),
            ([*tiny], "cluster.json.*profile"),
            ([*tiny, "--cluster", tmp_path / "half.json"], "half.json.*JSON"),
            ([*tiny, "--cluster", tmp_path / "deep.json"], "deep.json"),
            ([*tiny, "--cluster", plan], "kind"),
            ([*tiny, "--cluster", cluster, "--trace", tmp_path / "none.npz"], "none.npz"),
            ([*tiny, "--cluster", cluster, "--trace", tmp_path / "half.npz"], "half.npz"),
            ([*tiny, "--cluster", cluster, "--trace", tmp_path / "objects.npz"], "objects.npz"),
            ([*tiny, "--cluster", cluster, "--trace", tmp_path / "other.npz"], "3 layers x 4 experts"),
            ([*tiny, "--cluster", cluster, "--workload", "train:5"], "workload"),
            (
                ["profile", "--model", "tiny-moe", "--workload", "prefill:5@2"],
                "5 tokens do not divide into prompts of 2",
            ),
            ([*tiny, "--cluster", cluster, "--memory", "2MiB"], "memory|MiB|GiB"),
            ([*tiny, "--cluster", cluster, "--memory", "lots"], "size"),
            ([*tiny, "--cluster", cluster, "--strategy", "magic"], "ep, hierarchical, sharded"),
            (["solve", "-m", "olmoe", "--cluster", cluster, "-o", "new.json"], "moeplan profile --model olmoe"),
            (["run", tmp_path / "broken.json"], "tokens"),
            (["run", tmp_path / "foreign.json", "--trace", TRACE], "elsewhere"),
            (["run", plan, "--trace", TRACE, "--port", taken.getsockname()[1]], "port"),
            (["run", plan, "--trace", tmp_path / "other.npz"], "other.npz|trace"),
            (["run", plan, "--lab", tmp_path / "no.yaml", "--trace", TRACE], "no.yaml"),
        ]
        for arguments, pattern in cases:
            before = set(tmp_path.iterdir())
            code, _, error = moeplan(monkeypatch, capfd, *arguments)
            assert code == 2, (arguments, error)
            assert "Traceback" not in error
            assert re.search(pattern, error.replace("\n", " ")), (arguments, error)
            assert set(tmp_path.iterdir()) == before, arguments


def test_help_does_not_wait_for_torch():
    code = "import sys; import moeplan.service.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_import_command_names_every_importer():
    from moeplan.profiler.traces import IMPORTERS
    from moeplan.service.commands.trace import PROGRAMS

    assert PROGRAMS.split("|") == list(IMPORTERS)


def test_kernels_do_not_load_the_compiler():
    code = "import sys; import moeplan.runtime.kernels; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
