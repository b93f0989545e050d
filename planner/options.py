"""Options of each layer: where the experts of one layer may be, for every strategy.

Layers that share storage share one plan; they form a class. With storage for every layer each is a class of its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..solvers import balance
from ..solvers.slots import Slots
from ..spec.layout import even
from ..spec.model import Model, Moe
from ..spec.operators import cache_row_bytes, row_bytes
from ..spec.plan import LayerPlan, PlacementRecord, Strategy
from ..spec.routing import Routing
from ..spec.trace import Trace
from . import splits
from .budget import Budget
from .costs import Costs
from .offered import PLACED
from .place.fleet import Fleet
from .place.inside import ALL, ONE, placements_for, usual
from .place.inside_moves import placed_for_moves
from .place.layers import plan_layers
from .place.question import Placed, Question
from .place.weights import exchange_weights

SMALL = 64  # classes x experts
ROUNDING = 1e-9  # relative
ENOUGH_SLOTS = 0.9  # of the slots, in which a search finds as good placements as in all of them


class Origin(NamedTuple):
    """Who found a placement."""

    method: str
    placed: Placed

    def record(self, ordinals: Sequence[int], classes: Sequence[int]) -> PlacementRecord:
        """For the layers ``ordinals``, which are of ``classes``."""
        objective, bound = (float(np.mean(side[list(classes)])) for side in self.placed.proof())
        bound = min(bound, objective)
        return PlacementRecord(
            layers=tuple(ordinals),
            method=self.method,
            solver=self.placed.solver,
            minimised=self.placed.minimised,
            objective=objective,
            bound=bound,
            gap=(objective - bound) / objective if objective > bound * (1 + ROUNDING) else 0.0,
        )


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
    """What each class of layers may do. Of the layout only the memory for weights counts; all is remembered.

    ``available`` is [classes, devices] bytes for experts, everywhere.
    """

    costs: Costs
    model: Model
    routing: Routing
    classes: Classes
    even: bool
    seed: int
    budget: Budget  # of the whole search
    given: Sequence[LayerPlan] | None = None  # a user's own placement, one per mixture-of-experts layer
    trace: Trace | None = None  # that the routing was drawn from
    by_batch: bool = False  # whether shares of copies are decided for every batch
    _memo: dict[tuple, Any] = field(default_factory=dict)
    _coherent: dict[str, None] = field(default_factory=dict)  # methods that were offered
    _origins: dict[tuple[int, LayerPlan], Origin] = field(default_factory=dict)

    @property
    def small(self) -> bool:
        """Whether placements are so few that it takes no time to search for them."""
        return len(self.classes.members) * self.moe.num_experts <= SMALL

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
        """The even plan: experts by number, columns in equal parts; ``degree`` devices hold all placed experts."""
        devices, experts = self.costs.devices, self.moe.num_experts
        if strategy == "sharded":
            return self._split(even(self.moe.ffn_size, devices))
        parts = degree if strategy in PLACED else devices
        if ("plain", strategy, parts) not in self._memo:
            plan = _placed(balance.linear(experts, parts), strategy, parts, devices // parts)
            self._memo["plain", strategy, parts] = plan
        return self._memo["plain", strategy, parts]

    def ep(self, degree: int, available: np.ndarray, thorough: bool = True) -> dict[str, list[LayerPlan]]:
        """Per method one plan per class: the given placement alone, or what ``usual`` and a search find.

        degree: consecutive devices that together hold all experts; with fewer than all devices every group of them
        holds the same. Without ``thorough`` nothing is searched for.
        """
        if self.given is not None:
            given = [self.given[members[0]] for members in self.classes.members]
            return {"given": [self._by_batch(plan) for plan in given] if self.by_batch else given}
        return self.usual(degree, available) | (self._searched(degree, available) if thorough and not self.even else {})

    def placed(
        self, strategy: Strategy, degree: int, available: np.ndarray, thorough: bool = True
    ) -> dict[str, list[LayerPlan]]:
        """The same placements under any strategy of ``PLACED``."""
        found = self.ep(degree, available, thorough)
        if strategy == "ep":
            return found
        return {
            method: [self._under(strategy, c, plan) for c, plan in enumerate(plans)] for method, plans in found.items()
        }

    def has(self, strategy: Strategy, degree: int) -> bool:
        """Whether a strategy of ``PLACED`` is an option: two levels only where all experts are on several hosts."""
        hosts = self.costs.hosts
        groups = (hosts[first : first + degree] for first in range(0, len(hosts), degree))
        return strategy != "hierarchical" or any(len(set(group)) > 1 for group in groups)

    def _under(self, strategy: Strategy, c: int, plan: LayerPlan) -> LayerPlan:
        """An ``ep`` plan of class c under another strategy; of one plan always the same one."""
        key = "under", strategy, id(plan)
        if key not in self._memo:
            self._memo[key] = plan, plan.model_copy(update={"strategy": strategy})  # kept, so that its id is its own
        other = self._memo[key][1]
        if (c, plan) in self._origins:
            self._origins.setdefault((c, other), self._origins[c, plan])
        return other

    def usual(self, degree: int, available: np.ndarray) -> dict[str, list[LayerPlan]]:
        """Experts by number, greedy balance by load, and the same by measured speed.

        Where memory is too small for any balancing, only ``linear`` is there.
        """
        capacity = self._capacity(degree, available)
        if ("unlimited", degree) not in self._memo:
            question = self._question(degree, np.full(degree, self.moe.num_experts))
            self._memo["unlimited", degree] = (found := usual(question, measured=not self.even)), _held(found)
        found, held = self._memo["unlimited", degree]
        # Greedy balance that never meets a limit is the same under all limits that it keeps.
        key = "usual", degree, *(() if (held <= capacity).all() else capacity.tolist())
        if key not in self._memo:
            if len(key) > 2:
                found = usual(self._question(degree, capacity), measured=not self.even)
            self._memo[key] = self._plans(degree, found)
        return self._memo[key]

    def placement_records(self, chosen: Sequence[LayerPlan]) -> tuple[PlacementRecord, ...]:
        """Who placed a plan's experts, one record per method.

        chosen: one per mixture-of-experts layer.
        """
        found: dict[int, tuple[Origin, list[int], list[int]]] = {}
        for c, members in enumerate(self.classes.members):
            for ordinal in members:
                origin = self._origins.get((c, chosen[ordinal]))
                if origin is not None:
                    _, ordinals, classes = found.setdefault(id(origin.placed), (origin, [], []))
                    ordinals.append(ordinal)
                    classes.append(c)
        return tuple(origin.record(ordinals, classes) for origin, ordinals, classes in found.values())

    def _searched(self, degree: int, available: np.ndarray) -> dict[str, list[LayerPlan]]:
        """What ``place``'s solvers find; copies only where all devices together hold the experts once."""
        capacity = self._capacity(degree, available)
        known = self._found(degree, capacity)
        if known is not None:
            return self._memo[known]
        key = "searched", degree, *capacity.tolist()
        question = self._question(degree, capacity)
        # By expectation only single copies are predicted.
        copies = degree == self.costs.devices and self.routing.scale == 1
        found = placements_for(question, seed=self.seed, budget=self.budget, copies=copies)
        self._memo[key] = self._plans(degree, found)
        self._memo["known", degree].append((capacity, _held(found) if found else capacity, key))
        return self._memo[key]

    def _found(self, degree: int, capacity: np.ndarray) -> tuple | None:
        """What an earlier search is remembered by that is as good as one with this capacity."""
        known: list[tuple[np.ndarray, np.ndarray, tuple]] = self._memo.setdefault(("known", degree), [])
        for limit, held, key in known:
            # What met no limit, or hardly a lower one, is what this capacity would find too.
            if (limit == capacity).all() or (
                (held <= capacity) & ((held < limit) | (limit >= ENOUGH_SLOTS * capacity))
            ).all():
                return key
        return None

    def coherent(self, available: np.ndarray) -> dict[str, list[LayerPlan]]:
        """Per method one plan per class: those of ``ep``, and what is placed for few moves between layers."""
        devices = self.costs.devices
        known = self.small or self._found(devices, self._capacity(devices, available)) is not None
        found = self.ep(devices, available, thorough=known) | self._for_moves(available)
        self._coherent.update(dict.fromkeys(found))
        plans = {}
        for method, layers in found.items():
            plans[method] = [layer.model_copy(update={"strategy": "coherent"}) for layer in layers]
            for c, (layer, plan) in enumerate(zip(layers, plans[method], strict=True)):
                self._origins.setdefault((c, plan), self._origins[c, layer])
        return plans

    def also(self, ordinal: int, plan: LayerPlan, other: LayerPlan) -> None:
        """Another plan of a layer has the placement of this one."""
        c = int(self.classes.of_ordinal[ordinal])
        if (c, plan) in self._origins:
            self._origins.setdefault((c, other), self._origins[c, plan])

    def _for_moves(self, available: np.ndarray) -> dict[str, list[LayerPlan]]:
        """Nothing where there is no trace to tell what follows what, or layers share storage and so placements."""
        devices = self.costs.devices
        alone = len(self.classes.members) == len(self.model.moe_layers)
        if self.even or self.trace is None or not self.trace.tells_movement or not alone:
            return {}
        capacity = self._capacity(devices, available)
        key = "moves", *capacity.tolist()
        if key not in self._memo:
            block, tokens = self.model.moe_block(), len(self.routing.expert_ids)
            row = row_bytes(block, self.costs.element_bytes)
            question = replace(self._question(devices, capacity), weights=exchange_weights(self.costs, row * tokens))
            partial = 1 + block.hidden_size * self.costs.element_bytes / row  # there and back
            kept = cache_row_bytes(block, self.costs.element_bytes) / row if block.attention else 0.0
            found = placed_for_moves(question, self.trace, partial, kept, seed=self.seed, budget=self.budget)
            self._memo[key] = self._plans(devices, found)
        return self._memo[key]

    def placed_by(self, coherent: bool = False) -> str:
        """The placements that were offered, by name; for ``coherent``, or for all others."""
        named = {"weighted": "speed-weighted", ALL: "every single-copy"}
        searched = [plans for key, plans in self._memo.items() if key[0] in ("usual", "searched")]
        methods = self._coherent if coherent else {name: None for plans in searched for name in plans}
        names = [named.get(name, name.split(",")[0]) for name in methods if name == ALL or not name.startswith(ONE)]
        return ", ".join(dict.fromkeys(names))

    def sharded(self, available: np.ndarray) -> list[list[LayerPlan]]:
        """Per class: even, fastest, and, where the fastest exceeds ``available``, the fastest within it."""
        found = []
        for c, members in enumerate(self.classes.members):
            if ("sharded", c) not in self._memo:
                counts = self.counts[list(members)]
                self._memo["sharded", c] = splits.FfnSplits(self.costs, self.model, members, counts)
            columns = self._memo["sharded", c].within(available[c])
            columns = columns[:1] if self.even else columns
            found.append([self._split(split) for split in columns])
        return found

    def _split(self, columns: tuple[int, ...]) -> LayerPlan:
        if ("split", columns) not in self._memo:
            nothing = ((),) * self.costs.devices
            self._memo["split", columns] = LayerPlan(strategy="sharded", slots=nothing, split=columns)
        return self._memo["split", columns]

    def gathered(self, available: np.ndarray) -> list[list[LayerPlan]]:
        """Per class: experts at rest in equal numbers, and as many as fit where that is too many for a device."""
        experts, devices = self.moe.num_experts, self.costs.devices
        found, plain = [], self.plain("gathered", devices)
        at_rest = np.array([len(slots) for slots in plain.slots])
        for c, members in enumerate(self.classes.members):
            options = [plain]
            most = np.maximum(available[c], 0) // self.model.computed_expert_bytes(members[0], self.costs.dtype)
            if (at_rest > most).any() and most.sum() >= experts:
                held = np.minimum(at_rest, most).astype(int)
                while held.sum() < experts:
                    held[np.argmax(most - held)] += 1
                options.append(_placed(np.repeat(np.arange(devices), held), "gathered", devices))
            found.append(options)
        return found

    def _capacity(self, degree: int, available: np.ndarray) -> np.ndarray:
        """[degree] experts that one device can hold, of every layer; available: [classes, devices] bytes."""
        sizes = [self.model.computed_expert_bytes(members[0], self.costs.dtype) for members in self.classes.members]
        slots = np.min([np.maximum(row, 0) // size for row, size in zip(available, sizes, strict=True)], axis=0)
        return np.minimum(slots.reshape(-1, degree).min(0), self.moe.num_experts).astype(int)

    def _question(self, degree: int, capacity: np.ndarray) -> Question:
        """The placement problem of a group of ``degree`` devices."""
        costs, ids = self.costs, self.routing.expert_ids
        seconds, speed = self._expert_seconds
        number = np.unique(costs.hosts[:degree], return_inverse=True)[1]
        block = self.model.moe_block()
        row = row_bytes(block, costs.element_bytes) + block.hidden_size * costs.element_bytes
        load = self._by_class(seconds)
        return Question(
            ids=tuple(np.concatenate([ids[:, ordinal] for ordinal in members]) for members in self.classes.members),
            counts=self._by_class(self.counts),
            load=load,
            fleet=Fleet(
                speed.reshape(-1, degree).mean(0), capacity, number, tuple(map(str, range(int(number.max()) + 1)))
            ),
            weights=exchange_weights(costs, row * len(ids) * self.routing.scale),
            ideal=load.sum(1) / speed.sum(),
        )

    @cached_property
    def _expert_seconds(self) -> tuple[np.ndarray, np.ndarray]:
        return splits.expert_seconds(self.costs, self.model, self.counts)

    def _by_class(self, values: np.ndarray) -> np.ndarray:
        """[classes, experts] means over the layers of each class; values: [moe layers, experts]."""
        return np.stack([values[list(members)].mean(0) for members in self.classes.members])

    def _plans(self, degree: int, found: dict[str, Placed]) -> dict[str, list[LayerPlan]]:
        """The plans of every method, and whose they are."""
        plans = {}
        for method, placed in found.items():
            if method == "linear":
                plans[method] = [self.plain("ep", degree)] * len(self.classes.members)
            else:
                plans[method] = plan_layers(placed.slots, self.costs.devices // degree, near=placed.near)
                if self.by_batch:
                    plans[method] = [self._by_batch(plan) for plan in plans[method]]
            for c, plan in enumerate(plans[method]):
                self._origins.setdefault((c, plan), Origin(method, placed))
        return plans

    def _by_batch(self, plan: LayerPlan) -> LayerPlan:
        """The same copies, with shares for every batch."""
        if sum(map(len, plan.slots)) == self.moe.num_experts:
            return plan
        speeds = tuple(float(speed) for speed in self._expert_seconds[1])
        return plan.model_copy(update={"shares": None, "speeds": speeds})


def _held(found: dict[str, Placed]) -> np.ndarray:
    """[degree] most slots that any of them takes of a device in any class; experts by number have no limit."""
    return np.max(
        [placed.slots.capacity for name, placed in found.items() if name != "linear"] or [np.zeros(1, int)], axis=0
    )


def _placed(device_of: np.ndarray, strategy: Strategy, devices: int, groups: int = 1) -> LayerPlan:
    """Single copies on ``devices`` devices, and the same on the next ones, ``groups`` times; device_of: [experts]."""
    slots = Slots.from_device_of(device_of[None], np.bincount(device_of, minlength=devices))
    return plan_layers(slots, groups, strategy=strategy)[0]
