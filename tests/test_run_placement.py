"""``run`` of a placement with copies and uneven shares on four ranks: its output is the reference's."""

import json
import os
import sys
from collections.abc import Iterable
from pathlib import Path

import pytest

from moeplan.planner.search import solve
from moeplan.runtime.launch import Lab, LabLauncher, LabSpec, LocalLauncher
from moeplan.runtime.run import run
from moeplan.service import cli
from moeplan.spec import Cluster, Report, Workload
from moeplan.spec.placement import PlacementLayer
from moeplan.tests.exports import placement_of
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=3, hidden=32, ffn=48, dense=1, shared=16)
SLOTS = ((0, 1, 2, 3), (3, 0, 7, 4), (0, 5, 6), (2,))
SHARES = ((0.2, 1.0, 0.5, 0.9), (0.1, 0.3, 1.0, 1.0), (0.5, 1.0, 1.0), (0.5,))
LAYERS = (
    PlacementLayer(slots=SLOTS, shares=SHARES),
    PlacementLayer(slots=SLOTS),
    PlacementLayer(slots=((5,), (0, 7, 3, 1), (), (6, 2, 4))),
)
SPEC = {
    "name": "placement-test",
    "hosts": [{"name": "a", "ranks": 2, "cpu_share": 0.4}, {"name": "b", "ranks": 2, "cpu_share": 0.3}],
    "uplink_gbit": 1.0,
}


def machines(seats: Iterable[tuple[str, float]], groups, threads: int = 1) -> Cluster:
    """A cluster with made-up curves whose hosts, processor shares and threads are those of the ranks."""
    made = cluster(MODEL, groups)
    devices, kinds = [], []
    for i, (device, (host, share)) in enumerate(zip(made.devices, seats, strict=True)):
        own = {"name": f"rank {i}", "threads": threads, "cpu_share": share}
        kinds.append(made.kind_of(i).model_copy(update=own))
        devices.append(device.model_copy(update={"host": host, "kind": f"rank {i}"}))
    hosts = [
        made.hosts[i].model_copy(update={"name": name}) for i, name in enumerate(dict.fromkeys(d.host for d in devices))
    ]
    update = {"kinds": tuple(kinds), "devices": tuple(devices), "hosts": tuple(hosts)}
    return Cluster.model_validate(made.model_copy(update=update).model_dump())


def executed(launcher, machine: Cluster, workload: str, tmp_path: Path) -> Report:
    trace = random_trace(0, 3, 8)
    path = trace.write(tmp_path / "trace.npz")
    own = placement_of(LAYERS, 8, len(machine.hosts))
    plan = solve(MODEL, machine, Workload.from_text(workload), trace, trace_path=str(path), placement=own)
    assert plan.layers[0].shares == SHARES
    return run(plan, launcher, tolerance=1e9, repetitions=2, check_budget=60, timeout=90)


def test_four_local_ranks_compute_what_the_reference_does(tmp_path):
    launcher = LocalLauncher(4, threads=1)
    machine = machines([(seat.host, seat.cpu_share) for seat in launcher.seats], ((1.0,) * 4,))
    report = executed(launcher, machine, "prefill:40@8", tmp_path)
    assert report.check is not None
    assert (report.check.layers, report.check.tokens) == (4, 40)
    assert report.check.relative_error < 1e-5
    assert report.passed


@pytest.mark.skipif(os.geteuid() != 0, reason="the lab needs root")
@pytest.mark.parametrize("workload", ["prefill:40@8", "decode:6@9"])
def test_four_lab_ranks_compute_what_the_reference_does(workload, tmp_path):
    with Lab(LabSpec.model_validate(SPEC)) as lab:
        machine = machines([(rank.name, rank.cpu_share) for rank in lab.spec.ranks()], ((1.0, 1.0), (0.7, 0.7)))
        report = executed(LabLauncher(lab), machine, workload, tmp_path)
    assert report.check is not None
    assert report.check.layers == 4
    assert report.check.relative_error < 1e-5


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[int, str]:
    """Exit code and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0), capfd.readouterr().err


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """A model, a cluster of two local ranks, a trace and a placement for them, as files."""
    monkeypatch.chdir(tmp_path)
    launcher = LocalLauncher(2)
    seats = [(seat.host, seat.cpu_share) for seat in launcher.seats]
    machines(seats, ((1.0, 1.0),), launcher.seats[0].threads).write(tmp_path / "cluster.json")
    random_trace(0, 3, 8).write(tmp_path / "trace.npz")
    slots = ((0, 1, 2, 3, 4), (4, 5, 6, 7, 0))
    shares = ((0.7, 1.0, 1.0, 1.0, 0.1), (0.9, 1.0, 1.0, 1.0, 0.3))
    placement_of([PlacementLayer(slots=slots, shares=shares)] * 3, 8).write(tmp_path / "place.json")
    MODEL.write(tmp_path / "model.json")
    monkeypatch.setattr("moeplan.service.commands.run.load_executed", lambda asked: MODEL)
    return tmp_path


def test_the_command_runs_a_placement(folder, monkeypatch, capfd):
    command = ["run", "--placement", "place.json", "--model", "tiny", "--trace", "trace.npz"]
    command += ["--workload", "prefill:32@8", "--tolerance", 1e9, "--repetitions", 2]
    code, err = moeplan(monkeypatch, capfd, *command)
    assert code == 0, err
    report = Report.read(folder / "report.json")
    assert report.check is not None
    assert report.check.passed
    assert report.workload == "prefill:32@8"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "run needs a PLAN, which `moeplan solve` writes, or --placement with --model"),
        (["--placement", "place.json"], "--placement needs --model"),
        (["plan.json", "--placement", "place.json", "--model", "tiny"], "run takes plan.json or --placement"),
        (["plan.json", "--model", "tiny"], "--model goes with --placement: plan.json says it already"),
        (["plan.json", "--workload", "prefill:8"], "--workload goes with --placement"),
        (["plan.json", "--cluster", "cluster.json"], "--cluster goes with --placement"),
        (
            ["--placement", "missing.json", "--model", "tiny"],
            "missing.json: no such file; make one with `moeplan place`",
        ),
        (["--placement", "cluster.json", "--model", "tiny"], "cluster.json"),
        (["--placement", "other.json", "--model", "tiny"], "other.json: is for 4 devices, the cluster has 2"),
        (["--placement", "place.json", "--model", "tiny", "--workload", "prefil:8"], "prefil"),
        (["--placement", "place.json", "--model", "tiny", "--trace", "few.npz"], "few.npz: has 2 layers x 8 experts"),
        (["--placement", "place.json", "--model", "tiny", "-o", "place.json"], "place.json"),
    ],
)
def test_what_a_user_may_type_wrongly_is_one_line(folder, monkeypatch, capfd, arguments, said):
    placement_of(LAYERS, 8, 2).write(folder / "other.json")
    random_trace(0, 2, 8).write(folder / "few.npz")
    before = json.loads((folder / "place.json").read_text())
    code, err = moeplan(monkeypatch, capfd, "run", *arguments)
    assert code == 2
    assert said in err
    assert err.strip().count("\n") == 0
    assert json.loads((folder / "place.json").read_text()) == before
