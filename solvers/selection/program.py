"""The selection as a mixed-integer program; ``select`` has its formulation."""

import numpy as np
import pulp

from .. import mip
from ..result import Infeasible, NotFound, SolverError
from .problem import Problem

OVERFLOW_TOLERANCE = 1e-7  # of the largest number of bytes; what a floating-point back end can tell apart


def least_overflow(problem: Problem, solver: str, time_limit: float, seed: int) -> SolverError:
    """Each device could be satisfied alone, not all together: the selection that oversteps by the fewest bytes."""
    divisor = divisor_of(problem.memory, problem.shared, problem.capacity)
    outcome, chosen = solve(problem, solver, time_limit, seed, divisor, elastic=True)
    over = np.maximum(problem.used(chosen) - problem.capacity, 0)
    if not over.any():
        return NotFound(f"memory: the limit is met or missed within {solver}'s tolerance: use solver cp_sat")
    # The objective counts whole multiples of the common divisor, known to a back end's tolerance.
    largest = max(int(problem.memory.max()), int(problem.shared.max(initial=0)), int(abs(problem.capacity).max()))
    least = max(1, min(round(outcome.bound * divisor), int(over @ problem.devices)) - int(OVERFLOW_TOLERANCE * largest))
    per_device = over[problem.of_device]
    devices = ", ".join(f"device {g} by {per_device[g]} bytes" for g in np.flatnonzero(per_device))
    return Infeasible(
        f"memory: no choice of options fits all devices at once; the closest found oversteps {devices}",
        unit="bytes",
        missing=least,
        per_device=tuple(per_device.tolist()),
    )


def divisor_of(*arrays: np.ndarray) -> int:
    return int(np.gcd.reduce(np.concatenate([array.ravel() for array in arrays]))) or 1


Variables = dict[tuple[int, int], pulp.LpVariable]


def solve(
    problem: Problem, solver: str, time_limit: float, seed: int, divisor: int, *, elastic: bool = False
) -> tuple[mip.Outcome, np.ndarray]:
    """Build, solve, extract x [C, O]. ``elastic``: minimise the bytes beyond capacity instead of the seconds."""
    memory, shared, capacity = problem.memory // divisor, problem.shared // divisor, problem.capacity // divisor
    lp = pulp.LpProblem("selection", pulp.LpMinimize)
    pairs = [(int(c), int(o)) for c, o in np.argwhere(problem.available)]
    x = {(c, o): lp.add_variable(f"x_{c}_{o}", 0, int(problem.count[c]), cat="Integer") for c, o in pairs}
    lp.setObjective(pulp.lpSum(float(problem.cost[pair]) * variable for pair, variable in x.items()))
    _one_option_each(lp, x, problem.count)
    y, sizes = _regions_needed(lp, x, shared, problem.count)
    r = _region_sizes(lp, y, sizes)
    over = None
    if elastic:
        most = problem.used(np.where(problem.available, problem.count[:, None], 0)) // divisor + 1
        over = [lp.add_variable(f"over_{g}", 0, int(most[g])) for g in range(len(capacity))]
        lp.setObjective(pulp.lpSum(int(n) * variable for n, variable in zip(problem.devices, over, strict=True)))
    _memory(lp, x, r, memory, capacity, over)
    outcome = mip.solve(lp, solver=solver, time_limit=time_limit, seed=seed)
    chosen = np.zeros(problem.cost.shape, np.int64)
    if outcome.status != "infeasible":
        for pair, variable in x.items():
            chosen[pair] = round(variable.varValue or 0)
        if (chosen.sum(axis=1) != problem.count).any():
            raise AssertionError(f"{solver} returned a selection that does not give every layer one option")
    return outcome, chosen


def _one_option_each(lp: pulp.LpProblem, x: Variables, count: np.ndarray) -> None:
    for c, layers in enumerate(count.tolist()):
        lp += pulp.lpSum(variable for (of, _), variable in x.items() if of == c) == layers


def _regions_needed(
    lp: pulp.LpProblem, x: Variables, shared: np.ndarray, count: np.ndarray
) -> tuple[Variables, dict[tuple[int, int], np.ndarray]]:
    """Returns y and size[f, k], the bytes [G] of every size k of region f."""
    y: Variables = {}
    sizes: dict[tuple[int, int], np.ndarray] = {}
    for f in range(shared.shape[2]):
        number: dict[bytes, int] = {}
        for (c, o), variable in x.items():
            size = shared[c, o, f]
            if not size.any():
                continue
            k = number.setdefault(size.tobytes(), len(number))
            if (f, k) not in y:
                y[f, k] = lp.add_variable(f"y_{f}_{k}", 0, 1, cat="Binary")
                sizes[f, k] = size
            lp += variable <= int(count[c]) * y[f, k]
    return y, sizes


def _region_sizes(lp: pulp.LpProblem, y: Variables, sizes: dict[tuple[int, int], np.ndarray]) -> Variables:
    """Returns r, for the devices on which a region has any size at all."""
    r: Variables = {}
    for f in sorted({f for f, _ in y}):
        own = {k: size for (region, k), size in sizes.items() if region == f}
        for g, largest in enumerate(np.max(list(own.values()), axis=0).tolist()):
            if largest:
                r[f, g] = lp.add_variable(f"r_{f}_{g}", 0, largest)
                for k, size in own.items():
                    if size[g]:
                        lp += r[f, g] >= int(size[g]) * y[f, k]
    return r


def _memory(
    lp: pulp.LpProblem,
    x: Variables,
    r: Variables,
    memory: np.ndarray,
    capacity: np.ndarray,
    over: list[pulp.LpVariable] | None,
) -> None:
    for g, limit in enumerate(capacity.tolist()):
        own = [int(memory[c, o, g]) * variable for (c, o), variable in x.items() if memory[c, o, g]]
        regions = [variable for (_, device), variable in r.items() if device == g]
        used = pulp.lpSum(own + regions)
        lp += (used if over is None else used - over[g]) <= limit
