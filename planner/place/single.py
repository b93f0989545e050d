"""Placements with one copy of every expert: annealed under a balance cap that also holds on tokens to come."""

# L layers, E experts, G devices, W windows

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import numpy as np

from ...solvers.annealing import Affinity, anneal
from ...solvers.balance import mean_balance
from ...solvers.result import NotFound, Solution
from ...spec.errors import MoeplanError
from ...spec.placement import Movement
from ...spec.trace import Trace
from . import baselines
from .fleet import Fleet
from .sample import coherent_affinity, fan_out_affinity, windows

DEVICE_WEIGHT, HOST_WEIGHT = 0.3, 1.3  # a move between hosts counts like four inside one: hosts first
FOLDS = 2
TRIAL = 20  # a trial of the cap gets this part of the steps
TRIAL_ERROR = 0.015  # of balance; chosen by looking at held-out balance on recorded traces
LEAST_ROOM = 0.1  # of the way from the coolest placement known to EPLB's balance: a cap must leave something to choose
GROUP_STAGE = 5  # the stage that gives groups to hosts gets this part of the steps


@dataclass(frozen=True)
class Single:
    """What to place and how; ``weights`` are what a move inside a host and between hosts costs."""

    fleet: Fleet
    movement: Movement = "coherent"
    groups: int = 1
    previous: np.ndarray | None = None
    max_moves: int | None = None
    weights: tuple[float, float] = (DEVICE_WEIGHT, HOST_WEIGHT)
    seed: int = 0

    def affinity(self, trace: Trace) -> Affinity:
        return coherent_affinity(trace) if self.movement == "coherent" else fan_out_affinity(trace)

    def solve(
        self,
        affinity: Affinity,
        load: np.ndarray,
        *,
        cap: float = math.inf,
        price: float = 0.0,
        steps: int | None = None,
        time_limit: float = math.inf,
        chains: int | None = None,
        on_event: Callable[[dict[str, Any]], None] | None = None,
        stop: Event | None = None,
    ) -> Solution[np.ndarray]:
        """[L, E] devices; load: [W, L, E]."""
        fleet, began = self.fleet, time.perf_counter()
        start = None
        if self.groups > 1 and self.previous is None:
            cool = cap < math.inf or price > 0
            start = self._by_group(affinity, load, cool, steps, chains, time_limit / GROUP_STAGE, stop)
        left = time_limit - (time.perf_counter() - began)
        return anneal(
            affinity,
            load,
            fleet.capacity,
            fleet.speed,
            fleet.hosts,
            device_weight=self.weights[0],
            host_weight=self.weights[1],
            balance_cap=cap,
            price=price,
            previous=self.previous,
            max_moves=self.max_moves,
            start=start,
            fixed_hosts=self.groups > 1,
            steps=steps,
            chains=chains,
            seed=self.seed,
            time_limit=left,
            on_event=on_event,
            stop=stop,
        )

    def start(self, trace: Trace) -> np.ndarray:
        """[L, E] devices where a search begins: the previous placement, or a greedy one that keeps groups together."""
        if self.previous is not None:
            return self.previous
        if self.groups > 1:
            return self._by_group(self.affinity(trace), windows(trace), True, 1, 1, math.inf, None)
        return baselines.greedy(trace.expert_counts, self.fleet)

    def safe_cap(self, trace: Trace, steps: int, time_limit: float = math.inf) -> float:
        """A cap on the mean balance over the windows that keeps EPLB's balance on tokens to come.

        Annealing uses up what a cap allows, so that its balance rises more than a greedy placement's on tokens that it
        has not seen. By how much, two trials say: fitted on one half of the trace, both scored on the other (cross
        fitting); the cap is EPLB's balance over the windows less that difference and what two trials may be off by.
        """
        free = replace(self, previous=None, max_moves=None)
        turn = time_limit / 3  # each search that waits for another

        def excess(fold: tuple[Trace, Trace]) -> float:
            fitted, rest = fold
            baseline = self._baseline(fitted)
            load = windows(fitted)
            cap = free._within_reach(load, mean_balance(baseline, load, self.fleet.speed), steps, turn)
            try:
                found = free.solve(self.affinity(fitted), load, cap=cap, steps=steps, chains=1, time_limit=turn)
            except NotFound:  # too little time for a trial
                return 0.0
            unseen = [mean_balance(p, windows(rest, 1), self.fleet.speed) for p in (found.assignment, baseline)]
            return unseen[0] - unseen[1]

        halves = trace.part(0, 0.5), trace.part(0.5, 1)
        with ThreadPoolExecutor(FOLDS) as pool:
            excesses = list(pool.map(excess, (halves, halves[::-1])))
        usual = mean_balance(self._baseline(trace), windows(trace), self.fleet.speed)
        cap = usual - max(0.0, float(np.mean(excesses))) - TRIAL_ERROR
        return self._within_reach(windows(trace), usual, steps, turn, cap)

    def _within_reach(
        self, load: np.ndarray, usual: float, steps: int, time_limit: float, cap: float | None = None
    ) -> float:
        """The cap (``usual`` by default), raised where hardly any placement keeps it; load: [W, L, E]."""
        layers, experts = load.shape[1:]
        nothing = Affinity.of(np.zeros((layers - 1, experts, experts)))
        few = max(1, steps // 4)
        coolest = self.solve(nothing, load, price=1.0, steps=few, chains=1, time_limit=time_limit).assignment
        least = mean_balance(coolest, load, self.fleet.speed)
        return max(usual if cap is None else cap, least + LEAST_ROOM * abs(usual - least))

    def _baseline(self, trace: Trace) -> np.ndarray:
        """[L, E] EPLB's placement where it can be asked, else the greedy one."""
        fleet, load = self.fleet, trace.expert_counts
        slots = baselines.eplb_slots(load, trace.num_experts, self.groups, fleet) if fleet.alike else None
        return baselines.greedy(load, fleet) if slots is None else device_of(slots)

    def _by_group(
        self,
        affinity: Affinity,
        load: np.ndarray,
        cool: bool,
        steps: int | None,
        chains: int | None,
        time_limit: float,
        stop: Event | None,
    ) -> np.ndarray:
        """[L, E] devices, every expert group on one host: groups are annealed onto hosts, then balanced inside."""
        fleet, (layers, experts) = self.fleet, load.shape[1:]
        hosts, size = len(fleet.names), check_groups(self.groups, experts, len(fleet.names))
        per_host = self.groups // hosts
        room = np.bincount(fleet.hosts, fleet.capacity)
        if (room < per_host * size).any():
            raise MoeplanError(f"{per_host} groups of {size} experts need {per_host * size} slots on every host")
        shape = (layers, self.groups, size, self.groups, size)
        between = affinity.transitions.reshape(layers - 1, *shape[1:]).sum(axis=(2, 4))
        within = affinity.together.reshape(shape).sum(axis=(2, 4))
        within = (within + within.transpose(0, 2, 1)) / 2  # sums in different orders differ in the last digit
        np.einsum("lgg->lg", within)[:] = 0.0
        found = anneal(
            Affinity.of(between, within),
            load.reshape(len(load), layers, self.groups, size).sum(axis=3),
            np.full(hosts, per_host),
            np.bincount(fleet.hosts, fleet.speed),
            np.arange(hosts),
            balance_cap=math.inf,
            price=(float(between.sum() + within.sum()) / layers or 1.0) if cool else 0.0,
            steps=None if steps is None else max(1, steps // GROUP_STAGE),
            chains=chains,
            seed=self.seed,
            time_limit=time_limit,
            stop=stop,
        )
        host_of = np.repeat(found.assignment, size, axis=1)
        placed = np.empty((layers, experts), np.int64)
        for host in range(hosts):
            devices = np.flatnonzero(fleet.hosts == host)
            inside = Fleet(fleet.speed[devices], fleet.capacity[devices], np.zeros(len(devices), int), ("",))
            here = np.nonzero(host_of == host)[1].reshape(layers, -1)
            mine = np.take_along_axis(load.sum(axis=0), here, axis=1)
            np.put_along_axis(placed, here, devices[baselines.greedy(mine, inside)], axis=1)
        return placed


def check_groups(groups: int, experts: int, hosts: int) -> int:
    """Experts per group, adjacent ones; raises where the rules of group-limited routing are broken."""
    if experts % groups:
        raise MoeplanError(f"experts % groups == 0 is broken: {experts} experts in {groups} groups")
    if groups % hosts:
        raise MoeplanError(f"groups % hosts == 0 is broken: {groups} groups on {hosts} hosts")
    return experts // groups


def device_of(slots: Any) -> np.ndarray:
    """[L, E] device of each expert's only copy."""
    placed = np.empty((len(slots.expert_of), slots.num_experts), np.int64)
    for row, experts in zip(placed, slots.expert_of, strict=True):
        held = experts >= 0
        row[experts[held]] = slots.device_of_slot[held]
    return placed
