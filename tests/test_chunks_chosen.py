"""How many chunks a search chooses, for each strategy whose tokens may travel in several."""

import pytest

from moeplan.planner.chunking import COUNTS
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.spec import Workload
from moeplan.spec.plan import CHUNKED
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=1, hidden=256, ffn=512, top_k=4)
SPEEDS = ((1.0, 1.0), (1.0, 1.0))
PROMPTS = Workload.from_text("prefill:4096@64")
LIMIT = 250.0  # seconds that no search here needs


@pytest.mark.parametrize("strategy", ["hierarchical", "sharded"])
def test_no_other_number_of_chunks_is_predicted_faster(strategy):
    """Where links take about as long as the experts, and messages are large."""
    machines = cluster(MODEL, SPEEDS, uplink=2e9, local=2e9, busy=0.5)
    plan = solve(MODEL, machines, PROMPTS, strategy=strategy, time_limit=LIMIT)
    step = Step.of(plan, machines)
    tried = {
        count: step.seconds([layer.model_copy(update={"chunks": count}) for layer in plan.layers]) for count in COUNTS
    }
    assert plan.predicted.step_seconds <= min(tried.values()) * (1 + 1e-9)
    assert plan.predicted.step_seconds < 0.98 * tried[1]
    assert {layer.chunks for layer in plan.layers} <= set(COUNTS[1:])
    assert "2, 4 or 8 chunks" in plan.solver.space
    assert step.timeline(plan.layers).makespan == pytest.approx(plan.predicted.step_seconds, rel=1e-9)
    assert plan.solver.bound <= plan.predicted.step_seconds


@pytest.mark.parametrize("strategy", CHUNKED)
def test_few_tokens_travel_at_once(strategy):
    plan = solve(MODEL, cluster(MODEL, SPEEDS), Workload.from_text("decode:16@64"), strategy=strategy, time_limit=LIMIT)
    assert {layer.chunks for layer in plan.layers} == {1}


def test_a_free_choice_is_no_slower_than_any_strategy_in_chunks():
    machines = cluster(MODEL, SPEEDS, uplink=2e9, local=2e9, busy=0.0)
    plan = solve(MODEL, machines, PROMPTS, time_limit=LIMIT)
    for strategy in CHUNKED:
        alone = solve(MODEL, machines, PROMPTS, strategy=strategy, time_limit=LIMIT)
        assert plan.predicted.step_seconds <= alone.predicted.step_seconds * (1 + 1e-9)


def test_even_plans_travel_at_once():
    machines = cluster(MODEL, SPEEDS, uplink=2e9, local=2e9, busy=0.0)
    plan = solve(MODEL, machines, PROMPTS, strategy="hierarchical", even=True, time_limit=LIMIT)
    assert {layer.chunks for layer in plan.layers} == {1}
    assert "chunks" not in plan.solver.space
