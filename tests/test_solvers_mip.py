import os
import subprocess
import sys
import tempfile
import warnings

import numpy as np
import pulp
import pytest

from moeplan.solvers import NotFound, SolverUnavailable, mip

BACK_ENDS = ["highs", "cbc", "cp_sat"]


def knapsack(values, weights, limit, *, most=3):
    """Maximise value under a weight, as a minimisation; whole numbers, bounded variables."""
    problem = pulp.LpProblem("knapsack", pulp.LpMinimize)
    x = [problem.add_variable(f"x_{i}", 0, most, cat="Integer") for i in range(len(values))]
    problem.setObjective(pulp.lpSum(-v * xi for v, xi in zip(values, x, strict=True)))
    problem += pulp.lpSum(w * xi for w, xi in zip(weights, x, strict=True)) <= limit
    return problem, x


@pytest.mark.parametrize("solver", BACK_ENDS)
@pytest.mark.parametrize("unit", [1, 1e-7, 1e7])
@pytest.mark.parametrize("size", [1, 10**10 + 1])
def test_back_ends_agree_whatever_the_units(solver, unit, size):
    problem, x = knapsack([5 * unit, 4 * unit, 3 * unit], [5 * size, 4 * size, 2 * size], 11 * size)
    outcome = mip.solve(problem, solver=solver)
    assert [round(v.varValue) for v in x] == [1, 0, 3]
    assert outcome.status == "optimal"
    assert outcome.bound == pytest.approx(-14 * unit, rel=1e-6)


@pytest.mark.parametrize("solver", BACK_ENDS)
def test_what_is_called_optimal_is(solver):
    # HiGHS 1.14 presolves this to 15 (ERGO-Code/HiGHS#3043); such a version must not pass unnoticed.
    problem = pulp.LpProblem("singleton", pulp.LpMinimize)
    x, z = problem.add_variable("x", 0, 10), problem.add_variable("z", 0, 10, cat="Integer")
    problem.setObjective(2 * x + 3 * z)
    problem += 2 * x + 2 * z >= 8
    assert mip.solve(problem, solver=solver).bound == pytest.approx(8)
    assert (x.varValue, z.varValue) == pytest.approx((4, 0))


@pytest.mark.parametrize("solver", BACK_ENDS)
def test_infeasible_is_an_outcome(solver):
    problem, x = knapsack([1], [1], 2)
    problem += x[0] >= 3
    assert mip.solve(problem, solver=solver).status == "infeasible"


@pytest.mark.parametrize("solver", BACK_ENDS)
def test_time_limit_without_a_solution_says_so(solver):
    # Market split: equalities that no back end satisfies in a hundredth of a second.
    problem = pulp.LpProblem("market", pulp.LpMinimize)
    x = [problem.add_variable(f"x_{i}", 0, 1, cat="Binary") for i in range(50)]
    problem.setObjective(pulp.lpSum(x))
    for weights in np.random.default_rng(0).integers(0, 100, (5, 50)).tolist():
        problem += pulp.lpSum(w * xi for w, xi in zip(weights, x, strict=True)) == sum(weights) // 2
    with pytest.raises(NotFound, match=rf"{solver} found no solution within 0.01 s"):
        mip.solve(problem, solver=solver, time_limit=0.01)


def test_no_file_is_left_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for solver in BACK_ENDS:
            mip.solve(knapsack([5, 4], [2, 3], 7)[0], solver=solver)
    assert os.listdir(tmp_path) == []


def test_unknown_solver_names_the_choices():
    with pytest.raises(SolverUnavailable, match=r"unknown solver 'magic': choose one of .*cp_sat.*highs"):
        mip.solve(knapsack([1], [1], 1)[0], solver="magic")


@pytest.mark.parametrize(("solver", "install"), [("mosek", "pip install mosek"), ("GLPK_CMD", "GLPK's `glpsol`")])
def test_missing_solver_names_what_to_install(solver, install, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SolverUnavailable, match=f"'{solver}' is not installed: .*{install}"):
        mip.solve(knapsack([1], [1], 1)[0], solver=solver)


def test_missing_ortools_names_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ortools.sat.python", None)
    with pytest.raises(SolverUnavailable, match="'cp_sat' cannot be loaded: pip install"):
        mip.solve(knapsack([1], [1], 1)[0], solver="cp_sat")


def test_names_are_forgiving():
    for name in ("HiGHS", "HIGHS", "highs"):
        assert mip.choose_solver(name, 1.0, 0).name == "HiGHS"
    for name in ("cbc", "PULP_CBC_CMD"):
        assert mip.choose_solver(name, 1.0, 0).name == "PULP_CBC_CMD"


def test_cp_sat_refuses_what_it_cannot_state_exactly():
    with pytest.raises(ValueError, match="not whole numbers"):
        mip.solve(knapsack([1], [0.5], 1)[0], solver="cp_sat")


@pytest.mark.parametrize("bounds", [(0, None), (None, 1), (-1, 1)])
def test_variables_need_finite_bounds(bounds):
    problem = pulp.LpProblem("open", pulp.LpMinimize)
    problem.setObjective(problem.add_variable("x", *bounds) + 0)
    with pytest.raises(ValueError, match="x needs finite bounds"):
        mip.solve(problem)


@pytest.mark.parametrize("solver", BACK_ENDS)
@pytest.mark.parametrize("size", [1, 10**11])
def test_large_continuous_variables_keep_their_meaning(solver, size):
    # Whichever x covers the demand, `most` holds the larger: coefficients of 1 beside 10**11 must not be dropped.
    problem = pulp.LpProblem("cover", pulp.LpMinimize)
    x = [problem.add_variable(f"x_{i}", 0, 1, cat="Binary") for i in range(3)]
    most = problem.add_variable("most", 0, 9 * size)
    problem.setObjective(most + 0)
    for xi, own in zip(x, (7, 5, 9), strict=True):
        problem += own * size * xi <= most
    problem += pulp.lpSum(x) >= 2
    assert mip.solve(problem, solver=solver).bound == pytest.approx(7 * size, rel=1e-6)
    assert most.varValue == pytest.approx(7 * size, rel=1e-6)


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf")])
def test_time_limit_must_be_positive(limit):
    with pytest.raises(ValueError, match="time_limit"):
        mip.solve(knapsack([1], [1], 1)[0], time_limit=limit)


def test_highs_needs_no_folder(monkeypatch):
    """What is not made is not left behind by a kill."""

    def made(*_: object, **__: object) -> None:
        raise AssertionError("a temporary folder was made")

    monkeypatch.setattr(tempfile, "mkdtemp", made)
    assert mip.solve(knapsack([5, 4], [2, 3], 7)[0], solver="highs").status == "optimal"


def test_nothing_is_printed() -> None:
    """HiGHS 1.16.0 writes two lines to standard output when a process makes its first solver."""
    source = """
import pulp
from moeplan.solvers import mip
problem = pulp.LpProblem("a", pulp.LpMinimize)
problem.setObjective(3 * problem.add_variable("x", 1, 10, cat="Integer"))
print(mip.solve(problem).bound)
"""
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=120)
    assert (done.stdout, done.stderr) == ("3.0\n", "")


def test_a_closed_standard_output_is_no_obstacle() -> None:
    source = "import os, sys\nos.close(1)\nfrom moeplan.solvers import mip\nmip.choose_solver('highs', 1.0, 0)"
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
