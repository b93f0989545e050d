"""Single copies, at any time: an answer at once, then better ones, and its bound last.

    first      short walks on the traffic as counted, at a cap that needs no trials; beside them, the traffic of tokens
               to come is interpolated
    cap        trials on halves of the trace, where there is time for them
    exact      where layers are small enough that all their arrangements can be looked at
    search     annealing at that cap, which goes on from the first answer
    bound      in the time that was kept for it

Whatever ends the search early, the user or the clock, leaves the best that is known by then.
"""

# S samples, L layers, E experts

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ...solvers.balance import mean_balance
from ...solvers.placement.affinity import Affinity
from ...solvers.placement.splice import load_splices
from ...solvers.result import NotFound, Solution
from ...solvers.slots import Slots
from ...spec.placement import Objective
from ...spec.trace import Trace
from ..budget import Budget
from .answer import Answer, record_of
from .cap import SHORTEST, UNTRIED, Range, balance_range, default_cap
from .exact import EXACT_TIME, allowed, better, place_exactly, proven
from .movement import Capped, Movement, fan_out, moves_between_layers
from .ready import LARGE
from .replan import renamed, slots_of
from .request import Request
from .sample import load_samples
from .single import Single, device_of

BOUND_TIME = 0.2  # of the time for search and proof goes to the proof at least
LEAST_BOUND = 0.6  # seconds of a processor that the cheapest bound takes of 58 layers x 256 experts
AFFINITY_TIME = 0.3  # of the rest, at most, to the traffic that is searched on
RANGE_TIME, FIRST_TIME = 0.1, 0.3  # and, beside it, to the range of the cap and to the first answer
SAFE_TIME = 0.35  # and of what is left, at most, to trials of the balance cap
FIRST_LEAST = 0.2  # seconds of it, even where the limit is so short that it is over by then
FIRST_STEPS, FIRST_CHAINS = 200, 2  # per layer and expert, of the first answer


@dataclass(frozen=True)
class Problem:
    """What is placed: the fitted trace, the rules, load [S, L, E] that the cap is of; cap: inf for none."""

    fitted: Trace
    request: Request
    single: Single
    affinity: Affinity
    load: np.ndarray
    cap: float = float("inf")


@dataclass(frozen=True)
class Found:
    """A placement, the cap that it keeps, what the user should know; exact_bound: no placement moves less."""

    solution: Solution[np.ndarray]
    cap: float | None
    notes: tuple[str, ...] = ()
    exact_bound: float | None = None


def place_single(fitted: Trace, request: Request, single: Single, objective: Objective, budget: Budget) -> Answer:
    """The best placement of single copies in the budget. Raises ``SolverError`` as ``anneal``."""
    began, fleet = time.perf_counter(), single.fleet
    asked = request.balance_cap is not None
    load = fitted.expert_counts[None] if asked else load_samples(fitted)
    problem = Problem(fitted, request, single, single.counted(fitted), load, request.balance_cap or float("inf"))
    proving = max(BOUND_TIME * budget.left, LEAST_BOUND * budget.slowdown * load[0].size / LARGE)
    searching = budget.before(proving)
    choosing = not asked and objective == "latency" and fitted.tokens >= 2
    with ThreadPoolExecutor(1) as beside:
        running = beside.submit(_first, problem, choosing, searching)
        affinity = single.affinity(fitted, searching.part(AFFINITY_TIME))
        load_splices()
        first, whole = running.result()
    notes: tuple[str, ...] = ()
    in_time = True
    if whole is not None:
        budget.tell(what="finding a balance that holds on tokens to come")
        cap, notes, in_time = default_cap(single, fitted, whole, searching.part(SAFE_TIME))
        problem = replace(problem, cap=cap)
    found = _search(replace(problem, affinity=affinity), first, searching)
    if not in_time:
        found = replace(found, solution=replace(found.solution, status="time_limit"))
    slots = Slots.from_device_of(found.solution.assignment, fleet.capacity)
    if request.previous is not None:
        old = slots_of(request.previous, fleet.capacity)
        slots = renamed(old, slots, fleet, each_layer=False, hosts_apart=True)
        found = replace(found, solution=replace(found.solution, assignment=device_of(slots)))
    rest = budget.part(BOUND_TIME) if budget.stopped else budget
    moved = _proof(replace(problem, affinity=affinity), found, rest)
    best = max(moved.bounds.values(), default=0.0)
    seconds = time.perf_counter() - began
    solver = record_of(found.solution, moved.value, best, moved.bounds, moved.words, seconds)
    return Answer(slots, solver, found.cap, (*notes, *found.notes))


