"""Options of each layer: where the experts of one layer may be, for every strategy.

Layers that share storage share one plan; they form a class. With storage for every layer each is a class of its own.
"""

import math
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ..solvers import balance
from ..solvers.placement.affinity import Affinity
from ..solvers.placement.affinity import pairs as expert_pairs
from ..solvers.result import SolverError
from ..spec.model import Model, Moe
from ..spec.plan import LayerPlan, Strategy
from ..spec.routing import Routing
from . import splits
from .costs import Costs

Slots = tuple[tuple[int, ...], ...]
BALANCE_SLACK = 1.05  # the local placement may be this much less balanced than the greedy one
STEPS_PER_EXPERT, CHAINS = 500, 4  # work budget of the local placement, which is one of many candidates
LOCAL_TIME, LEAST_TIME = 0.2, 0.02  # of the time left, and seconds, that it may take
LOAD_TIME = 2.0  # seconds that loading its compiled loops takes, about
PROBE_BYTES = 65536  # message by which crossing a host is weighed against crossing a device


@dataclass(frozen=True)
class Classes:
    """Classes of mixture-of-experts layers that share storage; ``members[c]`` are ordinals of such layers."""

    members: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, moe_layers: Sequence[int], stored: int) -> "Classes":
        found: dict[int, list[int]] = {}
        for ordinal, layer in enumerate(moe_layers):
            found.setdefault(layer % stored, []).append(ordinal)
        return cls(tuple(tuple(members) for members in found.values()))

    @cached_property
    def of_ordinal(self) -> np.ndarray:
        """[mixture-of-experts layers] class of each."""
        index = np.zeros(sum(map(len, self.members)), int)
        for c, members in enumerate(self.members):
            index[list(members)] = c
        return index

    def spread(self, chosen: Sequence[LayerPlan]) -> list[LayerPlan]:
        """One plan per mixture-of-experts layer from one per class."""
        plans: dict[int, LayerPlan] = {}
        for members, plan in zip(self.members, chosen, strict=True):
            plans |= dict.fromkeys(members, plan)
        return [plans[ordinal] for ordinal in range(len(plans))]


