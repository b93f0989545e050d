"""Hosts first: experts to hosts by what crosses between hosts alone, then to devices inside them.

Annealing all at once is at its best a little better, but freezes into a different order of hosts for each seed; with
hosts alone the order is nearly always the same, and good. So this is where a search goes on from.
"""

# S samples, L layers, E experts

import math
from dataclasses import replace

import numpy as np

from ...solvers.placement.affinity import Affinity
from ...solvers.result import SolverError
from ..budget import Budget
from .baselines import inside_hosts
from .fleet import Fleet, proportional
from .single import Single

STEPS = 400  # per layer and expert, of each chain and follower, for hosts and again inside
CHAINS, GENERATIONS = 2, 1
SPREAD = 0.35  # of the balance that devices may lie above the ideal, for hosts: the rest is for devices inside them
HOST_TIME = 0.5  # of the time
TURNS, STEP = 4, 2e-7  # turns of so many steps, and seconds of a processor that a step takes


def hosts_first(
    single: Single, affinity: Affinity, load: np.ndarray, cap: float, steps: int | None, budget: Budget
) -> np.ndarray | None:
    """[L, E] devices; load: [S, L, E]; steps: at most, of each chain.

    None where hosts are not chosen freely, or there is one device or host of them, or no time, or nothing was found.
    """
    fleet, hosts = single.fleet, len(single.fleet.names)
    if single.groups > 1 or single.previous is not None or not 1 < hosts < len(fleet.speed):
        return None
    steps = min(steps or math.inf, STEPS * load[0].size)
    if budget.left < TURNS * STEP * steps * budget.slowdown:
        return None
    capacity = proportional(load.shape[2], np.bincount(fleet.hosts, fleet.capacity))
    over = Fleet(np.bincount(fleet.hosts, fleet.speed), capacity, np.arange(hosts), fleet.names)
    stage = replace(single, fleet=over, weights=(single.weights[1],) * 2)
    quiet = replace(budget, on_event=None)
    try:
        onto = stage.solve(
            affinity,
            load,
            cap=1.0 + SPREAD * (cap - 1.0),
            steps=steps,
            budget=quiet.part(HOST_TIME),
            chains=CHAINS,
            generations=GENERATIONS,
        )
        start = inside_hosts(onto.assignment, load.sum(axis=0), fleet)
        found = single.solve(
            affinity,
            load,
            cap=cap,
            start=start,
            fixed_hosts=True,
            steps=steps,
            budget=quiet,
            chains=CHAINS,
            generations=GENERATIONS,
        )
    except SolverError:  # so few slots may be enough for devices, and not for hosts of them
        return None
    return found.assignment
