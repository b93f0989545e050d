"""Mixed-integer back ends behind one call: whatever PuLP offers by name, and CP-SAT.

A problem is written once, as a PuLP minimisation whose variables have finite bounds of at least 0.

Linear-programming back ends (HiGHS, CBC, SCIP, ...) work in floating point with absolute tolerances: rows, objective
and continuous variables are scaled by powers of two, which is exact, so that bytes and microseconds mean the same to
them; a caller still checks the assignment against its own integers. CP-SAT works in integers: coefficients of rows
must be whole numbers, and continuous variables must be integral at an optimum anyway.

Deterministic: one thread, seeded. The time limit is a ceiling, not a work budget.
"""

import importlib.util
import inspect
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import pulp

from .result import DEFAULT_SOLVER, TIME_LIMIT, NotFound, SolverUnavailable

FEASIBILITY_TOLERANCE = 1e-9

INSTALL = {
    "highs": "pip install highspy",
    "cbc": "pip install 'pulp[cbc]'",
    "coin": "install CBC's `cbc` command",
    "scip": "pip install pyscipopt",
    "glpk": "install GLPK's `glpsol` command",
    "gurobi": "pip install gurobipy",
    "cplex": "pip install cplex",
    "mosek": "pip install mosek",
    "xpress": "pip install xpress",
    "copt": "pip install coptpy",
}


@dataclass(frozen=True)
class Outcome:
    """How a solve ended; the values are in the problem's variables.

    bound: proven lower bound in the objective's unit, ``-inf`` where the back end tells none.
    """

    status: Literal["optimal", "time_limit", "infeasible"]
    bound: float


def solve(
    problem: pulp.LpProblem, *, solver: str = DEFAULT_SOLVER, time_limit: float = TIME_LIMIT, seed: int = 0
) -> Outcome:
    """Minimise; ``problem`` is consumed (its rows may be rescaled), its variables hold the values afterwards.

    Raises ``SolverUnavailable``, and ``NotFound`` when the time ends without a solution.
    """
    if not (math.isfinite(time_limit) and time_limit > 0):
        raise ValueError(f"time_limit must be a positive number of seconds, got {time_limit}")
    for v in problem.variables():
        if v.lowBound is None or v.upBound is None or v.lowBound < 0:
            raise ValueError(f"variable {v.name} needs finite bounds of at least 0")
    if solver.lower() == "cp_sat":
        return _solve_with_cp_sat(problem, time_limit, seed)
    back_end = choose_solver(solver, time_limit, seed)
    units = _scale_variables(problem)
    scale = _scale_rows(problem)
    with _folder(back_end):
        problem.solve(back_end)
    if problem.status == pulp.LpStatusInfeasible:
        return Outcome("infeasible", math.inf)
    if problem.sol_status not in (pulp.LpSolutionOptimal, pulp.LpSolutionIntegerFeasible):
        raise NotFound(f"{solver} found no solution within {time_limit:g} s: raise the time limit")
    proven = problem.sol_status == pulp.LpSolutionOptimal
    bound = float(pulp.value(problem.objective) or 0.0) if proven else -math.inf
    if back_end.name == "HiGHS":
        bound = float(problem.solverModel.getInfo().mip_dual_bound)
    for variable, unit in units.items():
        variable.varValue *= unit
    return Outcome("optimal" if proven else "time_limit", bound / scale)


@contextmanager
def _folder(back_end: Any) -> Iterator[None]:
    """A folder of its own for a back end that works with files. HiGHS does not: a kill leaves nothing behind."""
    if not hasattr(back_end, "tmpDir"):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="moeplan-") as folder:
        back_end.tmpDir = folder
        yield


def choose_solver(name: str, time_limit: float, seed: int) -> Any:
    """A PuLP back end by name: ``highs``, or any that PuLP lists, with or without its ``_CMD`` or ``_PY`` ending."""
    offered = {known: _short(known) for known in pulp.listSolvers()}
    wanted = [known for known, short in offered.items() if name.lower() in (known.lower(), short)]
    if not wanted:
        names = ", ".join(sorted({"cp_sat", *offered.values()}))
        raise SolverUnavailable(f"unknown solver {name!r}: choose one of {names}")
    settings = {
        "msg": False,
        "threads": 1,
        "timeLimit": time_limit,
        "gapRel": 0.0,
        "gapAbs": 0.0,
        "_skip_v4_deprecation": True,
    }
    classes = {kind.name: kind for kind in pulp.apis._all_solvers}
    for known in wanted:
        accepted = inspect.signature(classes[known].__init__).parameters
        options: dict[str, Any] = {key: value for key, value in settings.items() if key in accepted}
        if known == "HiGHS":
            _greet()
            tolerances = ("mip_feasibility_tolerance", "primal_feasibility_tolerance", "dual_feasibility_tolerance")
            options |= {"random_seed": seed % 2**31} | dict.fromkeys(tolerances, FEASIBILITY_TOLERANCE)
        elif "CBC" in known or known == "COIN_CMD":
            options["options"] = [f"randomCbcSeed {seed % 2**31}"]
        back_end = classes[known](**options)
        if back_end.available():
            return back_end
    hint = INSTALL.get(_short(wanted[0]), f"see PuLP's page on {wanted[0]}")
    raise SolverUnavailable(f"solver {name!r} is not installed: {hint}, or use {DEFAULT_SOLVER}")


