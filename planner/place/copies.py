"""Copies for balance: placed, proven where layers are small enough, reached from a previous placement."""

# W windows, L layers, E experts

import time
from dataclasses import replace

import numpy as np

from ...solvers.replication.replicate import replicate
from ...solvers.replication.shares import optimal_shares
from ...solvers.result import Solution
from ...solvers.slots import Slots
from ...spec.placement import Objective
from ...spec.trace import Trace
from ..budget import Budget
from .answer import EXACT_PROGRAM, Answer, record_of
from .fleet import Fleet
from .proof import Rules, prove, small, within_cap
from .replan import Replan, renamed, slots_of
from .replicated import balance_and_bound, place_copies
from .request import Request
from .sample import windows
from .single import Single

PROOF_TIME = 0.3  # of the time goes to the exact program at least, where layers are small enough for it


def newly_placed(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    budget: Budget,
) -> Solution[Slots]:
    """Copies for balance, or hosts first by what travels, as if there were no previous placement."""
    if objective != "balance":
        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        full, steps = request.equal_slots, request.steps
        return place_copies(single, fitted, shares=request.shares, full=full, steps=steps, budget=budget)
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


def place_with_copies(
    fitted: Trace,
    request: Request,
    single: Single,
    objective: Objective,
    budget: Budget,
) -> Answer:
    """Copies for balance in the budget, with a bound. Raises ``SolverError`` and ``InfeasibleError``."""
    fleet, load = single.fleet, windows(fitted)
    began = time.perf_counter()
    # Where layers are small enough to be proven, the proof gets a part of the time too.
    provable = small(load, single, request.shares)
    parts = (1.0 if request.max_moves is None else 0.6) * (1 - PROOF_TIME if provable else 1.0)
    found = newly_placed(fitted, request, fleet, objective, budget.part(parts))
    # Where hosts were chosen for locality, better balance alone is no better placement.
    free = objective == "balance" or len(fleet.names) == 1
    rules: Rules = {"shares": request.shares, "full": request.equal_slots}
    proving = budget if request.max_moves is None else budget.part(0.5)
    proof = prove(found.assignment, single, load, **rules, improve=free, budget=proving)
    slots, bounds = proof.slots, proof.bounds
    if request.previous is not None:
        way = replan(request, fleet, slots, load, objective, budget)
        slots = way.within(request.max_moves)
        if request.shares == "optimal":
            slots = optimal_shares(slots, load.sum(axis=0), fleet.speed)
    if request.balance_cap is not None:
        slots = within_cap(slots, single, load.sum(axis=0), request, budget)
    value, _ = balance_and_bound(slots, single, load, request.shares, request.equal_slots)
    found = replace(found, status="time_limit") if proof.late else found
    if proof.improved:
        found = replace(found, solver=f"{found.solver}, {proof.improved} layers by the {EXACT_PROGRAM}")
    minimised = "mean over layers and windows of the hottest device's time over the ideal"
    best = max(bounds.values())
    return Answer(slots, record_of(found, value, best, bounds, minimised, time.perf_counter() - began))


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
