"""The answer of a search: single copies, copies for balance, or predicted time, each with its bound.

It imports the solvers, whose compiled loops and programs take a second to load: ``solve`` imports it once there is time
for a search.
"""

# W windows, L layers, E experts

import time
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np

from ...solvers.balance import mean_balance
from ...solvers.replication.replicate import replicate
from ...solvers.replication.shares import optimal_shares
from ...solvers.result import NotFound, Solution
from ...solvers.slots import Slots
from ...spec.errors import MoeplanError
from ...spec.placement import Objective
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .answer import Answer, record_of
from .cap import default_cap
from .exact import EXACT_TIME, allowed, better, place_exactly, proven
from .fleet import Fleet
from .movement import Capped, fan_out, moves_between_layers
from .proof import Rules, prove, small, within_cap
from .ready import LARGE
from .replan import Replan, renamed, slots_of
from .replicated import balance_and_bound, place_copies
from .request import Request
from .sample import load_samples, windows
from .single import Single, device_of, previous_devices, single_of

if TYPE_CHECKING:
    from .timed import Timing

BOUND_TIME = 0.2  # of the time for search and proof goes to the proof at least
LEAST_BOUND = 0.6  # seconds of a processor that the cheapest bound takes of 58 layers x 256 experts
AFFINITY_TIME = 0.3  # of the rest, at most, to the traffic that is searched on
SAFE_TIME = 0.35  # and of what is left, at most, to trials of the balance cap
PROOF_TIME = 0.3  # of the time for copies goes to the exact program at least, where layers are small enough for it
LEAST_TIME = 0.05  # of a search, in seconds: it returns where it began


