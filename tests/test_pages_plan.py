"""What `solve` prints: short whatever the number of devices, and no more sure than it is."""

import io

import numpy as np
import pytest
from rich.console import Console

from moeplan.planner.search import solve
from moeplan.planner.units import lacking
from moeplan.service.pages.plan import candidates_table, memory_table, verdict
from moeplan.spec import Plan, Workload
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=2)


def printed(*renderables) -> str:
    console = Console(file=io.StringIO(), width=100)
    console.print(*renderables)
    return console.file.getvalue()  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def plan() -> Plan:
    """For 40 devices, half of them slower, with tokens that do not divide evenly."""
    machines = cluster(MODEL, ((1.0,) * 8, (0.5,) * 8, (1.0,) * 8, (0.5,) * 8, (1.0,) * 8))
    return solve(MODEL, machines, Workload.from_text("decode:100@64"), time_limit=60)


def test_tables_of_many_devices_are_short(plan: Plan) -> None:
    text = printed(memory_table(plan), candidates_table(plan))
    assert len(text.splitlines()) < 40
    assert "devices" in text
    assert " to " in text  # tokens, the least and the most


def test_few_devices_have_a_row_each() -> None:
    small = solve(MODEL, cluster(MODEL), Workload.from_text("decode:16@64"), time_limit=60)
    text = printed(memory_table(small))
    assert all(f"{i} on host{i // 2}" in text for i in range(4))


def test_a_search_that_was_cut_short_does_not_sound_sure(plan: Plan) -> None:
    whole = verdict(plan).plain
    assert "cut short" not in whole
    record = plan.solver.model_copy(
        update={
            "status": "time_limit",
            "gap": 0.2,
            "space": "the first 3 of 9 combinations, where the bound holds, of x",
        }
    )
    text = verdict(plan.model_copy(update={"solver": record})).plain
    assert "cut short, other plans may be much faster; at most 20 % could be saved in the first 3 of 9" in text


def test_shortages_of_many_devices_are_one_line() -> None:
    missing = [0, 5, 2**20, 7, 9, 3, 1]
    assert lacking(np.array(missing)) == (
        "does not fit: device 2 lacks 1.00 MiB, device 4 lacks 9 B, device 3 lacks 7 B, device 1 lacks 5 B"
        " and 2 more devices lack memory"
    )
    assert lacking(np.array([0, 5])) == "does not fit: device 1 lacks 5 B"


def test_what_was_not_measured_is_named() -> None:
    machines = cluster(MODEL)
    kept = tuple(entry for entry in machines.collectives if entry.members != (2,))
    without = machines.model_copy(update={"collectives": kept})
    step = Workload.from_text("decode:16@64")
    assert not any("for want of curves" in note for note in solve(MODEL, machines, step).notes)
    assert any("for want of curves: tensor degree 2" in note for note in solve(MODEL, without, step).notes)
