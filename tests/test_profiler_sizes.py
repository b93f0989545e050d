"""Which sizes are measured: few first, far apart, then a workload's own; and what the time is spent on."""

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.search import solve
from moeplan.profiler import operators as measuring
from moeplan.profiler.grids import Coordinates, Grid, Growth, Point, Step, steps
from moeplan.profiler.measure import Pace, Timing
from moeplan.profiler.operators import measure_operators
from moeplan.profiler.patience import IMPATIENT
from moeplan.profiler.profile import short
from moeplan.profiler.sizes import PREFILL, message_bytes, reaching, workload_steps
from moeplan.profiler.tasks import Task, tasks
from moeplan.spec.catalogue import load_model
from moeplan.spec.cluster import Cluster, OperatorCurve
from moeplan.spec.workload import Workload
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = load_model("tiny-moe")
PLAIN = Pace.of(False)
FLOPS, BYTES, CALL, BUILD = 5e9, 2e9, 3e-5, 0.05


class Machine:
    """A clock that measuring moves on: each point by what it takes."""

    def __init__(self, budget: float) -> None:
        self.budget, self.now = budget, 0.0
        self.spent: dict[str, float] = {}

    def left(self) -> float:
        return self.budget - self.now

    def growth(self, task: Task, bench: Any, workloads: Sequence[Workload] = ()) -> Growth:
        def visit(at: Coordinates) -> Point:
            hidden, each = task.block.hidden_size, task.work(at)
            if task.operator == "attention_prefill":
                seconds = each / FLOPS
            elif task.operator in ("expert_ffn", "dense_ffn"):
                seconds = 6 * hidden * each / FLOPS
            else:
                seconds = 4 * each * (1 if "attention" in task.operator else 4 * hidden) / BYTES
            taken = BUILD + PLAIN.cost(CALL + seconds)
            self.now += taken
            self.spent[task.operator] = self.spent.get(task.operator, 0.0) + taken
            return Point(Timing(CALL + seconds, 0.0, 3), CALL + seconds, BUILD)

        return Growth(task.grid_for(workloads), visit, PLAIN, work=task.work)


def profiled(
    monkeypatch: pytest.MonkeyPatch, budget: float, workloads: Sequence[Workload] = (), models: int = 1
) -> tuple[Machine, list[OperatorCurve]]:
    machine = Machine(budget)
    monkeypatch.setattr(measuring, "growth", machine.growth)
    several = [MODEL.model_copy(update={"name": f"{i}", "vocab_size": 256 + i}) for i in range(models)]
    work = tasks(several, ["f32"] * models, "aa")
    bench = SimpleNamespace(patience=IMPATIENT)
    found = measure_operators(work, bench, machine.left, lambda what: None, workloads=workloads)  # type: ignore[arg-type]
    return machine, found.curves


def furthest(curves: Sequence[OperatorCurve], operator: str) -> dict[str, float]:
    """Of the curve that reaches least."""
    ends = [{axis.name: axis.values[-1] for axis in entry.curve.axes} for entry in curves if entry.operator == operator]
    return {name: min(end[name] for end in ends) for name in ends[0]}


def test_the_usual_budget_reaches_prompts_of_2048_tokens(monkeypatch):
    machine, curves = profiled(monkeypatch, 35.0)
    assert furthest(curves, "attention_prefill")["length"] >= 2048
    assert furthest(curves, "attention_decode") == {"sequences": 64, "context": 2048}
    assert furthest(curves, "expert_ffn")["tokens"] >= 1024
    assert furthest(curves, "ep_pack")["tokens"] >= 2048
    assert machine.now <= 36.0


def test_a_small_budget_reaches_far_with_few_sizes(monkeypatch):
    _, plenty = profiled(monkeypatch, 300.0)
    _, curves = profiled(monkeypatch, 12.0)
    lengths = next(e.curve.axes[1].values for e in curves if e.operator == "attention_prefill")
    assert lengths[-1] >= 512
    assert len(lengths) < len(next(e.curve.axes[1].values for e in plenty if e.operator == "attention_prefill"))
    assert all(len(e.curve.axes[0].values) <= 3 for e in curves if e.operator in measuring.EXCHANGES)


def test_what_moves_tokens_does_not_take_the_time_of_attention_and_experts(monkeypatch):
    machine, _ = profiled(monkeypatch, 35.0)
    matter = machine.spent["attention_prefill"] + machine.spent["expert_ffn"] + machine.spent["attention_decode"]
    assert sum(machine.spent[name] for name in measuring.EXCHANGES) < 0.3 * machine.now
    assert matter > 0.5 * machine.now


@given(st.floats(0.0, 100.0))
@settings(deadline=None, max_examples=25)
def test_time_is_kept_but_for_what_is_needed(budget):
    with pytest.MonkeyPatch.context() as patch:
        needed, _ = profiled(patch, -1.0)
        machine, _ = profiled(patch, budget)
    assert machine.now <= budget + needed.now


def test_more_time_never_reaches_less_far(monkeypatch):
    ends = [furthest(profiled(monkeypatch, budget)[1], "attention_prefill")["length"] for budget in (1, 10, 40, 160)]
    assert ends == sorted(ends)
    assert ends[0] == 128


