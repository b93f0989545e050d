"""Re-planning: from an old placement to a new one within a number of moves."""

# W windows, L layers, E experts, G devices, R slots, X hosts

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import TYPE_CHECKING

import numpy as np

from ...solvers.balance import over_ideal
from ...solvers.slots import EMPTY, Slots
from ...spec.placement import Placement, PlacementLayer
from ..budget import Budget
from .fleet import Fleet

if TYPE_CHECKING:
    from ...solvers.replication.moves import Option

ALL_LIMITS, LIMITS = 12, 10  # a layer with so few moves is searched for each number of them, else for so many numbers


def copies_to_load(old: Placement, layers: Sequence[PlacementLayer]) -> int:
    """Copies that a device must load because it does not hold that expert of that layer yet."""
    return sum(copies_by_layer(old, layers))


def copies_by_layer(old: Placement, layers: Sequence[PlacementLayer]) -> list[int]:
    """[L] the same of each layer."""
    return [
        sum(len(set(now) - set(before)) for before, now in zip(was.slots, layer.slots, strict=True))
        for was, layer in zip(old.layers, layers, strict=True)
    ]


def slots_of(old: Placement, capacity: np.ndarray) -> Slots:
    """The old placement in the slots of now."""
    return Slots.from_lists([layer.slots for layer in old.layers], [layer.shares for layer in old.layers], capacity)


def renamed(old: Slots, new: Slots, fleet: Fleet, *, each_layer: bool, hosts_apart: bool) -> Slots:
    """``new`` with alike devices renamed so that as many copies as possible are where ``old`` has them: no load.

    each_layer: layers by themselves, else one name for all of them, which keeps what moves between layers.
    hosts_apart: devices stay together with those of their host, alike hosts are renamed as a whole.
    """
    shared = _shared(old, new)
    layers = len(new.expert_of)
    expert_of, share_of = new.expert_of.copy(), new.share_of.copy()
    first = np.concatenate([[0], np.cumsum(new.capacity)])
    once = None if each_layer else _names(shared.sum(axis=0), fleet, hosts_apart)
    for layer in range(layers):
        name = _names(shared[layer], fleet, hosts_apart) if once is None else once
        for g, to in enumerate(name):
            here, there = slice(first[g], first[g + 1]), slice(first[to], first[to + 1])
            expert_of[layer, there], share_of[layer, there] = new.expert_of[layer, here], new.share_of[layer, here]
    return Slots(expert_of, share_of, new.capacity)


def _shared(old: Slots, new: Slots) -> np.ndarray:
    """[L, G, G] experts that a device of ``new`` has in common with each of ``old``."""
    held = []
    for slots in (new, old):
        at = np.zeros((len(slots.expert_of), len(slots.capacity), new.num_experts + 1), np.float32)
        layer = np.arange(len(at))[:, None]
        at[layer, slots.device_of_slot[None], slots.expert_of] = 1.0  # EMPTY is the last column
        held.append(at[:, :, :-1])
    return held[0] @ held[1].transpose(0, 2, 1)


def _names(shared: np.ndarray, fleet: Fleet, hosts_apart: bool) -> np.ndarray:
    """[G] what each new device is called; shared: [G, G]."""
    # Imported when it is needed: it takes as long as all else that a command begins with.
    from scipy.optimize import linear_sum_assignment

    kinds = [(float(s), int(c)) for s, c in zip(fleet.speed, fleet.capacity, strict=True)]
    number = {kind: i for i, kind in enumerate(dict.fromkeys(kinds))}
    kind = np.array([number[k] for k in kinds])

    def assigned(theirs: np.ndarray, mine: np.ndarray) -> tuple[np.ndarray, float]:
        """Old names for the new devices ``mine``, and how many copies stay; alike ones only."""
        kept = np.where(kind[mine][:, None] == kind[theirs][None, :], shared[np.ix_(mine, theirs)], -1e9)
        rows, columns = linear_sum_assignment(kept, maximize=True)
        return theirs[columns[np.argsort(rows)]], float(kept[rows, columns].sum())

    everyone = np.arange(len(kind))
    if not hosts_apart or len(fleet.names) == 1:
        return assigned(everyone, everyone)[0]
    members = [np.flatnonzero(fleet.hosts == h) for h in range(len(fleet.names))]
    alike = [sorted(kind[m].tolist()) for m in members]
    stay = np.full((len(members), len(members)), -1e12)
    for (j, mine), (i, theirs) in product(enumerate(members), enumerate(members)):
        if alike[i] == alike[j]:
            stay[j, i] = assigned(theirs, mine)[1]
    rows, columns = linear_sum_assignment(stay, maximize=True)
    name = np.empty(len(kind), np.int64)
    for new_host, old_host in zip(rows, columns, strict=True):
        name[members[new_host]] = assigned(members[old_host], members[new_host])[0]
    return name


