"""The search: heterogeneity is used, limits are kept, nothing searched is better, and the proof holds."""

import functools
import itertools
from dataclasses import replace

import numpy as np
import pytest
from rich.console import Console

from moeplan.planner.budget import Budget
from moeplan.planner.costs import Costs
from moeplan.planner.search import USABLE, solve
from moeplan.planner.space import Search
from moeplan.planner.splits import FfnSplits, layouts, tensor_degrees
from moeplan.planner.step import Step
from moeplan.planner.units import bytes_text, seconds_text
from moeplan.service.pages.plan import breakdown_table, candidates_table, memory_table, verdict
from moeplan.spec import Plan, Trace, Workload
from moeplan.spec.errors import InfeasibleError, MissingCurveError, MoeplanError
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.synthetic import cluster, tiny_model

PREFILL, DECODE = Workload.from_text("prefill:256@32"), Workload.from_text("decode:16@512")
MODEL = tiny_model(layers=2)
EVEN, UNEVEN = ((1.0, 1.0), (1.0, 1.0)), ((1.0, 1.0), (0.4, 0.4))


@functools.cache
def solved(speeds=UNEVEN, workload=PREFILL, late=0.0, **options):
    return solve(MODEL, cluster(MODEL, speeds, late=late), workload, **options)


@pytest.fixture
def plan():
    return solved()


@pytest.mark.parametrize("late", [0.0, 1e-4])
@pytest.mark.parametrize("workload", [PREFILL, DECODE], ids=str)
@pytest.mark.parametrize("speeds", [EVEN, UNEVEN, ((1.0,),), ((1.0, 0.2),)], ids=str)
def test_a_plan_is_complete_and_never_worse_than_any_candidate(speeds, workload, late):
    machines, found = cluster(MODEL, speeds, late=late), solved(speeds, workload, late)
    best = min(c.step_seconds for c in found.candidates if c.step_seconds is not None)
    assert found.predicted.step_seconds == found.solver.objective == best
    assert Step.of(found, machines).seconds(list(found.layers)) == pytest.approx(found.solver.objective)
    assert 0 < found.solver.bound <= found.solver.objective
    assert found.solver.status in ("optimal", "feasible")
    kinds = {c.name.split(" (")[0] for c in found.candidates}
    levels = {"all hierarchical"} if speeds in (EVEN, UNEVEN) else set()  # several hosts of several devices
    decodes = {"all coherent"} if workload.phase == "decode" else set()
    usual = {"all ep", "all sharded", "all gathered", "mixed", "linear ep", "greedy ep"}
    assert kinds == usual | levels | decodes
    assert found.baselines.keys() == {"linear ep", "greedy ep"}
    assert Plan.parse(found.to_json(), "plan") == found
    assert all(m.total <= m.limit for m in found.predicted.memory)
    assert sum(sum(part.parts.values()) for part in found.predicted.layers) <= found.solver.objective * (1 + 1e-9)


def test_the_same_inputs_give_the_same_plan(plan):
    other = solve(MODEL, cluster(MODEL, UNEVEN), PREFILL)
    assert other.model_copy(update={"solve_seconds": plan.solve_seconds}) == plan
    assert plan.solver.gap < 0.01


def test_another_seed_draws_other_tokens(plan):
    other = solved(seed=1)
    assert other.routing.seed == other.seed == 1
    assert other.predicted.step_seconds != plan.predicted.step_seconds


@pytest.mark.parametrize("late", [0.0, 1e-4, 1e-2])
def test_the_bound_holds_for_plans_nobody_chose(late):
    """Mixtures of plans that every space has as options, in every layout, are never predicted below the bound."""
    machines, found = cluster(MODEL, UNEVEN, late=late), solved(late=late)
    linear = ((0, 1), (2, 3), (4, 5), (6, 7))
    options = [
        LayerPlan(strategy="ep", slots=linear),
        LayerPlan(strategy="ep", slots=(tuple(range(8)),) * 4),
        LayerPlan(strategy="hierarchical", slots=linear),
        LayerPlan(strategy="sharded", slots=((),) * 4, split=(32,) * 4),
        LayerPlan(strategy="gathered", slots=linear),
    ]
    costs = Costs(machines, MODEL, "f32")
    routing = draw_routing(None, MODEL, PREFILL, 0)
    for layout in layouts(costs, MODEL, PREFILL, routing).values():
        step = Step(costs, MODEL, layout, routing)
        for plans in itertools.product(options, repeat=2):
            assert step.seconds(list(plans)) >= found.solver.bound * (1 - 1e-9)