@dataclass(frozen=True)
class Options:
    """What each class of layers may do. It depends on the layout through the room for weights only, and is remembered.

    ``room`` is [classes, devices] bytes for experts, everywhere.
    """

    costs: Costs
    model: Model
    routing: Routing
    classes: Classes
    even: bool
    seed: int
    deadline: float = math.inf  # ``time.perf_counter()`` by which the search must end
    _memo: dict[tuple, Any] = field(default_factory=dict)

    @property
    def moe(self) -> Moe:
        moe = self.model.moe_block().moe
        assert moe is not None
        return moe

    @cached_property
    def counts(self) -> np.ndarray:
        """[moe layers, experts] tokens."""
        return self.routing.counts(self.moe.num_experts)

    def plain(self, strategy: Strategy, degree: int) -> LayerPlan:
        """The even plan: experts by number, columns in equal parts; ``degree`` devices hold all experts (``ep``)."""
        devices, experts = self.costs.devices, self.moe.num_experts
        if strategy == "sharded":
            return self._split(splits.even(self.moe.ffn_size, devices))
        parts = degree if strategy == "ep" else devices
        if ("plain", strategy, parts) not in self._memo:
            slots = _slots(balance.linear(experts, parts), parts) * (devices // parts)
            self._memo["plain", strategy, parts] = LayerPlan(strategy=strategy, slots=slots)
        return self._memo["plain", strategy, parts]

    def ep(self, degree: int, room: np.ndarray, thorough: bool = True) -> dict[str, list[LayerPlan]]:
        """Per method one plan per class: linear, greedy balance by load, the same by measured speed, and
        ``local``: experts that tokens need together are placed together.

        degree: consecutive devices that together hold all experts; with fewer than all devices every group of them
        holds the same. Where room is too little for any balancing, only ``linear`` is there; without ``thorough``
        ``local`` is left out.
        """
        sizes = [self.model.computed_expert_bytes(members[0], self.costs.dtype) for members in self.classes.members]
        slots = np.min([np.maximum(row, 0) // size for row, size in zip(room, sizes, strict=True)], axis=0)
        capacity = np.minimum(slots.reshape(-1, degree).min(0), self.moe.num_experts).astype(int)
        key = "ep", degree, thorough, *capacity.tolist()
        if key not in self._memo:
            groups = self.costs.devices // degree
            self._memo[key] = {
                method: [LayerPlan(strategy="ep", slots=_slots(row, degree) * groups) for row in device_of]
                for method, device_of in self._placed(degree, capacity, thorough).items()
            }
        return self._memo[key]

    def _placed(self, degree: int, capacity: np.ndarray, thorough: bool) -> dict[str, np.ndarray]:
        """Per method [classes, experts] device among ``degree``; capacity: [degree] experts that one can hold."""
        costs, experts = self.costs, self.moe.num_experts
        load = np.stack([self.counts[list(members)].sum(0) for members in self.classes.members]).astype(float)
        found = {"linear": np.tile(balance.linear(experts, degree), (len(load), 1))}
        if degree == 1 or capacity.sum() < experts:
            return found
        speed = splits.expert_speeds(costs, self.model, self.counts).reshape(-1, degree).mean(0)
        found["greedy"] = balance.greedy_balance(load, np.ones(degree), capacity).assignment
        if self.even:
            return found
        found["weighted"] = balance.greedy_balance(load, speed, capacity).assignment
        with suppress(SolverError):  # where no other placement keeps the balance, the greedy one stands
            if thorough and self._affords_search():
                # Imported when it is needed: its compiled loops take a second to load.
                from ..solvers.placement.annealing import anneal

                cap = BALANCE_SLACK * balance.mean_balance(found["weighted"], load[None], speed)
                found["local"] = anneal(
                    self._together(),
                    load,
                    capacity,
                    speed,
                    np.array(costs.hosts[:degree]),
                    host_weight=self._host_weight(),
                    balance_cap=cap,
                    steps=STEPS_PER_EXPERT * load.size,
                    chains=CHAINS,
                    seed=self.seed,
                    time_limit=max(LOCAL_TIME * (self.deadline - time.perf_counter()), LEAST_TIME),
                ).assignment
        return found

    def sharded(self, room: np.ndarray) -> list[list[LayerPlan]]:
        """Per class: even, fastest, and, where the fastest exceeds ``room``, the fastest within it."""
        found = []
        for c, members in enumerate(self.classes.members):
            if ("sharded", c) not in self._memo:
                counts = self.counts[list(members)]
                self._memo["sharded", c] = splits.FfnSplits(self.costs, self.model, members, counts)
            columns = self._memo["sharded", c].within(room[c])
            columns = columns[:1] if self.even else columns
            found.append([self._split(split) for split in columns])
        return found

    def _split(self, columns: tuple[int, ...]) -> LayerPlan:
        if ("split", columns) not in self._memo:
            nothing: Slots = ((),) * self.costs.devices
            self._memo["split", columns] = LayerPlan(strategy="sharded", slots=nothing, split=columns)
        return self._memo["split", columns]

    def gathered(self, room: np.ndarray) -> list[list[LayerPlan]]:
        """Per class: experts at rest in equal numbers, and as many as fit where that is too many for a device."""
        experts, devices = self.moe.num_experts, self.costs.devices
        found, plain = [], self.plain("gathered", devices)
        for c, members in enumerate(self.classes.members):
            options = [plain]
            most = np.maximum(room[c], 0) // self.model.computed_expert_bytes(members[0], self.costs.dtype)
            held = np.array([len(slots) for slots in plain.slots])
            if (held > most).any() and most.sum() >= experts:
                held = np.minimum(held, most).astype(int)
                while held.sum() < experts:
                    held[np.argmax(most - held)] += 1
                slots = _slots(np.repeat(np.arange(devices), held), devices)
                options.append(LayerPlan(strategy="gathered", slots=slots))
            found.append(options)
        return found

    def _affords_search(self) -> bool:
        """Whether the solvers are loaded, or there is time to."""
        if self.deadline == math.inf or "moeplan.solvers.placement.kernel" in sys.modules:
            return True
        return time.perf_counter() + LOAD_TIME < self.deadline

    def _together(self) -> Affinity:
        """What the de-duplicated fan-out of ``ep`` costs: tokens that need both experts, per class."""
        experts = self.moe.num_experts
        by_layer = expert_pairs(self.routing.expert_ids, experts)
        together = np.stack([by_layer[list(members)].sum(0) for members in self.classes.members])
        return Affinity.of(np.zeros((len(together) - 1, experts, experts)), together)

    def _host_weight(self) -> float:
        """How many times longer a message between hosts takes than one inside a host; 1 on a single host."""
        inside, between = self.costs.link_seconds(PROBE_BYTES)
        return 1.0 if inside is None or between is None else max(1.0, between / inside)


def _slots(device_of: np.ndarray, devices: int) -> Slots:
    order = np.argsort(device_of, kind="stable").tolist()
    ends = np.cumsum(np.bincount(device_of, minlength=devices)).tolist()
    return tuple(tuple(order[first:end]) for first, end in zip([0, *ends[:-1]], ends, strict=True))