@cache
def _greet() -> None:
    """Let HiGHS 1.16 print its two lines, once per process, into nothing.

    It writes them to the C library's standard output when the first solver is made, before anyone could turn output
    off; a command that prints JSON would print them too.
    """
    if importlib.util.find_spec("highspy") is None:
        return
    import highspy

    try:
        kept = os.dup(1)
    except OSError:  # closed: nothing can be printed
        highspy.Highs()
        return
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            highspy.Highs()
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def _short(known: str) -> str:
    """``PULP_CBC_CMD`` -> ``cbc``."""
    return known.lower().removeprefix("pulp_").removesuffix("_cmd").removesuffix("_py").removesuffix("_dll")


def _scale_variables(problem: pulp.LpProblem) -> dict[pulp.LpVariable, float]:
    """Measure every continuous variable in a unit that puts its upper bound in [1, 2); the units."""
    units = {v: 1 / _power([v.upBound]) for v in problem.variables() if v.cat != pulp.LpInteger and v.upBound}
    for variable, unit in units.items():
        variable.lowBound, variable.upBound = variable.lowBound / unit, variable.upBound / unit
    for expression in (problem.objective, *(row.expr for row in problem.constraints())):
        for variable in expression:
            expression[variable] *= units.get(variable, 1.0)
    return units


def _scale_rows(problem: pulp.LpProblem) -> float:
    """Scale every row and the objective so that the largest coefficient lies in [1, 2); the objective's factor."""
    for row in problem.constraints():
        factor = _power(row.expr.values())
        row.constant *= factor
        for variable in row.expr:
            row.expr[variable] *= factor
    factor = _power(problem.objective.values())
    problem.objective.constant *= factor
    for variable in problem.objective:
        problem.objective[variable] *= factor
    return factor


def _power(coefficients: Iterable[float]) -> float:
    """The power of two that brings the largest coefficient into [1, 2); 1 where all are 0."""
    largest = max((abs(c) for c in coefficients), default=0.0)
    return 2.0 ** -math.floor(math.log2(largest)) if largest else 1.0


def _solve_with_cp_sat(problem: pulp.LpProblem, time_limit: float, seed: int) -> Outcome:
    # Imported here: it takes a second, and its bundled HiGHS library cannot live beside highspy 1.15's
    # (google/or-tools#5246), which must not cost those who never ask for CP-SAT. highspy 1.14 is refused for another
    # reason: its presolve calls wrong answers optimal (ERGO-Code/HiGHS#3043).
    try:
        from ortools.sat.python import cp_model
    except ImportError as error:
        known = importlib.util.find_spec("ortools") is not None
        hint = "pip install 'highspy>=1.16' (OR-tools cannot be loaded beside 1.15)" if known else "pip install ortools"
        raise SolverUnavailable(f"solver 'cp_sat' cannot be loaded: {hint}") from error

    model = cp_model.CpModel()
    variables = problem.variables()
    ints = {v.name: model.new_int_var(math.ceil(v.lowBound), math.floor(v.upBound), v.name) for v in variables}
    for row in problem.constraints():
        coefficients = list(row.expr.values())
        if any(c != int(c) for c in (*coefficients, row.constant)):
            raise ValueError(f"cp_sat: row {row.name} has coefficients that are not whole numbers")
        total = cp_model.LinearExpr.weighted_sum([ints[v.name] for v in row.expr], [int(c) for c in coefficients])
        right = -int(row.constant)
        match row.sense:
            case pulp.LpConstraintLE:
                model.add(total <= right)
            case pulp.LpConstraintGE:
                model.add(total >= right)
            case _:
                model.add(total == right)

    # Costs are rounded down to whole multiples of 1 / scale, so that the integer bound is a bound on the true costs.
    largest = sum(abs(c) * v.upBound for v, c in problem.objective.items())
    scale = 2.0 ** (50 - math.ceil(math.log2(largest))) if largest else 1.0
    costs = [math.floor(c * scale) for c in problem.objective.values()]
    model.minimize(cp_model.LinearExpr.weighted_sum([ints[v.name] for v in problem.objective], costs))

    search = cp_model.CpSolver()
    search.parameters.num_workers = 1
    search.parameters.random_seed = seed % 2**31
    search.parameters.max_time_in_seconds = time_limit
    search.parameters.catch_sigint_signal = False  # Ctrl-C is the caller's: CP-SAT would end this search and keep quiet
    status = search.solve(model)
    if status == cp_model.INFEASIBLE:
        return Outcome("infeasible", math.inf)
    if status == cp_model.MODEL_INVALID:
        raise ValueError(f"cp_sat: {model.validate().strip()}")
    if status == cp_model.UNKNOWN:
        raise NotFound(f"cp_sat found no solution within {time_limit:g} s: raise the time limit")
    for v in variables:
        v.varValue = search.value(ints[v.name])
    bound = search.best_objective_bound / scale + problem.objective.constant
    return Outcome("optimal" if status == cp_model.OPTIMAL else "time_limit", bound)
