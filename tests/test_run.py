"""``run``: a plan on two local ranks, its report, and what it refuses."""

import sys

import numpy as np
import pytest
import torch

from moeplan.profiler import PROBE
from moeplan.runtime.check import checked_layers, first_layers, relative_error
from moeplan.runtime.devices import verify_devices
from moeplan.runtime.executor import Output
from moeplan.runtime.launch import LocalLauncher, Rank
from moeplan.runtime.launch.choose import choose_launcher
from moeplan.runtime.launch.lab import Lab
from moeplan.runtime.launch.rank import Seated
from moeplan.runtime.launch.supervise import Supervisor
from moeplan.runtime.run import assemble, run
from moeplan.runtime.worker import Job, planned_trace, run_plan
from moeplan.service.pages.report import machine_notes
from moeplan.spec import Model, MoeplanError, Report, Trace
from moeplan.spec.load import Load
from moeplan.spec.model import Attention, Block, Dense, Moe
from moeplan.spec.plan import LayerPlan, LayerPrediction, ProbePoint, RoutingSource
from moeplan.tests.plans import even_slots, hand_made_plan

MOE = Moe(num_experts=8, top_k=2, ffn_size=48, shared_ffn_size=32)
ATTENTION = Attention(heads=4, kv_heads=2, head_dim=16, qk_norm="full")
MODEL = Model(
    name="small",
    family="test",
    vocab_size=97,
    blocks=(
        Block(count=1, hidden_size=64, attention=ATTENTION, dense=Dense(ffn_size=96)),
        Block(count=4, hidden_size=64, attention=ATTENTION, moe=MOE),
    ),
)
EP = LayerPlan(strategy="ep", slots=((0, 1, 2), (7, 6, 5, 4, 3)))
SHARDED = LayerPlan(strategy="sharded", slots=((), ()), split=(30, 18))
GATHERED = LayerPlan(strategy="gathered", slots=even_slots(8, 2))


@pytest.fixture(scope="module")
def launcher() -> LocalLauncher:
    return LocalLauncher(2, threads=1)


def local(launcher: LocalLauncher) -> dict:
    """What a plan must say about the launcher's devices."""
    seats = launcher.seats
    return {"hosts": [seat.host for seat in seats], "cpu_share": seats[0].cpu_share}


def said(report: Report) -> tuple[str, ...]:
    """The notes, but for what other programs on this machine did meanwhile."""
    return tuple(known for known in report.notes if not known.startswith(("other programs", "other virtual")))


def test_prefill_from_a_trace_with_every_strategy(launcher, tmp_path):
    rng = np.random.default_rng(0)
    trace = Trace.of(rng.permuted(np.tile(np.arange(8), (50, 4, 1)), axis=2)[:, :, :2], 8)
    path = trace.write(tmp_path / "trace.npz")
    source = RoutingSource(kind="trace", path="elsewhere.npz", digest=trace.digest(), seed=4)
    plan = hand_made_plan(
        MODEL, "prefill:24@8", [EP, SHARDED, GATHERED, EP], tokens=(16, 8), routing=source, **local(launcher)
    )
    events: list[dict] = []
    report = run(
        plan, launcher, trace=path, tolerance=1e9, step_budget=0.5, check_budget=60, timeout=60, on_event=events.append
    )
    assert report.passed
    assert report.check is not None
    assert (report.check.layers, report.check.tokens, report.check.tolerance) == (5, 24, 1e-4)
    assert 0 < report.check.relative_error < 1e-4
    assert len(report.memory) == 2
    assert min(report.memory) > 0
    assert said(report) == ()
    assert [e["what"] for e in events if "done" not in e] == ["loading weights", "warming up", "checking 5 of 5 layers"]
    done = [e["done"] for e in events if "done" in e]  # not of every step: telling takes time too
    assert done == sorted(set(done))
    assert (done[0], done[-1]) == (1, report.repetitions)
    parts = {(p.layer, p.part): p for p in report.parts}
    always = {"attention", "expert"}  # predicted for every layer
    moe = always | {"route", "combine", "shared"}
    wanted = {
        0: always | {"dense"},
        1: moe | {"dispatch"},
        2: moe | {"dispatch"},
        3: moe | {"gather"},
        4: moe | {"dispatch"},
    }
    assert set(parts) == {(-1, "embed"), (-1, "head")} | {(i, part) for i in wanted for part in wanted[i]}
    assert all((p.measured > 0) == ((p.layer, p.part) != (0, "expert")) for p in report.parts)
    assert sum(p.measured for p in report.parts) == pytest.approx(report.step.measured, rel=0.5)
    assert Report.parse(report.to_json(), "report") == report


