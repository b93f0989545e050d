"""What searches tell while they run: the best so far, and the bound, of the numbers that the answer then holds."""

from typing import Any

import numpy as np
import pytest

from moeplan.planner.budget import Budget
from moeplan.planner.place import ready
from moeplan.planner.place.solve import place
from moeplan.planner.search import solve
from moeplan.service.jobs.progress import Progress
from moeplan.solvers.bounds.crossings import affinity_bounds
from moeplan.spec import Workload
from moeplan.tests.routings import chained_trace
from moeplan.tests.synthetic import cluster, tiny_model
from moeplan.tests.test_place_anytime import asked


@pytest.fixture(scope="module", autouse=True)
def loaded() -> None:
    ready.solvers_ready(None)


@pytest.mark.parametrize("hosts", [[0, 0, 1, 1], [0, 0, 0, 0]])
def test_bounds_that_are_told_rise_to_the_answer(hosts: list[int]) -> None:
    transitions = np.random.default_rng(0).random((3, 8, 8)) ** 3
    told: list[float] = []
    bounds = affinity_bounds(transitions, [2] * 4, hosts, 0.3, 1.3, steps=60, on_bound=told.append)
    assert len(told) > 3
    assert told == sorted(told)
    assert told[0] == pytest.approx(bounds["slots"])
    assert told[-1] == pytest.approx(max(bounds["slots"], bounds["triangle"]))


def test_a_placement_s_incumbent_and_bound_end_as_its_own() -> None:
    events: list[dict[str, Any]] = []
    trace = chained_trace(0, 6, 16, 1024, 2)
    found = place(trace, asked(16, steps=20_000), budget=Budget.of(120.0, on_event=events.append))
    best = [event["incumbent"] for event in events if "incumbent" in event]
    bounds = [event["bound"] for event in events if "bound" in event]
    assert len(bounds) > 2
    assert best[-1] == pytest.approx(found.solver.objective)
    assert min(best) >= found.solver.bound * (1 - 1e-9)
    assert bounds == sorted(bounds)
    assert max(bounds) <= found.solver.objective * (1 + 1e-9)
    assert max(bounds) == pytest.approx(found.solver.bound, rel=1e-6)
    assert any("bound" not in event and "incumbent" in event for event in events)  # while it searches
    progress = Progress()
    for event in events:
        progress.take(event)
    assert progress.body["points"][-1][1:] == [best[-1], bounds[-1]]


def test_a_plan_s_incumbent_falls_to_its_own() -> None:
    model, events = tiny_model(layers=2), list[dict[str, Any]]()
    plan = solve(
        model, cluster(model), Workload.from_text("decode:16@64"), budget=Budget.of(60.0, on_event=events.append)
    )
    best = [event["incumbent"] for event in events if "incumbent" in event]
    assert best
    assert best == sorted(best, reverse=True)
    assert best[-1] >= plan.solver.objective * (1 - 1e-9)