@pytest.mark.parametrize("strategy", ["ep", "hierarchical", "sharded", "gathered"])
def test_a_forced_strategy_is_used_everywhere(strategy):
    found = solved(strategy=strategy)
    assert {layer.strategy for layer in found.layers} == {strategy}
    searched = [c for c in found.candidates if c.name not in found.baselines]
    assert all(set(c.strategies) == {strategy} for c in searched)
    assert solved().solver.objective <= found.solver.objective * (1 + 1e-12)


def test_slow_devices_get_less():
    speeds = ((1.0, 1.0), (0.25, 0.25))
    found = solve(MODEL, cluster(MODEL, speeds), PREFILL, strategy="sharded")
    assert min(found.tokens[:2]) > max(found.tokens[2:])
    for layer in found.layers:
        assert min(layer.split[:2]) > max(layer.split[2:])
    machines = cluster(MODEL, speeds, uplink=1e11)
    experts = solve(MODEL, machines, PREFILL, strategy="ep")
    assert experts.solver.objective < 0.8 * experts.baselines["linear ep"]
    layers = zip(Step.of(experts, machines).layers, experts.layers, strict=True)
    rows = sum(layer.choices.dispatch([plan]).experts.devices[0].sum(1) for layer, plan in layers)
    assert rows[:2].min() > rows[2:].max()


def test_the_split_of_columns_beats_the_even_one_and_keeps_to_memory():
    machines = cluster(MODEL, ((1.0, 0.5), (0.25, 0.25)))
    costs = Costs(machines, MODEL, "f32")
    counts = np.full((1, 8), 64)
    splits = FfnSplits(costs, MODEL, [0], counts)
    even, best = splits.within(np.full(4, 1e12))
    assert even == (32, 32, 32, 32)

    def slowest(split):
        return costs.expert_ffn(MODEL.moe_block(), split, np.tile(counts, (4, 1)), np.arange(4)).max()

    assert slowest(best) < 0.75 * slowest(even)
    column = 8 * 3 * 64 * 4
    tight = splits.within(np.array([40, 64, 64, 64]) * column)[-1]
    assert tight[0] <= 40
    assert sum(tight) == 128


def test_a_slow_uplink_keeps_tokens_at_home_and_a_fast_one_lets_them_travel():
    """Few tokens over a thin wire travel cheaper than weights; with long prompts it is the weights that travel less."""
    model = tiny_model(layers=2, experts=4, ffn=64)
    short = solve(model, cluster(model, uplink=1e8), Workload.from_text("decode:4@64"), memory_bytes=10**8)
    gathered = min(c.step_seconds for c in short.candidates if c.name.startswith("all gathered"))
    assert short.solver.objective < gathered
    long = solve(model, cluster(model, uplink=2e7, local=2e7), Workload.from_text("prefill:4096@256"), time_limit=60)
    best = {
        kind: min(c.step_seconds for c in long.candidates if c.name.startswith(kind))
        for kind in ("all gathered", "all sharded")
    }
    assert best["all gathered"] < best["all sharded"]


def test_tensor_degrees_need_curves_groups_inside_a_host_and_divisible_heads():
    machines = cluster(MODEL, EVEN)
    assert tensor_degrees(Costs(machines, MODEL, "f32"), MODEL) == [1, 2]
    without = machines.model_copy(update={"collectives": tuple(c for c in machines.collectives if c.members != (2,))})
    assert tensor_degrees(Costs(without, MODEL, "f32"), MODEL) == [1]
    assert tensor_degrees(Costs(cluster(MODEL, ((1.0,), (1.0,))), MODEL, "f32"), MODEL) == [1]


def test_a_limit_is_kept_and_its_lack_is_named():
    machines = cluster(MODEL, EVEN)
    ample = solved(EVEN)
    need = max(m.total for m in ample.predicted.memory)
    tight = solved(EVEN, memory_bytes=need - 1)
    assert max(m.total for m in tight.predicted.memory) < need
    assert {m.limit for m in tight.predicted.memory} == {need - 1} == {d.memory_bytes for d in tight.devices}
    assert tight.solver.objective >= ample.solver.objective
    assert tight.stored_layers == 2
    with pytest.raises(InfeasibleError, match=r"device 0 lacks [\d.]+ [KM]iB.*limit of 300\.00 KiB.*raise --memory"):
        solve(MODEL, machines, PREFILL, memory_bytes=300 * 1024)