def test_decode_in_bf16_with_tensor_parallelism_and_shared_storage(launcher):
    plan = hand_made_plan(
        Model(**MODEL.model_dump(exclude={"blocks"}), blocks=MODEL.blocks[1:]),
        "decode:5@30",
        [EP, GATHERED],
        tokens=(2, 3),
        tensor=2,
        dtype="bf16",
        stored_layers=2,
        predicted=1000.0,
        **local(launcher),
    )
    report = run(plan, launcher, repetitions=3, tolerance=0.25, check_budget=1e-6, timeout=60)
    assert report.repetitions == 3
    assert report.check is not None
    assert report.check.passed
    assert report.check.layers == 1
    assert report.step.error > 100
    assert not report.passed  # the prediction was absurd
    assert said(report) == (
        "4 layers share the weights of 2: memory does not hold them all",
        "output checked after 1 of 4 layers: the reference's time is limited",
        "routing assumed: power law",
    )


def rank_of(number: int, hosts=("a", "a"), kind="cpu", share=1.0) -> Rank:
    return Rank(number, len(hosts), tuple(hosts), torch.device(kind), 1, share, lambda event: None)


@pytest.mark.beside
@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (rank_of(0, hosts=("a",)), "the plan is for 2 devices, there are 1 ranks"),
        (rank_of(0, hosts=("a", "b")), "device 1 is on host 'a', rank 1 is on 'b'"),
        (rank_of(1, kind="cuda"), "device 1 is cpu, the rank's cuda"),
        (rank_of(1, share=0.98), "device 1 may use 1 cores, the rank 0.98"),
    ],
)
def test_other_devices_are_refused(rank, message):
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), hosts=("a", "a"))
    verify_devices(plan, rank_of(0).seated())
    verify_devices(plan, rank_of(1, share=0.995).seated())
    verify_devices(plan, [Seated(), Seated()])  # nothing known yet but how many
    with pytest.raises(MoeplanError, match=message):
        verify_devices(plan, rank.seated())


@pytest.mark.beside
def test_another_trace_is_refused(tmp_path):
    ids = np.stack([np.arange(8).reshape(4, 2)] * 40)
    trace, other = Trace.of(ids, 8), Trace.of(ids[:, ::-1], 8)
    path = str(trace.write(tmp_path / "trace.npz"))
    source = RoutingSource(kind="trace", path=path, digest=trace.digest(), seed=2)
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), routing=source)
    assert np.array_equal(planned_trace(plan, None).expert_ids, ids)
    assert planned_trace(hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0)), None) is None
    other.write(tmp_path / "other.npz")
    with pytest.raises(MoeplanError, match="not the trace that the plan was made for"):
        planned_trace(plan, str(tmp_path / "other.npz"))
    with pytest.raises(MoeplanError, match=r"no such file"):
        planned_trace(plan, str(tmp_path / "missing.npz"))


@pytest.mark.beside
def test_what_can_be_refused_early_starts_no_ranks(tmp_path):
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0))
    with pytest.raises(MoeplanError, match=r"missing\.npz: no such file"):
        run(plan, None, trace=tmp_path / "missing.npz")
    with pytest.raises(MoeplanError, match="weights of family 'test' cannot be read"):
        run(plan, None, weights_folder=tmp_path)


@pytest.mark.beside
@pytest.mark.parametrize(
    ("devices", "message"),
    [
        ({"hosts": ("a", "a")}, "the plan's device 0 is on host 'a', rank 0 is on "),
        ({"cpu_share": 77.0}, "the plan's device 0 may use 77 cores"),
    ],
)
def test_other_devices_are_refused_before_ranks_start(monkeypatch, launcher, devices, message):
    monkeypatch.setattr(Supervisor, "run", lambda *_: pytest.fail("ranks were started"))
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), **(local(launcher) | devices))
    with pytest.raises(MoeplanError, match=message):
        run(plan, launcher)
    with pytest.raises(MoeplanError, match="the plan is for 2 devices, there are 1 ranks"):
        run(plan, LocalLauncher(1))


