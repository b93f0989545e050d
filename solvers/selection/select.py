"""Selection: one strategy for every layer, fastest in all, within every device's memory.

An option of a layer costs seconds, takes bytes of its own on every device, and may need *regions*: memory that layers
share because they use it one after the other (gathered weights, workspaces). A region is charged once, at the largest
size that any layer's choice needs.

Layers with equal rows are one class c of n[c] layers, and equal region sizes are one size k.

    x[c, o] in 0..n[c]     layers of class c that use option o
    y[f, k] in {0, 1}      region f is needed in size k
    r[f, g] >= 0           bytes of region f on device g
    minimise sum_{c,o} cost[c][o] x[c, o]

    (1) every layer has one option:     sum_o x[c, o] = n[c]                                     ``_one_option_each``
    (2) an option needs its regions:    x[c, o] <= n[c] y[f, k(c, o, f)]                         ``_regions_needed``
    (3) a region holds its largest:     r[f, g] >= size[f][k][g] y[f, k]                         ``_region_sizes``
    (4) memory:                         sum memory[c][o][g] x[c, o] + sum_f r[f, g] <= capacity[g]   ``_memory``

Bytes are divided by their common divisor first, and the answer is checked on whole bytes: where a floating-point back
end oversteps a limit within its tolerance, CP-SAT, exact in integers, solves it again.
"""

# L layers, O options, F regions, G devices; C classes of layers

import time
from dataclasses import dataclass

import numpy as np
import pulp
from numpy.typing import ArrayLike

from .. import mip
from ..result import Infeasible, NotFound, Solution, SolverError

MAX_BYTES = 2**60  # sums of bytes stay exact in 64-bit integers
OVERFLOW_TOLERANCE = 1e-7  # of the largest number of bytes; what a floating-point back end can tell apart


@dataclass(frozen=True)
class _Input:
    """The problem by classes of layers, bytes as they came.

    cost [C, O], memory [C, O, G], shared [C, O, F, G], capacity [G], count [C] layers of each class, of_layer [L].
    """

    cost: np.ndarray
    memory: np.ndarray
    shared: np.ndarray
    capacity: np.ndarray
    count: np.ndarray
    of_layer: np.ndarray

    @property
    def available(self) -> np.ndarray:
        """[C, O] bool"""
        return np.isfinite(self.cost)

    def used(self, chosen: np.ndarray) -> np.ndarray:
        """[G] bytes that x = ``chosen`` [C, O] takes."""
        own = np.einsum("co,cog->g", chosen, self.memory)
        return own + np.where((chosen > 0)[:, :, None, None], self.shared, 0).max(axis=(0, 1)).sum(axis=0)


def select(
    cost: ArrayLike,
    memory: ArrayLike,
    capacity: ArrayLike,
    *,
    shared: ArrayLike | None = None,
    solver: str = mip.DEFAULT_SOLVER,
    time_limit: float = mip.TIME_LIMIT,
    seed: int = 0,
) -> Solution[tuple[int, ...]]:
    """The option of every layer.

    cost: [L, O] seconds, ``inf`` where a layer does not have the option.
    memory: [L, O, G] whole bytes that each layer takes for itself; capacity: [G] whole bytes.
    shared: [L, O, F, G] whole bytes that the option needs of region f, charged once at the largest.
    solver: ``highs``, ``cp_sat``, or what ``mip.choose_solver`` accepts.

    Raises ``Infeasible`` with the bytes missing on each device at least, ``NotFound`` when the time limit ends the
    search without a solution, ``SolverUnavailable``.
    """
    started = time.perf_counter()
    problem = _checked(cost, memory, capacity, shared)
    floor = float(problem.count @ problem.cost.min(axis=1))
    cheapest = _cheapest(problem)
    if (problem.used(cheapest) <= problem.capacity).all():  # then memory binds nothing, and there is nothing to search
        return Solution(_per_layer(problem, cheapest), floor, floor, "optimal", time.perf_counter() - started)
    _refuse_if_hopeless(problem)
    divisor = _divisor(problem.memory, problem.shared)
    outcome, chosen = _solve(problem, solver, time_limit, seed, divisor)
    if outcome.status != "infeasible" and (problem.used(chosen) > problem.capacity).any():
        outcome, chosen = _solve(problem, "cp_sat", time_limit, seed, divisor)
    if outcome.status == "infeasible":
        raise _least_overflow(problem, solver, time_limit, seed)
    picked = chosen > 0
    objective = float((chosen[picked] * problem.cost[picked]).sum())
    seconds = time.perf_counter() - started
    return Solution(_per_layer(problem, chosen), objective, max(outcome.bound, floor), outcome.status, seconds)