def searched_answer(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    """The best placement that is found in the budget, with a bound. Raises ``SolverError`` and ``MoeplanError``."""
    if request.timing is not None:
        return _for_time(fitted, request, fleet, request.timing, budget, on_event, stop)
    if objective == "balance" or request.slots > fitted.num_experts:
        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        return _with_copies(fitted, request, single, objective, budget, on_event, stop)
    return _single_copies(fitted, request, single_of(request, fleet), objective, budget, on_event, stop)


def _for_time(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    timing: "Timing",
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    # Imported when it is needed: predictions need much that other placements do not.
    from .timed import place_for_time

    copies = request.slots > fitted.num_experts
    if request.balance_cap is not None or (copies and request.previous is not None):
        what = "--balance-cap" if request.balance_cap is not None else "--previous with replicas"
        raise MoeplanError(f"{what} does not go with --cluster: predicted time is the objective there")
    old = previous_devices(request, fleet)
    weights = timing.weights(fitted)
    single = Single(fleet, "ep", request.groups, old, request.max_moves, weights, request.seed)
    load = fitted.expert_counts
    candidates: list[Slots | None] = []
    if old is not None:
        candidates = [Slots.from_device_of(old, fleet.capacity)]
    elif request.groups == 1:
        candidates = [
            baselines.linear_slots(fitted.layers, fitted.num_experts, fleet),
            baselines.eplb_slots(load, request.slots, request.groups, fleet),
            Slots.from_device_of(baselines.greedy(load, fleet), fleet.capacity),
        ]
    if copies:
        half = budget.part(0.5)
        found = place_copies(single, fitted, shares=request.shares, full=request.equal_slots, budget=half, stop=stop)
        candidates.append(found.assignment)
    known = [slots for slots in candidates if slots is not None]
    steps = request.steps
    found = place_for_time(single, fitted, timing, known, steps=steps, budget=budget, on_event=on_event, stop=stop)
    words = timing.words
    bounds = {"all devices busy at their best rate": found.bound}
    return Answer(found.assignment, record_of(found, found.objective, found.bound, bounds, words, found.seconds))


def newly_placed(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Solution[Slots]:
    """Copies for balance, or hosts first by what travels, as if there were no previous placement."""
    if objective != "balance":
        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        full, steps = request.equal_slots, request.steps
        return place_copies(
            single, fitted, shares=request.shares, full=full, steps=steps, budget=budget, on_event=on_event, stop=stop
        )
    return replicate(
        windows(fitted),
        fleet.speed,
        fleet.capacity,
        fleet.hosts,
        groups=request.groups,
        shares=request.shares,
        full=request.equal_slots,
        seed=request.seed,
        time_limit=budget.left,
    )


def _with_copies(
    fitted: Trace,
    request: Request,
    single: Single,
    objective: Objective,
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    fleet, load = single.fleet, windows(fitted)
    began = time.perf_counter()
    # Where layers are small enough to be proven, the proof gets a part of the time too.
    provable = small(load, single, request.shares)
    parts = (1.0 if request.max_moves is None else 0.6) * (1 - PROOF_TIME if provable else 1.0)
    found = newly_placed(fitted, request, fleet, objective, budget.part(parts), on_event, stop)
    # Where hosts were chosen for locality, better balance alone is no better placement.
    free = objective == "balance" or len(fleet.names) == 1
    rules: Rules = {"shares": request.shares, "full": request.equal_slots}
    proving = budget if request.max_moves is None else budget.part(0.5)
    proof = prove(found.assignment, single, load, **rules, improve=free, time_limit=proving.left, stop=stop)
    slots, bounds = proof.slots, proof.bounds
    if request.previous is not None:
        way = replan(request, fleet, slots, load, objective, budget)
        slots = way.within(request.max_moves)
        if request.shares == "optimal":
            slots = optimal_shares(slots, load.sum(axis=0), fleet.speed)
    if request.balance_cap is not None:
        slots = within_cap(slots, single, load.sum(axis=0), request, time_limit=budget.left, stop=stop)
    value, _ = balance_and_bound(slots, single, load, request.shares, request.equal_slots)
    found = replace(found, status="time_limit") if proof.late else found
    words = "mean over layers and windows of the hottest device's time over the ideal"
    best = max(bounds.values())
    return Answer(slots, record_of(found, value, best, bounds, words, time.perf_counter() - began))


def replan(
    request: Request, fleet: Fleet, new: Slots, load: np.ndarray, objective: Objective, budget: Budget
) -> Replan:
    """The ways from the previous placement to ``new``; load: [W, L, E]."""
    assert request.previous is not None
    old = slots_of(request.previous, fleet.capacity)
    free = objective == "balance"  # else what moves between layers and hosts counts
    new = renamed(old, new, fleet, each_layer=free, hosts_apart=not free or request.groups > 1)
    apart = request.groups > 1 or not free
    return Replan(old, new, load, fleet, apart, request.equal_slots, request.seed, budget, request.max_moves)


def _single_copies(
    fitted: Trace,
    request: Request,
    single: Single,
    objective: Objective,
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    began = time.perf_counter()
    fleet = single.fleet
    load, cap = load_samples(fitted), request.balance_cap
    proving = max(BOUND_TIME * budget.left, LEAST_BOUND * budget.slowdown * load[0].size / LARGE)
    searching = budget.before(proving)
    affinity = single.affinity(fitted, searching.part(AFFINITY_TIME))
    notes: tuple[str, ...] = ()
    in_time = True
    if cap is not None:
        load = fitted.expert_counts[None]
    elif objective == "latency" and fitted.tokens >= 2:
        if on_event:
            on_event({"what": "finding a balance that holds on tokens to come"})
        cap, notes, in_time = default_cap(single, fitted, searching.part(SAFE_TIME))
    most = float("inf") if cap is None else cap
    exact_time = searching.part(EXACT_TIME).left
    exact = place_exactly(single, fitted, affinity, load, most, time_limit=exact_time, stop=stop)
    usable = exact if exact is not None and allowed(exact.assignment, single) else None
    try:
        if usable is not None and usable.status == "optimal":
            found = usable
        else:
            found = single.solve(
                affinity,
                load,
                cap=most,
                steps=request.steps,
                time_limit=max(searching.left, LEAST_TIME),
                on_event=on_event,
                stop=stop,
            )
            found = found if usable is None else better(found, usable, fitted, single, affinity)
    except NotFound as error:
        if usable is None and request.balance_cap is not None:
            raise
        assert cap is not None
        placed = single.start(fitted) if usable is None else usable.assignment
        found = Solution(placed, 0.0, 0.0, "feasible" if error.in_time else "time_limit", 0.0)
        kept = mean_balance(placed, load, fleet.speed)
        if usable is None:
            late = "" if error.in_time else " in time"
            notes += (f"no placement with a balance of {cap:.3f} was found{late}: this is where the search began",)
            cap = kept
    if not in_time:
        found = replace(found, status="time_limit")
    slots = Slots.from_device_of(found.assignment, fleet.capacity)
    if request.previous is not None:
        old = slots_of(request.previous, fleet.capacity)
        slots = renamed(old, slots, fleet, each_layer=False, hosts_apart=True)
        found = replace(found, assignment=device_of(slots))
    rest = budget if stop is None or not stop.is_set() else budget.part(BOUND_TIME)
    if exact is not None:
        moved = proven(fitted, single, affinity, found.assignment, exact.bound)
    elif single.movement == "coherent" and fitted.layers > 1:
        reached = mean_balance(found.assignment, load, fleet.speed)  # above the cap by rounding, perhaps
        capped = None if cap is None else Capped(load, max(cap, reached))
        moved = moves_between_layers(single, affinity, found.assignment, capped, rest)
    else:
        moved = fan_out(fitted, single, found.assignment)
    best = max(moved.bounds.values(), default=0.0)
    solver = record_of(found, moved.value, best, moved.bounds, moved.words, time.perf_counter() - began)
    return Answer(slots, solver, cap, notes)
