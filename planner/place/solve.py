"""Place: a trace in, a placement out, with its scores, its bound and what was assumed."""

# L layers, E experts, G devices

import time
from collections.abc import Callable
from dataclasses import replace
from threading import Event
from typing import TYPE_CHECKING, Any

import numpy as np
from threadpoolctl import threadpool_limits

from ...solvers.balance import mean_balance
from ...solvers.result import NotFound, Solution, SolverError
from ...solvers.slots import Slots
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.model import Model
from ...spec.placement import (
    Moves,
    Objective,
    Placement,
    TraceSource,
)
from ...spec.repeats import repeated_rows
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .answer import Answer, record_of
from .cap import default_cap
from .compared import baseline_slots, compared_notes, rest_of, scored, scores
from .exact import EXACT_TIME, allowed, better, place_exactly, proven
from .first import first_answer
from .fleet import Fleet
from .layers import document_layers
from .movement import Capped, fan_out, moves_between_layers
from .proof import Rules, prove, small, within_cap
from .ready import LARGE, solvers_ready
from .replan import Replan, copies_by_layer, renamed, slots_of
from .replicated import balance_and_bound, place_copies
from .request import Request, check
from .sample import load_samples, windows
from .single import Single, device_of

if TYPE_CHECKING:
    from .timed import Timing

BOUND_TIME = 0.2  # of the time for search and proof goes to the proof at least
LEAST_BOUND = 0.6  # seconds of a processor that the cheapest bound takes of 58 layers x 256 experts
AFFINITY_TIME = 0.3  # of the rest, at most, to the traffic that is searched on
SAFE_TIME = 0.35  # and of what is left, at most, to trials of the balance cap
PROOF_TIME = 0.3  # of the time for copies goes to the exact program at least, where layers are small enough for it
LEAST_TIME = 0.05  # of a search, in seconds: it returns where it began


def place(
    trace: Trace,
    request: Request,
    *,
    trace_path: str = "",
    previous_path: str = "",
    model: Model | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: Event | None = None,
    budget: Budget | None = None,
) -> Placement:
    """Solve, score and say how sure the answer is. Raises ``MoeplanError`` where the request cannot be met.

    budget: what ends the whole of it; by default the request's time limit, once the solvers are compiled and loaded.
    """
    if budget is None:
        solvers_ready(None, on_event)
        budget = Budget.of(request.time_limit)
    fitted = trace.part(*request.fit)
    fleet = Fleet.of(request.devices)
    notes = check(trace, fitted, request, fleet)
    objective = "balance" if trace.counts_only else request.objective
    digest = trace.digest()
    rest = rest_of(trace, request.fit)
    usual = baseline_slots(fitted, request, fleet)
    known, least = scored(usual, request, fitted, rest, budget)
    search = budget.before(least)
    try:
        # The arrays are small: more BLAS threads than one slow them down, and there are two searches at a time.
        with threadpool_limits(1, user_api="blas"):
            if solvers_ready(search, on_event, fitted.expert_counts.size):
                answer = _answer(fitted, request, fleet, objective, search, on_event, stop)
            else:
                answer = first_answer(fitted, request, fleet, objective, usual, known, search)
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    layers = document_layers(answer.slots)
    same = [name for name, slots in usual.items() if slots is answer.slots]
    mine = known[same[0]] if same else scores(layers, request, fitted, rest)
    sizes = None if model is None else _expert_bytes(model, request, trace.layers)
    moves = None
    if request.previous is not None:
        copies = copies_by_layer(request.previous, layers)
        moved = None if model is None else int(np.dot(copies, sizes or [model.expert_bytes()] * trace.layers))
        moves = Moves(previous=previous_path, copies=sum(copies), limit=request.max_moves, bytes=moved)
    return Placement(
        model=model.name if model else trace.model,
        expert_bytes=sizes,
        num_experts=trace.num_experts,
        devices=request.devices,
        layers=layers,
        objective=objective,
        movement=request.movement,
        share_rule=request.shares,
        groups=request.groups,
        balance_cap=answer.cap,
        balance_cap_of=None if answer.cap is None else "samples" if request.balance_cap is None else "fit",
        solver=answer.solver,
        scores={"placement": mine, **known},
        trace=TraceSource(
            path=trace_path,
            digest=digest,
            fit=request.fit,
            tokens=fitted.tokens,
            counts_only=trace.counts_only,
        ),
        moves=moves,
        notes=tuple(
            note
            for note in (
                *notes,
                repeated_rows(fitted),
                *compared_notes(usual, fitted, request, fleet),
                *answer.notes,
                *_cut_short(budget),
            )
            if note
        ),
        seed=request.seed,
    )


def _expert_bytes(model: Model, request: Request, layers: int) -> tuple[int, ...] | None:
    """[L] bytes of one expert as stored; None where the model has other layers than the trace."""
    dtype = request.timing.dtype if request.timing else model.dtype
    found = tuple(model.expert_bytes(ordinal, dtype) for ordinal in range(len(model.moe_layers)))
    return found if len(found) == layers else None


def _cut_short(budget: Budget) -> tuple[str, ...]:
    """What there was no time for."""
    return (f"no time for {', '.join(budget.skipped)}: raise --time-limit",) if budget.skipped else ()


def _answer(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    budget: Budget,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    if request.timing is not None:
        return _for_time(fitted, request, fleet, request.timing, budget, on_event, stop)
    if objective == "balance" or request.slots > fitted.num_experts:
        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        return _with_copies(fitted, request, single, objective, budget, on_event, stop)
    return _single_copies(fitted, request, single_of(request, fleet), objective, budget, on_event, stop)


def single_of(request: Request, fleet: Fleet) -> Single:
    """The request for single copies, from its previous placement where it has one."""
    old = _previous(request, fleet)
    return Single(fleet, request.movement, request.groups, old, request.max_moves, seed=request.seed)


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
    old = _previous(request, fleet)
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


def _previous(request: Request, fleet: Fleet) -> np.ndarray | None:
    """[L, E] devices of the previous placement."""
    if request.previous is None:
        return None
    if not request.previous.single_copy:
        raise MoeplanError("--previous has replicas: give as many --slots as it has")
    return device_of(Slots.from_lists([layer.slots for layer in request.previous.layers], None, fleet.capacity))


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
    # Imported when it is needed: its compiled loops take a second to load.
    from ...solvers.replication import replicate

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
    # Imported when it is needed: its compiled loops take a second to load.
    from ...solvers.shares import optimal_shares

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
