"""Place: a trace in, a placement out, with its scores, its bound and what was assumed."""

# L layers, E experts, G devices

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from ...solvers import compiled
from ...solvers.balance import mean_balance
from ...solvers.replication import replicate
from ...solvers.result import NotFound, Solution, SolverError
from ...solvers.shares import optimal_shares
from ...solvers.slots import Slots
from ...spec.errors import DocumentError, InfeasibleError, MoeplanError
from ...spec.model import Model
from ...spec.placement import (
    Moves,
    Objective,
    Placement,
    PlacementLayer,
    PlacementSolver,
    Score,
    Scores,
    TraceSource,
)
from ...spec.repeats import repeated_rows
from ...spec.trace import Trace
from . import baselines
from .cap import default_cap
from .exact import EXACT_TIME, allowed, better, place_exactly, proven
from .fleet import Fleet
from .layers import document_layers
from .movement import Capped, fan_out, moves_between_layers
from .proof import Rules, prove, within_cap
from .replan import copies_by_layer, within_moves
from .replicated import balance_and_bound, place_copies
from .request import Request, check
from .sample import load_samples, windows
from .score import score
from .single import Single, device_of
from .timed import Timing, place_for_time

BOUND_TIME = 0.2  # of the time limit goes to bounds at least
SAFE_TIME = 0.3  # and to trials of the balance cap at most
LEAST_TIME = 0.5  # of the search, in seconds


@dataclass(frozen=True)
class Answer:
    """A placement with its proof, before it becomes a document."""

    slots: Slots
    solver: PlacementSolver
    cap: float | None = None
    notes: tuple[str, ...] = ()


def place(
    trace: Trace,
    request: Request,
    *,
    trace_path: str = "",
    previous_path: str = "",
    model: Model | None = None,
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: Event | None = None,
) -> Placement:
    """Solve, score and say how sure the answer is. Raises ``MoeplanError`` where the request cannot be met."""
    fitted = trace.part(*request.fit)
    fleet = Fleet.of(request.devices)
    notes = check(trace, fitted, request, fleet)
    objective = "balance" if trace.counts_only else request.objective
    if on_event:
        on_event({"what": "loading the solvers (compiled once, in about half a minute)"})
    compiled.load_all()
    try:
        # The arrays are small: more BLAS threads than one slow them down, and there are two searches at a time.
        with threadpool_limits(1, user_api="blas"):
            answer = _answer(fitted, request, fleet, objective, on_event, stop)
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    layers = document_layers(answer.slots)
    scored = {"placement": layers, **baseline_layers(fitted, request, fleet)}
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
        scores={name: scores(placed, request, trace) for name, placed in scored.items()},
        trace=TraceSource(
            path=trace_path,
            digest=trace.digest(),
            fit=request.fit,
            tokens=fitted.tokens,
            counts_only=trace.counts_only,
        ),
        moves=moves,
        notes=tuple(note for note in (*notes, repeated_rows(fitted), *answer.notes) if note),
        seed=request.seed,
    )


def _expert_bytes(model: Model, request: Request, layers: int) -> tuple[int, ...] | None:
    """[L] bytes of one expert as stored; None where the model has other layers than the trace."""
    dtype = request.timing.dtype if request.timing else model.dtype
    found = tuple(model.expert_bytes(ordinal, dtype) for ordinal in range(len(model.moe_layers)))
    return found if len(found) == layers else None