@dataclass(frozen=True, eq=False)
class Replan:
    """Ways from ``old`` to ``new``, layer by layer, whose devices are already renamed to suit.

    load: [W, L, E]; apart: copies stay on their hosts; full: every slot holds a copy. budget: ends the search for ways
    between the two; what is then not known is left out.
    """

    old: Slots
    new: Slots
    load: np.ndarray
    fleet: Fleet
    apart: bool
    full: bool
    seed: int
    budget: Budget
    most: int | None = None

    def within(self, moves: int | None) -> Slots:
        """The coolest on the mean over layers and windows with at most so many loads; without a limit, of both."""
        # Imported when it is needed: its compiled loops take a second to load.
        from ...solvers.replication.moves import choose

        layers = self.ends if moves is None else self.options
        budget = sum(layer[-1].loads for layer in layers) if moves is None else moves
        return self.taking(layers, choose(layers, budget))

    def taking(self, layers: list[list["Option"]], picked: list[int]) -> Slots:
        """The placement of one option of each layer, by its number."""
        expert_of, share_of = self.new.expert_of.copy(), self.new.share_of.copy()
        for layer, (number, known) in enumerate(zip(picked, layers, strict=True)):
            at = known[number].at
            same = next((s for s in (self.new, self.old) if np.array_equal(s.expert_of[layer], at)), None)
            even = Slots.even(at[None], self.new.capacity) if same is None else None
            expert_of[layer] = at
            share_of[layer] = same.share_of[layer] if same is not None else even.share_of[0] if even else 0.0
        return Slots(expert_of, share_of, self.new.capacity)

    @cached_property
    def ends(self) -> list[list["Option"]]:
        """Per layer only the old placement, and the new one where it is cooler."""
        return [self._layer(layer, [], self.budget) for layer in range(len(self.new.expert_of))]

    @cached_property
    def options(self) -> list[list["Option"]]:
        """Per layer what can be had for how many loads."""
        found, count = [], len(self.new.expert_of)
        for layer in range(count):
            part = self.budget.part(1 / (count - layer))
            found.append(self._layer(layer, None, part))
            if part.late:
                self.budget.skip("the best use of moves in every layer")
        return found

    @cached_property
    def _relative(self) -> np.ndarray:
        """[W, L, E] over the ideal."""
        return over_ideal(self.load, self.fleet.speed)

    def _layer(self, layer: int, limits: list[int] | None, budget: Budget) -> list["Option"]:
        """Both ends, and between them the best within each limit; by default those of ``_limits``."""
        # Imported when it is needed: its compiled loops take a second to load.
        from ...solvers.replication.moves import Option, held_by, options

        speed, device, halt = self.fleet.speed, self.new.device_of_slot, np.zeros(1, np.bool_)
        load = np.ascontiguousarray(self._relative[:, layer])
        ends = []
        held = held_by(self.old.expert_of[layer], device, len(speed), self.new.num_experts)
        for slots in (self.old, self.new):
            at, share = slots.expert_of[layer], slots.share_of[layer]
            there = np.flatnonzero(at != EMPTY)
            tokens = load[:, at[there]] * share[there]
            hottest = [(np.bincount(device[there], t, len(speed)) / speed).max() for t in tokens]
            ends.append(Option(int((~held[device[there], at[there]]).sum()), float(np.mean(hottest)), at))
        first = np.concatenate([[0], np.cumsum(self.new.capacity)])
        zones = self.fleet.hosts if self.apart else np.zeros(len(speed), np.int64)
        tried = self._limits(ends[1].loads) if limits is None else limits

        def late() -> bool:
            return budget.late

        return options(ends[0], ends[1], load, speed, first, zones, self.full, tried, self.seed + layer, late, halt)

    def _limits(self, loads: int) -> list[int]:
        """Numbers of loads to search for: all where they are few, else some, up to what the new placement needs."""
        most = loads if self.most is None else min(loads, self.most)
        if most <= ALL_LIMITS:
            return list(range(1, most + 1))
        return sorted({*np.unique(np.geomspace(1, most, LIMITS).round().astype(int)).tolist(), most})