def _first(problem: Problem, choosing: bool, budget: Budget) -> tuple[np.ndarray | None, Range | None]:
    """[L, E] an answer at once, None where it keeps no cap; and, where one is to be chosen, what it may lie between."""
    single, whole, cap = problem.single, None, problem.cap
    if choosing:
        free = replace(single, previous=None, max_moves=None)
        whole = balance_range(free, problem.fitted, budget.part(RANGE_TIME).at_least(SHORTEST))
        cap = whole.at(UNTRIED)
    steps = min(problem.request.steps or FIRST_STEPS * problem.load[0].size, FIRST_STEPS * problem.load[0].size)
    try:
        found = single.solve(
            problem.affinity,
            problem.load,
            cap=cap,
            steps=steps,
            chains=FIRST_CHAINS,
            generations=0,
            budget=replace(budget.part(FIRST_TIME).at_least(FIRST_LEAST), on_event=None),
        )
    except NotFound:
        return None, whole
    return found.assignment, whole


def _search(problem: Problem, first: np.ndarray | None, budget: Budget) -> Found:
    """The best that annealing and, where layers are small enough, looking at all their arrangements find."""
    single, load, cap = problem.single, problem.load, problem.cap
    known = None if cap == float("inf") else cap
    if first is not None and budget.late:
        return Found(Solution(first, 0.0, 0.0, "time_limit", 0.0), known)
    exact = place_exactly(single, problem.fitted, problem.affinity, load, cap, budget.part(EXACT_TIME))
    bound = None if exact is None else exact.bound
    usable = exact if exact is not None and allowed(exact.assignment, single) else None
    if usable is not None and usable.status == "optimal":
        return Found(usable, known, (), bound)
    try:
        found = single.solve(
            problem.affinity,
            load,
            cap=cap,
            start=first,
            steps=problem.request.steps,
            budget=budget,
        )
    except NotFound as error:
        return _fallen_back(problem, usable, error, bound)
    if usable is not None:
        found = better(found, usable, problem.fitted, single, problem.affinity)
    return Found(found, known, (), bound)


def _fallen_back(problem: Problem, usable: Solution[np.ndarray] | None, error: NotFound, bound: float | None) -> Found:
    """Where annealing found nothing: the exact answer, or where the search began. Raises if the cap was asked for."""
    if usable is None and problem.request.balance_cap is not None:
        raise error
    placed = problem.single.start(problem.fitted) if usable is None else usable.assignment
    found = Solution(placed, 0.0, 0.0, "feasible" if error.in_time else "time_limit", 0.0)
    if usable is not None:
        return Found(found, problem.cap, (), bound)
    late = "" if error.in_time else " in time"
    note = f"no placement with a balance of {problem.cap:.3f} was found{late}: this is where the search began"
    return Found(found, mean_balance(placed, problem.load, problem.single.fleet.speed), (note,), bound)


def _proof(problem: Problem, found: Found, budget: Budget) -> Movement:
    """How much the placement moves, and how little any other could."""
    single, fitted, placed = problem.single, problem.fitted, found.solution.assignment
    if found.exact_bound is not None:
        return proven(fitted, single, problem.affinity, placed, found.exact_bound)
    if single.movement != "coherent" or fitted.layers == 1:
        return fan_out(fitted, single, placed)
    reached = mean_balance(placed, problem.load, single.fleet.speed)  # above the cap by rounding, perhaps
    capped = None if found.cap is None else Capped(problem.load, max(found.cap, reached))
    return moves_between_layers(single, problem.affinity, placed, capped, budget)
