"""Single copies, at any time: an answer at once, then better ones, and its bound last.

    first      two walks on the traffic as counted, at a cap that needs no trials; beside them, the traffic of tokens to
               come is interpolated. Where the time is short this is all
    cap        trials on halves of the trace, where there is time for them
    exact      where layers are small enough that all their arrangements can be looked at
    search     annealing at that cap, which goes on from the first answer
    bound      in the time that was kept for it

Whatever ends the search early, the user or the clock, leaves the best that is known by then.
"""

# S samples, L layers, E experts

import math
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np

from ...solvers.balance import mean_balance
from ...solvers.placement.affinity import Affinity, usual_steps
from ...solvers.placement.splice import load_splices
from ...solvers.result import NotFound, Solution
from ...solvers.slots import Slots
from ...spec.placement import Objective
from ...spec.trace import Trace
from ..budget import Budget
from .answer import GREEDY, PREVIOUS, Answer, record_of
from .cap import LEAST_SLACK, balance_range, default_cap, first_cap
from .exact import EXACT_TIME, allowed, better, place_exactly, proven
from .hosts_first import hosts_first
from .movement import Capped, Movement, fan_out, moves_between_layers
from .ready import LARGE
from .replan import renamed, slots_of
from .request import Request
from .sample import load_samples
from .single import Single, device_of

BOUND_TIME = 0.1  # of the time for search and proof goes to the proof at least
LEAST_BOUND = 0.6  # seconds of a processor that the cheapest bound takes of 58 layers x 256 experts
AFFINITY_TIME = 0.3  # of the rest, at most, to the traffic that is searched on
FIRST_TIME = 0.3  # and, beside it, to the first answer
# Seconds of a processor that all stages take at least, to load and for each of layers x experts: with less, the first
# answer is all.
LOADING, STAGES = 0.3, 3e-4
HOSTS_TIME = 0.3  # of the time for the search goes, at most, to hosts first
REACH_TIME, REACH_SLACK = 0.1, 0.2  # of what is left, to the coolest that few moves reach; of the way back from it
SAFE_TIME = 0.35  # and of what is left, at most, to trials of the balance cap
FIRST_LEAST = 0.3  # seconds of it, even where the limit is so short that it is over by then
FIRST_STEPS, FIRST_CHAINS = 200, 2  # per layer and expert, of the first answer


@dataclass(frozen=True)
class Problem:
    """What is placed: the fitted trace, the rules, load [S, L, E] that the cap is of; cap: inf for none."""

    fitted: Trace
    request: Request
    single: Single
    affinity: Affinity
    load: np.ndarray
    cap: float = math.inf

    @property
    def known_cap(self) -> float | None:
        return None if self.cap == math.inf else self.cap


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
    choosing = not asked and objective == "latency" and fitted.tokens >= 2
    load = fitted.expert_counts[None] if asked else load_samples(fitted)
    cap = first_cap(single, fitted) if choosing else request.balance_cap or math.inf
    problem = Problem(fitted, request, single, single.counted(fitted), load, cap)
    least = LEAST_BOUND * budget.slowdown * load[0].size / LARGE
    if not budget.before(least).affords(
        (LOADING + STAGES * load[0].size) * budget.slowdown, "more than one short search"
    ):
        found = _first(problem, usual_steps(load[0].size), budget.before(least))
        found = replace(found, solution=replace(found.solution, status="time_limit"))
    else:
        problem, found = _searched(problem, choosing, budget.before(max(BOUND_TIME * budget.left, least)))
    slots = Slots.from_device_of(found.solution.assignment, fleet.capacity)
    if request.previous is not None:
        old = slots_of(request.previous, fleet.capacity)
        slots = renamed(old, slots, fleet, each_layer=False, hosts_apart=True)
        found = replace(found, solution=replace(found.solution, assignment=device_of(slots)))
    moved = _proof(problem, found, budget.part(BOUND_TIME) if budget.stopped else budget)
    best = max(moved.bounds.values(), default=0.0)
    seconds = time.perf_counter() - began
    solver = record_of(found.solution, moved.value, best, moved.bounds, moved.minimised, seconds)
    return Answer(slots, solver, found.cap, found.notes)