def _answer(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    if request.timing is not None:
        return _for_time(fitted, request, fleet, request.timing, on_event, stop)
    if objective == "balance" or request.slots > fitted.num_experts:
        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        return _with_copies(fitted, request, single, objective, on_event, stop)
    return _single_copies(fitted, request, single_of(request, fleet), objective, on_event, stop)


def single_of(request: Request, fleet: Fleet) -> Single:
    """The request for single copies, from its previous placement where it has one."""
    old = _previous(request, fleet)
    return Single(fleet, request.movement, request.groups, old, request.max_moves, seed=request.seed)


def _for_time(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    timing: Timing,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    copies = request.slots > fitted.num_experts
    if request.balance_cap is not None or (copies and request.previous is not None):
        what = "--balance-cap" if request.balance_cap is not None else "--previous with replicas"
        raise MoeplanError(f"{what} does not go with --cluster: predicted time is the objective there")
    old = _previous(request, fleet)
    weights = timing.weights(fitted)
    single = Single(fleet, "ep", request.groups, old, request.max_moves, weights, request.seed)
    load, limit = fitted.expert_counts, request.time_limit
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
        limit /= 2
        found = place_copies(
            single, fitted, shares=request.shares, full=request.equal_slots, time_limit=limit, stop=stop
        )
        candidates.append(found.assignment)
    known = [slots for slots in candidates if slots is not None]
    steps = request.steps
    found = place_for_time(single, fitted, timing, known, steps=steps, time_limit=limit, on_event=on_event, stop=stop)
    words = f"predicted seconds of dispatch, experts and combine of a step {timing.workload}"
    bounds = {"all devices busy at their best rate": found.bound}
    return Answer(found.assignment, _record(found, found.objective, found.bound, bounds, words, found.seconds))


def _previous(request: Request, fleet: Fleet) -> np.ndarray | None:
    """[L, E] devices of the previous placement."""
    if request.previous is None:
        return None
    if not request.previous.single_copy:
        raise MoeplanError("--previous has replicas: give as many --slots as it has")
    return device_of(Slots.from_lists([layer.slots for layer in request.previous.layers], None, fleet.capacity))


def _with_copies(
    fitted: Trace,
    request: Request,
    single: Single,
    objective: Objective,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    fleet, load = single.fleet, windows(fitted)
    began = time.perf_counter()
    if objective == "balance":
        found = replicate(
            load,
            fleet.speed,
            fleet.capacity,
            fleet.hosts,
            groups=request.groups,
            shares=request.shares,
            full=request.equal_slots,
            seed=request.seed,
            time_limit=request.time_limit,
        )
    else:
        found = place_copies(
            single,
            fitted,
            shares=request.shares,
            full=request.equal_slots,
            steps=request.steps,
            time_limit=request.time_limit,
            on_event=on_event,
            stop=stop,
        )
    left = request.time_limit - (time.perf_counter() - began)
    # Where hosts were chosen for locality, better balance alone is no better placement.
    free = objective == "balance" or len(fleet.names) == 1
    rules: Rules = {"shares": request.shares, "full": request.equal_slots}
    proof = prove(found.assignment, single, load, **rules, improve=free, time_limit=left, stop=stop)
    slots, bounds = proof.slots, proof.bounds
    if request.previous is not None:
        slots = within_moves(request.previous, slots, load, fleet.speed, request.max_moves)
        if request.shares == "optimal":
            slots = optimal_shares(slots, load.sum(axis=0), fleet.speed)
    if request.balance_cap is not None:
        slots = within_cap(slots, single, load.sum(axis=0), request, time_limit=left, stop=stop)
    value, _ = balance_and_bound(slots, single, load, request.shares, request.equal_slots)
    found = replace(found, status="time_limit") if proof.late else found
    words = "mean over layers and windows of the hottest device's time over the ideal"
    best = max(bounds.values())
    return Answer(slots, _record(found, value, best, bounds, words, time.perf_counter() - began))


def _single_copies(
    fitted: Trace,
    request: Request,
    single: Single,
    objective: Objective,
    on_event: Callable[[dict[str, Any]], None] | None,
    stop: Event | None,
) -> Answer:
    began = time.perf_counter()
    fleet, limit = single.fleet, request.time_limit
    load, cap = load_samples(fitted), request.balance_cap
    affinity = single.affinity(fitted)
    notes: tuple[str, ...] = ()
    in_time = True
    if cap is not None:
        load = fitted.expert_counts[None]
    elif objective == "latency" and fitted.tokens >= 2:
        if on_event:
            on_event({"what": "finding a balance that holds on tokens to come"})
        cap, notes, in_time = default_cap(single, fitted, limit * SAFE_TIME)
    most = float("inf") if cap is None else cap
    exact = place_exactly(single, fitted, affinity, load, most, time_limit=limit * EXACT_TIME, stop=stop)
    usable = exact if exact is not None and allowed(exact.assignment, single) else None
    left = limit * (1 - BOUND_TIME) - (time.perf_counter() - began)
    try:
        if usable is not None and usable.status == "optimal":
            found = usable
        else:
            found = single.solve(
                affinity,
                load,
                cap=most,
                steps=request.steps,
                time_limit=max(left, LEAST_TIME),
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
    rest = limit * BOUND_TIME
    if stop is None or not stop.is_set():
        rest = max(rest, limit - (time.perf_counter() - began))
    if exact is not None:
        moved = proven(fitted, single, affinity, found.assignment, exact.bound)
    elif single.movement == "coherent" and fitted.layers > 1:
        reached = mean_balance(found.assignment, load, fleet.speed)  # above the cap by rounding, perhaps
        capped = None if cap is None else Capped(load, max(cap, reached))
        moved = moves_between_layers(single, affinity, found.assignment, capped, rest)
    else:
        moved = fan_out(fitted, single, found.assignment)
    best = max(moved.bounds.values(), default=0.0)
    solver = _record(found, moved.value, best, moved.bounds, moved.words, time.perf_counter() - began)
    return Answer(slots, solver, cap, notes)


def _record(
    found: Solution, value: float, bound: float, bounds: dict[str, float], words: str, seconds: float
) -> PlacementSolver:
    proven = bound >= value * (1 - 1e-9)
    status = "optimal" if proven else "feasible" if found.status == "optimal" else found.status
    gap = 0.0 if proven else (value - bound) / value
    return PlacementSolver(
        status=status,
        objective=value,
        bound=min(bound, value),
        gap=max(gap, 0.0),
        seconds=seconds,
        minimised=words,
        bounds=bounds,
    )


def baseline_layers(fitted: Trace, request: Request, fleet: Fleet) -> dict[str, tuple[PlacementLayer, ...]]:
    """What a user would do instead: linear, and EPLB with as many slots; left out where it does not fit."""
    linear = baselines.linear_slots(fitted.layers, fitted.num_experts, fleet)
    eplb = baselines.eplb_slots(fitted.expert_counts, request.slots, request.groups, fleet)
    named = {"linear": linear, "eplb": eplb}
    return {name: document_layers(slots) for name, slots in named.items() if slots is not None}


def scores(layers: tuple[PlacementLayer, ...], request: Request, trace: Trace) -> Scores:
    """On the fitted part, and on the rest where there is one."""

    def on(part: Trace) -> Score:
        found = score(layers, request.devices, part)
        timing = request.timing
        return found if timing is None else found.model_copy(update={"step_seconds": timing.seconds(layers, part)})

    rest = _rest(trace, request.fit)
    return Scores(fit=on(trace.part(*request.fit)), held_out=None if rest is None else on(rest))


def _rest(trace: Trace, fit: tuple[float, float]) -> Trace | None:
    """What follows the fitted part, or is before it; None where nothing is left."""
    low, high = fit
    if trace.counts_only or (low, high) == (0, 1):
        return None
    try:
        return trace.part(high, 1.0) if high < 1 else trace.part(0.0, low)
    except DocumentError:  # the nearest end of a sequence is the end of the trace
        return None