def test_unequal_memory_is_used_unequally():
    """Device 3 lacks half of its even share of the columns: others take them."""
    ample = solved(EVEN, strategy="sharded")
    assert {layer.split for layer in ample.layers} == {(32,) * 4}
    held = ample.predicted.memory[3]
    memory = [2**30, 2**30, 2**30, int((held.total - 2 * 0.5 * 8 * 3 * 64 * 32 * 4) / USABLE)]
    found = solve(MODEL, cluster(MODEL, memory=memory), PREFILL, strategy="sharded")
    assert found.stored_layers == 2
    assert sum(layer.split[3] for layer in found.layers) < 64
    assert found.predicted.memory[3].total <= int(USABLE * memory[3])


def test_a_model_that_does_not_fit_shares_storage_and_says_so():
    model = tiny_model(layers=12, experts=16, ffn=512)
    workload = Workload.from_text("decode:16@64")
    found = solve(model, cluster(model, ((1.0, 1.0),), memory=20 * 2**20), workload)
    assert 1 < found.stored_layers < 12
    said = f"share the weights of {found.stored_layers}"
    assert any(note.startswith("MEMORY") and said in note for note in found.notes)
    assert all(m.total <= m.limit for m in found.predicted.memory)
    for i, layer in enumerate(found.layers):
        assert layer == found.layers[i % found.stored_layers]
    fitting = {c.name.split(" (")[0] for c in found.candidates if c.step_seconds is not None}
    assert {"all ep", "all sharded", "all gathered"} <= fitting
    with pytest.raises(InfeasibleError, match="even with weights for one layer only"):
        solve(model, cluster(model, memory=2**20), workload)


def test_layers_that_differ_cannot_share_storage():
    model = tiny_model(layers=4, dense=1)
    with pytest.raises(InfeasibleError, match="weights for 5 layers only"):
        solve(model, cluster(model, memory=10**6), DECODE)


def test_a_trace_is_followed_and_its_source_recorded(plan):
    ids = np.zeros((400, 2, 2), np.int32)
    ids[:, :, 1] = 1  # every token uses experts 0 and 1
    trace = Trace.of(ids, 8, seq_len=np.array([200, 200]))
    found = solve(MODEL, cluster(MODEL, EVEN), PREFILL, trace, trace_path="t.npz", strategy="ep", memory_bytes=10**9)
    assert (found.routing.kind, found.routing.path, found.routing.digest) == ("trace", "t.npz", trace.digest())
    assert found.digests["trace"] == trace.digest()
    assert not any("assumed" in note for note in found.notes)
    assert found.solver.objective < 0.9 * found.baselines["linear ep"]  # which has both experts on one device
    assert plan.routing.kind == "assumed"
    assert "(r + 1) ** -0.5" in plan.routing.assumption
    assert any("assumed" in note for note in plan.notes)
    counts = solve(MODEL, cluster(MODEL, EVEN), PREFILL, Trace.of_counts(np.ones((2, 8))))
    assert counts.routing.kind == "trace"
    assert any("counts only" in note for note in counts.notes)


def test_extrapolation_is_noted():
    found = solve(MODEL, cluster(MODEL, ((1.0,),)), Workload.from_text("prefill:16384@256"))
    assert any(note.startswith("extrapolated: ") for note in found.notes)


def test_the_time_limit_is_a_ceiling_and_is_said():
    found = solved(time_limit=1e-6)
    assert found.solver.status == "time_limit"
    assert "1 of " in found.solver.space
    assert any("time limit" in note for note in found.notes)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"strategy": "magic"}, "strategy 'magic': expected one of ep, hierarchical, sharded, gathered"),
        ({"dtype": "f64"}, "dtype 'f64'"),
        ({"memory_bytes": 0}, "memory 0: expected a positive number"),
        ({"time_limit": 0}, "time limit 0"),
        ({"dtype": "bf16"}, "moeplan profile --model tiny --dtype bf16"),
        (
            {"trace": Trace.of(np.zeros((4, 3, 1), np.int32), 8)},
            "has 3 layers x 8 experts, top-1; tiny has 2 x 8, top-2",
        ),
    ],
)
def test_bad_arguments_are_one_line(arguments, named):
    with pytest.raises(MoeplanError) as error:
        solve(MODEL, cluster(MODEL, EVEN), PREFILL, **arguments)
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_cluster_measured_for_another_model_is_refused():
    other = tiny_model(layers=2, hidden=128)
    with pytest.raises(MissingCurveError, match="moeplan profile --model tiny"):
        solve(other, cluster(MODEL, EVEN), PREFILL)