def _checked(cost: ArrayLike, memory: ArrayLike, capacity: ArrayLike, shared: ArrayLike | None) -> _Input:
    """Validate, and join equal layers."""
    seconds = np.asarray(cost, dtype=float)
    if seconds.ndim != 2 or 0 in seconds.shape:
        raise ValueError(f"cost must be [layers, options], got {list(seconds.shape)}")
    if np.isnan(seconds).any() or (seconds < 0).any():
        raise ValueError("cost must hold seconds of at least 0 (inf where there is no such option)")
    limit = _bytes("capacity", capacity, (None,), negative=True)  # what is left may be less than nothing
    own = _bytes("memory", memory, (*seconds.shape, len(limit)))
    regions = np.zeros((*seconds.shape, 0, len(limit)), np.int64)
    if shared is not None:
        regions = _bytes("shared", shared, (*seconds.shape, None, len(limit)))
    without = np.flatnonzero(~np.isfinite(seconds).any(axis=1))
    if len(without):
        raise Infeasible(f"layer {without[0]} has no option", unit="options", missing=len(without))
    present = np.isfinite(seconds)
    own, regions = np.where(present[..., None], own, 0), np.where(present[..., None, None], regions, 0)
    layers = len(seconds)
    rows = [seconds[i].tobytes() + own[i].tobytes() + regions[i].tobytes() for i in range(layers)]
    classes = {row: c for c, row in enumerate(dict.fromkeys(rows))}
    of_layer = np.array([classes[row] for row in rows])
    first = np.array([rows.index(row) for row in classes])
    problem = _Input(seconds[first], own[first], regions[first], limit, np.bincount(of_layer), of_layer)
    if float(own.sum()) + float(regions.sum()) > MAX_BYTES:
        raise ValueError(f"memory and shared add up to more than {MAX_BYTES} bytes")
    return problem


def _bytes(name: str, values: ArrayLike, shape: tuple[int | None, ...], *, negative: bool = False) -> np.ndarray:
    array = np.asarray(values)
    if array.ndim != len(shape) or any(want not in (None, got) for want, got in zip(shape, array.shape, strict=True)):
        wanted = ["any" if n is None else n for n in shape]
        raise ValueError(f"{name} must have shape {wanted}, got {list(array.shape)}")
    if array.size and array.dtype.kind not in "iu":
        raise ValueError(f"{name} must be whole bytes (integers), got {array.dtype}")
    if not negative and (array < 0).any():
        raise ValueError(f"{name} must not be negative")
    return array.astype(np.int64)


def _cheapest(problem: _Input) -> np.ndarray:
    chosen = np.zeros(problem.cost.shape, np.int64)
    chosen[np.arange(len(chosen)), problem.cost.argmin(axis=1)] = problem.count
    return chosen


def _per_layer(problem: _Input, chosen: np.ndarray) -> tuple[int, ...]:
    """Layers of a class take its options in order: the first layers the first option."""
    queues = [np.repeat(np.arange(len(row)), row).tolist() for row in chosen]
    return tuple(queues[c].pop(0) for c in problem.of_layer)


def _refuse_if_hopeless(problem: _Input) -> None:
    """Every layer takes at least its smallest option, for each device by itself."""
    big = np.int64(2**62)
    own = np.where(problem.available[:, :, None], problem.memory, big).min(axis=1)
    regions = np.where(problem.available[:, :, None, None], problem.shared, big).min(axis=1)
    least = problem.count @ own + regions.max(axis=0).sum(axis=0)
    missing = np.maximum(least - problem.capacity, 0)
    if missing.any():
        worst = int(missing.argmax())
        raise Infeasible(
            f"memory: device {worst} lacks at least {missing[worst]} bytes (every choice of options takes at least "
            f"{least[worst]}, it has {problem.capacity[worst]}); {np.count_nonzero(missing)} device(s) lack memory",
            unit="bytes",
            missing=int(missing.sum()),
            per_device=tuple(missing.tolist()),
        )


def _least_overflow(problem: _Input, solver: str, time_limit: float, seed: int) -> SolverError:
    """Each device could be satisfied alone, not all together: the selection that oversteps by the fewest bytes."""
    divisor = _divisor(problem.memory, problem.shared, problem.capacity)
    outcome, chosen = _solve(problem, solver, time_limit, seed, divisor, elastic=True)
    over = np.maximum(problem.used(chosen) - problem.capacity, 0)
    if not over.any():
        return NotFound(f"memory: the limit is met or missed within {solver}'s tolerance: use solver cp_sat")
    # The objective counts whole multiples of the common divisor, known to a back end's tolerance.
    largest = max(int(problem.memory.max()), int(problem.shared.max(initial=0)), int(abs(problem.capacity).max()))
    least = max(1, min(round(outcome.bound * divisor), int(over.sum())) - int(OVERFLOW_TOLERANCE * largest))
    devices = ", ".join(f"device {g} by {over[g]} bytes" for g in np.flatnonzero(over))
    return Infeasible(
        f"memory: no choice of options fits all devices at once; the closest found oversteps {devices}",
        unit="bytes",
        missing=least,
        per_device=tuple(over.tolist()),
    )


def _divisor(*arrays: np.ndarray) -> int:
    return int(np.gcd.reduce(np.concatenate([array.ravel() for array in arrays]))) or 1


Variables = dict[tuple[int, int], pulp.LpVariable]


def _solve(
    problem: _Input, solver: str, time_limit: float, seed: int, divisor: int, *, elastic: bool = False
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
        lp.setObjective(pulp.lpSum(over))
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
