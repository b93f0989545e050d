"""Placements with one copy of every expert, annealed."""

# L layers, E experts, G devices, S samples

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...solvers.placement.affinity import Affinity
from ...solvers.result import Solution
from ...solvers.slots import Slots
from ...spec.errors import MoeplanError
from ...spec.placement import Movement
from ...spec.trace import Trace
from ..budget import Budget, OutOfTime
from . import baselines
from .fleet import Fleet, check_groups
from .request import Request
from .sample import coherent_affinity, counted_affinity, fan_out_affinity

DEVICE_WEIGHT, HOST_WEIGHT = 0.3, 1.3  # a move between hosts counts like four inside one: hosts first
LEAST_TIME = 0.05  # of a search, in seconds: it returns where it began
SMOOTHING = 0.1  # seconds of a processor that the traffic of tokens to come takes at least
GROUP_STAGE = 5  # the stage that gives groups to hosts gets this part of the steps


def anneal(*problem: Any, **options: Any) -> Solution[np.ndarray]:
    """``solvers.annealing.anneal``, imported when it is needed: its compiled loops take a second to load."""
    from ...solvers.placement import annealing

    return annealing.anneal(*problem, **options)


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

    def affinity(self, trace: Trace, budget: Budget | None = None) -> Affinity:
        """What tokens to come will exchange; as counted, where the budget ends before that is known."""
        if self.movement != "coherent":
            return fan_out_affinity(trace)
        if budget is not None and not budget.affords(SMOOTHING * budget.slowdown, "smoothing the traffic"):
            return counted_affinity(trace)
        try:
            return coherent_affinity(trace, budget)
        except OutOfTime:
            return counted_affinity(trace)

    def cost(self, affinity: Affinity, placed: np.ndarray) -> float:
        """Weighted crossings of placed [L, E]."""
        return affinity.cost(placed, self.fleet.hosts, *self.weights)

    def counted(self, trace: Trace) -> Affinity:
        """The same at once: as counted on the trace."""
        return counted_affinity(trace) if self.movement == "coherent" else fan_out_affinity(trace)

    def solve(
        self,
        affinity: Affinity,
        load: np.ndarray,
        *,
        cap: float = math.inf,
        price: float = 0.0,
        start: np.ndarray | None = None,
        fixed_hosts: bool = False,
        steps: int | None = None,
        budget: Budget | None = None,
        answering: bool = False,
        **effort: int | None,
    ) -> Solution[np.ndarray]:
        """[L, E] devices; load: [S, L, E]; start: [L, E] an earlier answer, which is spliced with what is found.
        fixed_hosts: experts stay on the hosts that it has them on.

        effort: ``chains`` and ``generations`` of ``anneal``.

        budget: ends it; without one, its steps do. answering: it looks for the answer itself, so that those who watch
        hear of the best so far; trials of parts and caps have costs of their own. Raises as ``anneal``.
        """
        fleet, budget = self.fleet, budget or Budget.of(math.inf)
        if self.groups > 1 and self.previous is None:
            cool = cap < math.inf or price > 0
            start = self._by_group(affinity, load, cool, steps, budget.part(1 / GROUP_STAGE))
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
            fixed_hosts=fixed_hosts or self.groups > 1,
            steps=steps,
            seed=self.seed,
            **effort,
            time_limit=max(budget.left, LEAST_TIME),
            on_event=self._heard(budget, len(load[0]), answering),
            stop=budget.stop,
        )

    def _heard(self, budget: Budget, layers: int, answering: bool) -> Callable[[dict[str, Any]], None] | None:
        """Who hears of progress: costs as the answer will say them, in moves per boundary and token, or not at all."""
        if budget.on_event is None:
            return None

        def hear(event: dict[str, Any]) -> None:
            cost = event.pop("incumbent", None)
            said = answering and cost is not None and self.movement == "coherent" and layers > 1
            budget.tell(**event, **({"incumbent": cost / (layers - 1)} if said else {}))

        return hear

    def start(self, trace: Trace) -> np.ndarray:
        """[L, E] devices where a search begins: the previous placement, or a greedy one that keeps groups together."""
        if self.previous is not None:
            return self.previous
        return baselines.grouped_greedy(trace.expert_counts, self.fleet, self.groups)

    def _by_group(
        self,
        affinity: Affinity,
        load: np.ndarray,
        cool: bool,
        steps: int | None,
        budget: Budget,
    ) -> np.ndarray:
        """[L, E] devices, every expert group on one host: groups are annealed onto hosts, then balanced inside."""
        fleet, (layers, experts) = self.fleet, load.shape[1:]
        hosts, size = len(fleet.names), check_groups(self.groups, experts, len(fleet.names))
        per_host = self.groups // hosts
        host_capacity = np.bincount(fleet.hosts, fleet.capacity)
        if (host_capacity < per_host * size).any():
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
            seed=self.seed,
            time_limit=max(budget.left, LEAST_TIME),
            stop=budget.stop,
        )
        host_of = np.repeat(found.assignment, size, axis=1)
        return baselines.inside_hosts(host_of, load.sum(axis=0), fleet)


def single_of(request: Request, fleet: Fleet) -> Single:
    """The request for single copies, from its previous placement where it has one."""
    old = previous_devices(request, fleet)
    return Single(fleet, request.movement, request.groups, old, request.max_moves, seed=request.seed)


def previous_devices(request: Request, fleet: Fleet) -> np.ndarray | None:
    """[L, E] devices of the previous placement."""
    if request.previous is None:
        return None
    if not request.previous.single_copy:
        raise MoeplanError("--previous has replicas: give as many --slots as it has")
    return device_of(Slots.from_lists([layer.slots for layer in request.previous.layers], None, fleet.capacity))


def device_of(slots: Any) -> np.ndarray:
    """[L, E] device of each expert's only copy."""
    placed = np.empty((len(slots.expert_of), slots.num_experts), np.int64)
    for row, experts in zip(placed, slots.expert_of, strict=True):
        held = experts >= 0
        row[experts[held]] = slots.device_of_slot[held]
    return placed