def text(renderable, width=200):
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()


def test_the_tables_show_what_was_decided(plan):
    table = text(candidates_table(plan))
    for kind in ("all ep", "all sharded", "all gathered", "linear ep", "greedy ep"):
        assert kind in table
    assert seconds_text(plan.solver.objective) in table
    assert " ".join(map(str, plan.tokens)) in table
    parts = text(breakdown_table(plan))
    assert {"attention", "expert", "step"} <= set(parts.split())
    memory = text(memory_table(plan))
    assert "3.60 GiB" in memory
    assert text(memory_table(plan), 80).split() == memory.split()  # nothing is cut, nor goes on in a second line
    said = str(verdict(plan))
    assert f"{plan.baselines['linear ep'] / plan.solver.objective:.2f}x faster than linear ep" in said
    assert plan.solver.space in said


def test_candidates_that_do_not_fit_come_last_with_the_reason():
    need = max(m.total for m in solved(EVEN).predicted.memory)
    tight = solved(EVEN, memory_bytes=need - 1)
    assert any(c.reason.startswith("does not fit: device") for c in tight.candidates)
    assert "does not fit" in text(candidates_table(tight))


def test_quantities_are_readable():
    assert [seconds_text(s) for s in (12.34, 0.0567, 8.9e-6)] == ["12.3 s", "56.7 ms", "8.9 us"]
    assert [bytes_text(b) for b in (3, 2048, 5 << 20, -(3 << 30))] == ["3 B", "2.00 KiB", "5.00 MiB", "-3.00 GiB"]


def test_even_treats_unequal_devices_alike():
    plain = solve(MODEL, cluster(MODEL, UNEVEN), PREFILL, even=True)
    assert len(set(plain.tokens)) == 1
    assert all(len(set(layer.split)) == 1 for layer in plain.layers if layer.split)
    assert solve(MODEL, cluster(MODEL, UNEVEN), PREFILL).solver.objective <= plain.solver.objective


def test_ctrl_c_keeps_what_was_found():
    def stop(event):
        if event["done"] == 1:
            raise KeyboardInterrupt

    found = solve(MODEL, cluster(MODEL, UNEVEN), PREFILL, budget=Budget.of(60.0, on_event=stop))
    assert found.solver.status == "time_limit"
    assert any(note.startswith("stopped: 1 of") for note in found.notes)
    with pytest.raises(KeyboardInterrupt):
        solve(MODEL, cluster(MODEL, UNEVEN), PREFILL, budget=Budget.of(60.0, on_event=lambda _: stop({"done": 1})))


def test_no_time_limit_is_as_good_as_enough():
    """Under a limit of memory, where programs are solved, which want a finite limit."""
    memory_bytes = int(0.9 * max(m.total for m in solved().predicted.memory))
    endless, enough = (solved(memory_bytes=memory_bytes, time_limit=limit) for limit in (float("inf"), 60.0))
    assert endless.solver == enough.solver
    assert endless.layers == enough.layers


def test_a_budgets_stop_ends_the_search_and_is_no_time_limit():
    budget = Budget.of(60.0)
    budget.on_event = lambda event: budget.stop.set() if event["done"] == 1 else None
    found = solve(MODEL, cluster(MODEL, UNEVEN), PREFILL, budget=budget)
    assert found.solver.status == "time_limit"
    notes = [note for note in found.notes if note.startswith("stopped: ")]
    assert any("of " in note and "combinations" in note for note in notes)
    assert not any("--time-limit" in note for note in found.notes)


def test_a_search_made_from_another_begins_anew():
    first = Search(
        costs=Costs(cluster(MODEL, EVEN), MODEL, "f32"),
        model=MODEL,
        workload=PREFILL,
        routing=draw_routing(None, MODEL, PREFILL, 0),
        limits=[2**40] * 4,
        strategies=("ep",),
        stored=2,
        even=False,
        seed=0,
        budget=Budget.of(60.0),
    )
    first.run()
    assert first.choices
    assert first.searched == first.spaces
    other = replace(first, stored=1)
    assert (other.stored, other.choices, other.searched, other.spaces) == (1, [], 0, 0)
    assert other.bound == float("inf")
    assert other.budget is first.budget
    assert len(other.classes.members) == 1
    other.run()
    again = replace(first, stored=1)
    again.run()
    assert [c.seconds for c in other.choices] == [c.seconds for c in again.choices]