@pytest.mark.beside
def test_a_lab_of_other_devices_is_not_opened(monkeypatch, tmp_path):
    monkeypatch.setattr(Lab, "__init__", lambda *_: pytest.fail("a lab was opened"))
    (tmp_path / "lab.yaml").write_text("name: l\nhosts: [{name: b, ranks: 2, cpu_share: 0.25}]\n")
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), hosts=("a", "a"))
    with (
        pytest.raises(MoeplanError, match="the plan's device 0 is on host 'a', rank 0 is on 'b'"),
        choose_launcher(tmp_path / "lab.yaml", 2, "cpu", plan=plan),
    ):
        pytest.fail("a launcher was given")


@pytest.mark.beside
def test_too_few_ranks_of_torchrun_are_refused_before_they_meet(monkeypatch):
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("moeplan.runtime.launch.environment.meet", lambda *_: pytest.fail("ranks met"))
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0))
    with choose_launcher() as launcher, pytest.raises(MoeplanError, match="there are 1 ranks"):
        run(plan, launcher)


@pytest.mark.beside
def test_a_rank_refuses_before_it_loads():
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), hosts=("a", "elsewhere"))
    job = Job(plan.to_json(), None, None, repetitions=None, step_budget=1, check_budget=1)
    with pytest.raises(MoeplanError, match="the plan's device 1 is on host 'elsewhere'"):
        run_plan(rank_of(0), job.to_json())


@pytest.mark.beside
def test_report_takes_the_slowest_device_and_the_mean_of_parts():
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), predicted=0.2)
    part = {"layer": 1, "part": "expert", "seconds": [0.1, 0.1, 0.4]}
    base = {"memory": 5, "environment": {"torch": "x"}, "check": {"layers": 5, "error": 1e-3}}
    base |= {"load": {"seconds": 1.0, "foreign": 0.1}, "probes": [[], []], "laps": [], "reads": []}
    results = [base | {"steps": [0.2, 0.1, 0.3], "parts": [part]}, base | {"steps": [0.1, 0.4, 0.2], "parts": []}]
    report = assemble(plan, results, 0.5)
    assert (report.step.predicted, report.step.measured) == (0.2, 0.3)
    assert report.step.error == pytest.approx(-1 / 3)
    expert = next(p for p in report.parts if (p.layer, p.part) == (1, "expert"))
    assert (expert.predicted, expert.measured) == (pytest.approx(0.02), 0.05)
    assert expert.spread == pytest.approx((0.17 - 0.05) / 0.05)
    assert not report.passed  # the step is within 50 %, the output is not
    good = [r | {"check": {"layers": 5, "error": 1e-5}} for r in results]
    assert assemble(plan, good, 0.5).passed
    assert not assemble(plan, good, 0.3).passed


@pytest.mark.beside
def test_the_machine_is_compared_with_its_profile_and_the_prediction_re_scaled():
    points = (
        ProbePoint(kind="compute", operator="expert_ffn", at={"tokens": 128}, seconds=(1e-3, 2e-3)),
        ProbePoint(kind="memory", operator="expert_ffn", at={"tokens": 1}, seconds=(1e-3, 1e-3)),
        ProbePoint(kind="exchange", operator="all_to_all", at={"bytes": 65536}, seconds=(1e-4, 1e-4)),
    )
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), predicted=0.2)
    parts = {"attention": 0.02, "dispatch": 0.06}
    predicted = plan.predicted.model_copy(update={"layers": (LayerPrediction(layer=0, parts=parts),)})
    quiet = Load(seconds=60, foreign=0.02)
    plan = plan.model_copy(update={"probes": points, "profile_load": quiet, "predicted": predicted})
    base = {"memory": 5, "environment": {}, "check": None, "parts": [], "steps": [0.5, 0.5], "laps": [], "reads": []}
    busy = {"seconds": 3.0, "foreign": 0.4, "steal": None}
    results = [
        base | {"load": busy | {"foreign": 0.1}, "probes": [[3e-3, 1e-3, 5e-4], [3e-3, 3e-3, 3e-4]]},
        base | {"load": busy, "probes": [[4e-3, 2e-3, 4e-4], [2e-3, 1e-3, 3e-4]]},
    ]
    report = assemble(plan, results, 10.0)
    machine = report.machine
    assert machine is not None
    assert machine.load.foreign == 0.4
    assert machine.profile_load == quiet
    # The slower device each time, the mean of before and after: 4 and 3 ms of 2; 2 and 3 of 1; 0.5 and 0.3 of 0.1.
    assert [probe.factor for probe in machine.probes] == [pytest.approx(x) for x in (1.75, 2.5, 4.0)]
    compute = (1.75 * 2.5) ** 0.5
    assert machine.rescaled is not None
    assert machine.rescaled.predicted == pytest.approx(0.2 * (0.25 * compute + 0.75 * 4.0))
    assert machine.rescaled.measured == report.step.measured
    (changed,) = machine_notes(report)
    assert "expert_ffn (compute) 1.75 times" in changed
    assert "all_to_all (exchange) 4.00 times" in changed
    assert report.notes[-1] == (
        "other programs used 40% of the cores while the steps were measured (2% during the profile); run again on an "
        "idle machine"
    )
    assert Report.parse(report.to_json(), "report") == report