def growth_of(grid: Grid, fits: Callable[[Coordinates], bool] = lambda at: True) -> Growth:
    return Growth(grid, lambda at: Point(Timing(1e-4, 0.0, 3), 1e-4, 1.0), PLAIN, fits)


def test_early_sizes_come_at_once_where_there_is_time_and_no_others():
    grid = Grid({"tokens": 1}, steps("tokens", 64, 512, 2048, 16), needed=1, early=2)
    point = growth_of(grid)
    point.start()
    each = point.spent / 2
    for allowance, values in ((2.9 * each, {1, 64}), (3.1 * each, {1, 64, 512}), (100.0, {1, 64, 512, 2048})):
        growth = growth_of(grid)
        growth.start(allowance)
        assert set(growth.values["tokens"]) == values


def test_of_a_size_without_memory_the_largest_smaller_one_is_taken():
    growth = growth_of(Grid({"tokens": 1}, steps("tokens", 2048, 64, 512), needed=1), lambda at: at["tokens"] < 600)
    growth.start()
    assert growth.values["tokens"] == [1, 512]
    assert not growth.lacking  # nobody asked


def test_what_is_asked_for_and_too_large_is_told():
    grid = reaching(Grid({"tokens": 1}, steps("tokens", 64, 512), needed=1), steps("tokens", 10**6, 300))
    growths = [growth_of(grid, lambda at: at["tokens"] < 10**5), growth_of(grid), growth_of(grid)]
    for growth, most in zip(growths, (100.0, 4.5, 1e6), strict=True):
        growth.start(most=most)
        assert {64, 300} < set(growth.values["tokens"])
    assert [growth.lacking for growth in growths] == [[Step("tokens", 10**6)], [Step("tokens", 10**6)], []]
    (line,) = short(["route of tiny-moe at tokens 1,000,000"])
    assert "\n" not in line
    assert not short([])


def test_a_workloads_sizes_are_needed_and_may_lie_below_the_first():
    grid = reaching(PREFILL, [Step("length", 16), Step("sequences", 3)])
    assert grid.start == {"sequences": 1, "length": 16}
    assert {Step("length", 32), Step("length", 16), Step("sequences", 3)} <= set(grid.steps[: grid.needed])
    assert set(PREFILL.steps[: PREFILL.needed]) <= set(grid.steps[: grid.needed])
    assert set(PREFILL.steps) <= set(grid.steps)
    assert reaching(PREFILL, []) == PREFILL


def test_a_workloads_message_is_all_tokens_of_the_device_with_the_most():
    assert message_bytes(Workload.from_text("prefill:4096@512"), 2, 100) == 4096 * 100
    assert message_bytes(Workload.from_text("prefill:4096@512"), 4, 100) == 2048 * 100
    assert message_bytes(Workload.from_text("decode:9@7"), 4, 100) == 6 * 100


@pytest.mark.parametrize("workload", ["prefill:4096@512", "prefill:8@2", "decode:200@5000", "decode:1@0"])
def test_a_profile_for_a_workload_covers_its_sizes_whatever_the_time(monkeypatch, workload):
    asked = Workload.from_text(workload)
    _, curves = profiled(monkeypatch, -1.0, [asked])
    block = MODEL.moe_block()
    for entry in curves:
        values = {axis.name: axis.values for axis in entry.curve.axes}
        tensor = 4 // int(entry.shape["heads"]) if "heads" in entry.shape else 1
        for axis, value in workload_steps(entry.operator, asked, block, 2, tensor):
            assert value in values[axis], entry.operator
    phase = f"attention_{asked.phase}"
    assert furthest(curves, phase)["sequences"] >= min(asked.sequences, 2 * -(-asked.sequences // 2))


@pytest.mark.parametrize("workload", ["prefill:8192@1024", "prefill:16384", "decode:512@16384"])
def test_solve_names_what_lies_beyond_and_a_profile_with_that_command_covers_it(monkeypatch, workload):
    """Curves of a cluster are replaced by those that a profile measures on an ideal machine, without time and with the
    command of the note."""
    model = tiny_model(hidden=MODEL.layers[0].hidden_size)
    machines = cluster(model, ((1.0, 1.0),), tensors=(1,), memory=64 * 2**30)

    def measured_by(workloads: Sequence[Workload]) -> Cluster:
        machine = Machine(-1.0)
        monkeypatch.setattr(measuring, "growth", machine.growth)
        work = [task for task in tasks([model], ["f32"], ["a", "a"]) if task.tensor == 1]
        bench: Any = SimpleNamespace(patience=IMPATIENT)
        curves = measure_operators(work, bench, machine.left, lambda what: None, workloads=workloads).curves
        kinds = tuple(kind.model_copy(update={"operators": tuple(curves)}) for kind in machines.kinds)
        return machines.model_copy(update={"kinds": kinds})

    asked = Workload.from_text(workload)
    (note,) = (n for n in solve(model, measured_by([]), asked).notes if n.startswith("extrapolated: "))
    assert f"`moeplan profile --model tiny --workload {workload}" in note
    axis = "length" if workload == "prefill:8192@1024" else "sequences"
    assert f"attention_{asked.phase}" in note
    assert f"{axis} " in note
    left = [n for n in solve(model, measured_by([asked]), asked).notes if n.startswith("extrapolated: ")]
    assert not any("attention" in n or "expert_ffn" in n for n in left)