def _searched(problem: Problem, choosing: bool, budget: Budget) -> tuple[Problem, Found]:
    """All stages but the bound, and the problem that the last of them solved."""
    single, fitted = problem.single, problem.fitted
    with ThreadPoolExecutor(1) as beside:
        first = beside.submit(_first, problem, FIRST_STEPS * problem.load[0].size, budget.part(FIRST_TIME))
        affinity = single.affinity(fitted, budget.part(AFFINITY_TIME))
        load_splices()
        try:
            known = first.result().solution.assignment
        except NotFound:  # of the cap that was asked for: what follows may find, or prove, more
            known = single.start(fitted)
    notes: tuple[str, ...] = ()
    in_time = True
    if choosing and not budget.stopped:
        budget.tell(what="finding a balance that holds on tokens to come")
        cap, notes, in_time = default_cap(single, fitted, budget.part(SAFE_TIME))
        if single.max_moves is not None:  # few moves may not come as far
            coolest = balance_range(single, fitted, budget.part(REACH_TIME)).coolest
            now = mean_balance(single.start(fitted), load_samples(fitted), single.fleet.speed)
            cap = max(cap, coolest + max(REACH_SLACK * (now - coolest), LEAST_SLACK))
        problem = replace(problem, cap=cap)
    if budget.stopped and not first.exception():  # later stages would begin anew, with no time to come as far
        found = first.result()
        return problem, replace(found, solution=replace(found.solution, status="time_limit"))
    problem = replace(problem, affinity=affinity)
    found = _search(problem, known, budget)
    status = found.solution.status if in_time else "time_limit"
    return problem, replace(found, solution=replace(found.solution, status=status), notes=(*notes, *found.notes))


def _first(problem: Problem, steps: int, budget: Budget) -> Found:
    """An answer at once: the better of two walks, without any splice, since what makes one takes time to load.

    A cap that nobody asked for and nothing keeps is loosened to the balance of where the search begins.
    """
    single, load = problem.single, problem.load
    start = single.start(problem.fitted)
    for cap in (problem.cap, mean_balance(start, load, single.fleet.speed)):
        try:
            found = single.solve(
                problem.affinity,
                load,
                cap=cap,
                start=start if single.groups == 1 else None,
                steps=min(problem.request.steps or steps, steps),
                chains=FIRST_CHAINS,
                generations=0,
                budget=replace(budget.at_least(FIRST_LEAST), on_event=None),
            )
            return Found(found, replace(problem, cap=cap).known_cap)
        except NotFound as error:
            if problem.request.balance_cap is not None:
                raise
            missed = error
    return _fallen_back(problem, None, missed, None)


def _search(problem: Problem, first: np.ndarray, budget: Budget) -> Found:
    """The best that annealing and, where layers are small enough, looking at all their arrangements find."""
    single, fitted, load, cap = problem.single, problem.fitted, problem.load, problem.cap
    exact = place_exactly(single, fitted, problem.affinity, load, cap, budget.part(EXACT_TIME))
    bound = None if exact is None else exact.bound
    usable = exact if exact is not None and allowed(exact.assignment, single) else None
    if usable is not None and usable.status == "optimal":
        return Found(usable, problem.known_cap, (), bound)
    steps = problem.request.steps
    hosts = hosts_first(single, problem.affinity, load, cap, steps, budget.part(HOSTS_TIME))
    starts = [first] if hosts is None else [hosts, first]
    kept = [placed for placed in starts if mean_balance(placed, load, single.fleet.speed) <= cap] or starts
    start = min(kept, key=lambda placed: single.cost(problem.affinity, placed))
    try:
        found = single.solve(problem.affinity, load, cap=cap, start=start, steps=steps, budget=budget, answering=True)
    except NotFound as error:
        return _fallen_back(problem, usable, error, bound)
    if usable is not None:
        found = better(found, usable, fitted, single, problem.affinity)
    return Found(found, problem.known_cap, (), bound)


def _fallen_back(problem: Problem, usable: Solution[np.ndarray] | None, error: NotFound, bound: float | None) -> Found:
    """Where annealing found nothing: the exact answer, or where the search began. Raises if the cap was asked for."""
    if usable is None and problem.request.balance_cap is not None:
        raise error
    placed = problem.single.start(problem.fitted) if usable is None else usable.assignment
    by = usable.solver if usable else GREEDY if problem.single.previous is None else PREVIOUS
    found = Solution(placed, 0.0, 0.0, "feasible" if error.in_time else "time_limit", 0.0, solver=by)
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
    counted = np.array_equal(problem.affinity.transitions, single.counted(fitted).transitions)
    return moves_between_layers(single, problem.affinity, placed, capped, budget, counted)