@pytest.mark.beside
def test_an_unchanged_machine_is_worth_no_word():
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), predicted=0.2)
    point = ProbePoint(kind="compute", operator="expert_ffn", at={"tokens": 128}, seconds=(1e-3, 1e-3))
    plan = plan.model_copy(update={"probes": (point,), "profile_load": Load(seconds=60, foreign=0.3)})
    base = {"memory": 5, "environment": {}, "check": None, "parts": [], "steps": [0.2], "laps": [], "reads": []}
    result = base | {"load": {"seconds": 3.0, "foreign": 0.04}, "probes": [[1.1e-3], [1.0e-3]]}
    report = assemble(plan, [result, result], 10.0)
    assert machine_notes(report) == []
    assert not any("other programs" in known for known in report.notes)
    assert report.machine is not None
    assert report.machine.rescaled is not None
    assert report.machine.rescaled.predicted == pytest.approx(0.21)


def test_a_short_run_times_the_probes_before_and_after_its_steps(launcher):
    point = {"at": {"ffn": 48, "experts": 2, "tokens": 4}, "seconds": (1e-5, 1e-5)}
    points = (
        ProbePoint(kind="compute", operator="expert_ffn", **point),
        ProbePoint(kind="exchange", operator="all_to_all", at={"bytes": 1024}, seconds=(1e-9, 1e-9)),
    )
    plan = hand_made_plan(MODEL, "prefill:24@8", [EP], tokens=(16, 8), **local(launcher))
    plan = plan.model_copy(update={"probes": points})
    report = run(plan, launcher, tolerance=1e9, repetitions=2, check_budget=60, timeout=60, probe=PROBE)
    assert report.machine is not None
    assert [(probe.operator, probe.kind) for probe in report.machine.probes] == [
        ("expert_ffn", "compute"),
        ("all_to_all", "exchange"),
    ]
    assert 1e-7 < report.machine.probes[0].measured < 1.0
    assert report.machine.probes[1].factor > 1000  # a millionth of a millisecond was promised
    assert report.machine.rescaled is not None
    assert report.machine.load.seconds > 0
    assert any("has changed" in note for note in machine_notes(report))


@pytest.mark.beside
def test_relative_error():
    a = torch.tensor([[1.0, -4.0]])
    assert relative_error(Output(a, None), Output(a, None)) == 0
    assert relative_error(Output(a, a), Output(a, a * 1.25)) == pytest.approx(0.2)
    assert relative_error(Output(a * torch.nan, None), Output(a, None)) == sys.float_info.max


@pytest.mark.beside
def test_checked_layers():
    plan = hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0))
    assert first_layers(MODEL, 2).moe_layers == (1,)
    plenty = 2**40
    assert checked_layers(plan, 1e6, plenty, 1.0, 1.0) == 5
    assert checked_layers(plan, 3 * 2 * (1 / 5 + 1 / 5), plenty, 1.0, 1.0) == 3
    assert checked_layers(plan, 1e-9, plenty, 1.0, 1.0) == 2  # the first layer with experts
    assert checked_layers(plan, 1e6, 1000, 1.0, 1.0) == 0


def test_own_routing_equals_the_reference_and_is_said(launcher):
    plan = hand_made_plan(MODEL, "prefill:24@8", [EP, SHARDED, GATHERED, EP], tokens=(16, 8), **local(launcher))
    report = run(plan, launcher, own_routing=True, tolerance=1e9, repetitions=2, check_budget=60, timeout=60)
    assert report.check is not None
    assert report.check.passed
    assert any("own routing" in note for note in report.notes)
    assert not any("assumed" in note for note in report.notes)
