"""Placements with spare slots: experts to hosts by locality, then copies and shares inside each host by balance."""

# L layers, E experts, G devices, W windows

import time
from dataclasses import replace

import numpy as np

from ...solvers.replication.replicate import replicate
from ...solvers.result import NotFound, Solution
from ...solvers.slots import EMPTY, Slots
from ...spec.placement import Shares
from ...spec.trace import Trace
from ..budget import Budget
from .cap import balance_range
from .fleet import Fleet, check_groups, proportional
from .proof import least_balance
from .sample import load_samples, windows
from .score import reached_balance
from .single import Single

HOST_STAGE = 0.6  # of the time
AFFINITY_TIME = 0.3  # of which at most for the traffic between experts
CAP_TIME = 0.2  # and, of the rest, for the coolest hosts
FOR_LOCALITY = (
    0.25  # of the way from their balance to EPLB's may go into locality: with half, hosts run hotter than EPLB's
)


def place_copies(
    single: Single,
    trace: Trace,
    *,
    shares: Shares,
    full: bool,
    steps: int | None = None,
    budget: Budget,
) -> Solution[Slots]:
    """Copies that fill the slots, every expert's copies on one host.

    Which host an expert is on decides what its tokens pay between hosts, and copies inside a host cost nothing there:
    so hosts come first, by the movement of ``single`` under a cap on the balance of hosts, then copies, places and
    shares for the balance of devices. Objective: mean balance over windows and layers; the bound is that of balance
    alone, without locality.
    """
    began, fleet = time.perf_counter(), single.fleet
    load, experts, hosts = windows(trace), trace.num_experts, len(fleet.names)
    host_of, late = np.zeros((trace.layers, experts), np.int64), False
    if hosts > 1:
        onto = _hosts(single, trace, steps, budget.part(HOST_STAGE))
        host_of, late = onto.assignment, onto.status == "time_limit"
    expert_of = np.full((trace.layers, int(fleet.capacity.sum())), EMPTY)
    share_of = np.zeros(expert_of.shape)
    owner = np.repeat(np.arange(len(fleet.speed)), fleet.capacity)
    for host in range(hosts):
        devices = np.flatnonzero(fleet.hosts == host)
        seats = np.flatnonzero(np.isin(owner, devices))
        here = np.nonzero(host_of == host)[1].reshape(trace.layers, -1)
        inside = replicate(
            np.stack([np.take_along_axis(window, here, axis=1) for window in load]),
            fleet.speed[devices],
            fleet.capacity[devices],
            np.zeros(len(devices), int),
            shares=shares,
            full=full,
            seed=single.seed,
            time_limit=budget.left / (hosts - host),
        )
        late |= inside.status == "time_limit"
        held = inside.assignment.expert_of
        expert_of[:, seats] = np.where(held == EMPTY, EMPTY, np.take_along_axis(here, np.maximum(held, 0), axis=1))
        share_of[:, seats] = inside.assignment.share_of
    found = Slots(expert_of, share_of, fleet.capacity)
    objective, bound = balance_and_bound(found, single, load, shares, full)
    solver = "annealing of hosts, local search inside them" if hosts > 1 else "local search"
    solution = Solution.from_heuristic(found, objective, bound, time.perf_counter() - began, solver)
    return replace(solution, status="time_limit") if late and solution.status == "feasible" else solution


def balance_and_bound(
    slots: Slots, single: Single, load: np.ndarray, shares: Shares, full: bool = False
) -> tuple[float, float]:
    """Mean hottest device over the ideal, and its bound over all placements; load: [W, L, E]."""
    reached = reached_balance(slots, load, single.fleet.speed)
    return float(reached.mean()), float(least_balance(load, single, shares, full).mean())


def _hosts(single: Single, trace: Trace, steps: int | None, budget: Budget) -> Solution[np.ndarray]:
    """[L, E] host of each expert: as many experts on each host as its share of the slots, whole groups together."""
    fleet, experts, hosts = single.fleet, trace.num_experts, len(single.fleet.names)
    host_capacity = np.bincount(fleet.hosts, fleet.capacity)
    counts = proportional(experts, host_capacity)
    over = Fleet(np.bincount(fleet.hosts, fleet.speed), counts, np.arange(hosts), fleet.names)
    stage = Single(over, single.movement, single.groups, weights=(single.weights[1],) * 2, seed=single.seed)
    affinity, load = stage.affinity(trace, budget.part(AFFINITY_TIME)), load_samples(trace)
    if single.groups > 1:
        check_groups(single.groups, experts, hosts)
        return stage.solve(affinity, load, steps=steps, budget=budget)
    # Hosts that run hot cannot be cooled by copies inside them, and a search uses up all the slack that it has.
    between = balance_range(stage, trace, budget.part(CAP_TIME))
    try:
        found = stage.solve(affinity, load, cap=between.at(FOR_LOCALITY), steps=steps, budget=budget)
    except NotFound as error:
        if error.in_time:
            raise
        # No time for locality: hosts are then as even as greedy makes them, and the answer is marked.
        found = Solution(stage.start(trace), 0.0, 0.0, "time_limit", 0.0)
    return found if between.in_time else replace(found, status="time_limit")
