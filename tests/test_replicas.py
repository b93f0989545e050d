"""Numbers of replicas: the integer program against all numbers."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers.replicas import Problem, choose_replicas
from moeplan.solvers.result import Infeasible


def best(problem: Problem, kinds: int | None) -> float | None:
    """The least cost of all counts; None where none is allowed."""
    costs = [
        float(np.dot(problem.cost, counts))
        for counts in product(*(range(int(m) + 1) for m in problem.most()))
        if (np.array(counts) @ problem.need <= problem.stock + 1e-9).all()
        and (kinds is None or np.count_nonzero(counts) <= kinds)
    ]
    return min(costs, default=None)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    forms = draw(st.integers(1, 4))
    rng = np.random.default_rng(draw(st.integers(0, 10**6)))
    gpus = rng.integers(0, 4, (forms, 2)).astype(float)
    gpus[gpus.sum(1) == 0, 0] = 1.0
    in_flight = rng.integers(1, 5, (forms, 1)).astype(float)
    stock = rng.integers(1, 6, 2).astype(float)
    cost = -rng.integers(0, 9, forms).astype(float)
    extra = draw(st.sampled_from(["none", "exact", "flow", "demand"]))
    if extra == "none":
        return Problem(cost, gpus, stock)
    if extra == "exact":
        total = float(draw(st.integers(1, 8)))
        return Problem(cost, np.hstack([gpus, in_flight, -in_flight]), np.array([*stock, total, -total]))
    if extra == "demand":
        return Problem(gpus.sum(1), np.hstack([gpus, -in_flight]), np.array([*stock, -float(draw(st.integers(1, 6)))]))
    flow = rng.integers(-3, 4, (forms, 1)).astype(float)
    return Problem(cost, np.hstack([gpus, flow]), np.array([*stock, 0.0]))


@settings(max_examples=120, deadline=None)
@given(problems(), st.sampled_from([None, 1, 2]))
def test_as_all_counts_say(problem: Problem, kinds: int | None) -> None:
    expected = best(problem, kinds)
    if expected is None:
        with pytest.raises(Infeasible):
            choose_replicas(problem, kinds)
        return
    found = choose_replicas(problem, kinds)
    assert found.status == "optimal"
    assert (found.assignment @ problem.need <= problem.stock + 1e-6).all()
    assert found.objective == pytest.approx(expected) == pytest.approx(float(problem.cost @ found.assignment))


def test_thousands_of_devices_are_counted_not_listed() -> None:
    need = np.array([[1.0, 0], [2, 0], [8, 0], [0, 1], [0, 8], [4, 4]])
    found = choose_replicas(Problem(-np.array([1.0, 2.2, 9.5, 0.3, 3.0, 6.5]), need, np.array([8000.0, 2000.0])))
    assert found.status == "optimal"
    assert -found.objective == pytest.approx(6.5 * 500 + 9.5 * 750)  # mixed ones use up the second kind


def test_a_form_without_a_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="no bound"):
        Problem(np.ones(1), -np.ones((1, 1)), np.ones(1))
