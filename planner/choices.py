"""The experts that the tokens of a step chose, counted where a strategy needs them: by device, and by placement.

A choice of -1 is of an identity expert: no device serves it (-1 again), and it counts nowhere.
"""

# B layers that are costed together, T tokens, K top-k, G devices, E experts

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import NamedTuple, TypeVar

import numpy as np

from ..spec.batch_shares import BatchShares
from ..spec.layout import even
from ..spec.levels import host_numbers, relays
from ..spec.plan import LayerPlan
from ..spec.routing import COPY_PHASES, COPY_STEP
from .copies import Copies
from .layout import Layout
from .spread import Spread
from .traffic import Traffic

REMEMBERED = 256  # devices up to which every dispatch is kept
PLANS = 2**12  # whose groups and numbers of experts are remembered
PIECE = 2**18  # choices that are looked at together: they stay in the cache
SERVED = 2**22  # of a table of tokens x places


class Rows(NamedTuple):
    """Rows of each expert, once for devices that are alike: counts [B, X, E], of [G] which of them a device has."""

    counts: np.ndarray
    of: np.ndarray

    @property
    def largest(self) -> np.ndarray:
        """[B, G] rows of each device's largest expert."""
        return self.counts.max(2)[:, self.of]

    @property
    def devices(self) -> np.ndarray:
        """[B, G, E] rows of each device."""
        return self.counts[:, self.of]


class Dispatch(NamedTuple):
    """What ``ep`` does with the tokens of B layers.

    rows, back: rows between devices, one per token and distinct destination, and the same on their way back.
    kept: [B, G] rows that stay; experts: rows that each expert computes.
    """

    rows: Traffic | Spread
    back: Traffic | Spread
    kept: np.ndarray
    experts: Rows

    @property
    def computed(self) -> np.ndarray:
        """[B, G] rows that each device computes."""
        return self.rows.received() + self.kept

    @property
    def sent(self) -> np.ndarray:
        """[B, G] rows that each device's tokens become."""
        return self.rows.sent() + self.kept


class Forward(NamedTuple):
    """What ``hierarchical`` does with the tokens of B layers.

    across: rows from devices to relays (``spec.levels``), one per token and host; inside: rows from relays to devices,
    one per token and device. across_kept, inside_kept: [B, G] rows that stay in either. experts: as in ``Dispatch``.
    """

    across: Traffic
    across_kept: np.ndarray
    inside: Traffic
    inside_kept: np.ndarray
    experts: Rows

    @property
    def sent(self) -> np.ndarray:
        """[B, G] rows that each device's tokens become."""
        return self.across.sent() + self.across_kept

    @property
    def arrived(self) -> np.ndarray:
        """[B, G] rows that each device takes as a relay."""
        return self.across.received() + self.across_kept

    @property
    def passed(self) -> np.ndarray:
        """[B, G] rows that these become."""
        return self.inside.sent() + self.inside_kept

    @property
    def computed(self) -> np.ndarray:
        """[B, G] rows that each device computes."""
        return self.inside.received() + self.inside_kept


Flows = tuple[tuple[np.ndarray, ...], np.ndarray]
"""Flows (layer, source, target, rows) of some layers, and the rows that stay [layers, G]."""


@dataclass(frozen=True)
class Choices:
    """ids: [B, T, K] expert of every choice; hosts: [G]; numbers: [T] of the tokens, by default 0..T-1."""

    ids: np.ndarray
    layout: Layout
    hosts: np.ndarray
    experts: int
    numbers: np.ndarray | None = None
    loads: np.ndarray | None = None  # [B, E] of the whole layer, where this is a chunk of it
    _known: "Known[Dispatch]" = field(default_factory=dict)
    _forwarded: "Known[Forward]" = field(default_factory=dict)
    _chunks: dict[int, list["Choices"]] = field(default_factory=dict)

    def chunks(self, count: int) -> list["Choices"]:
        """Those of each chunk of every device's tokens."""
        if count not in self._chunks:
            sizes = np.array([even(tokens, count) for tokens in self.layout.tokens])  # [G, chunks]
            chunk = np.repeat(np.tile(np.arange(count), len(sizes)), sizes.ravel())  # [T]
            self._chunks[count] = [
                Choices(self.ids[:, number], layout, self.hosts, self.experts, number, self.total)
                for c, layout in enumerate(self.layout.chunks(count))
                for number in (np.flatnonzero(chunk == c),)
            ]
        return self._chunks[count]

    @cached_property
    def own(self) -> Rows:
        """Tokens of each device that chose each expert."""
        devices = self.layout.devices
        key = of_expert(self.layout.source[:, None], self.ids, self.experts)
        return Rows(counted(key, devices * self.experts).reshape(-1, devices, self.experts), np.arange(devices))

    @cached_property
    def total(self) -> np.ndarray:
        """[B, E] tokens that chose each expert."""
        return counted(self.ids, self.experts)

    def dispatch(self, plans: Sequence[LayerPlan]) -> Dispatch:
        """One plan for each of the B layers; remembered, as long as few devices make it small."""
        return remembered(self._known, self.layout.devices, plans, self._dispatch)

    def forward(self, plans: Sequence[LayerPlan]) -> Forward:
        """The same in two levels."""
        return remembered(self._forwarded, self.layout.devices, plans, self._forward)

    def _dispatch(self, plans: Sequence[LayerPlan]) -> Dispatch:
        found, counts = [], []
        for first, target, rows in self._pieces(plans):
            found.append(self._rows(target, first))
            counts.append(rows)
        traffic, kept = self._traffic(found)
        return Dispatch(traffic, traffic.back(), kept, self._expert_rows(counts))

    def _forward(self, plans: Sequence[LayerPlan]) -> Forward:
        via = relays(self.hosts.tolist())[:, host_numbers(self.hosts.tolist())]  # [source, target] the relay between
        across, inside, counts = [], [], []
        for first, target, rows in self._pieces(plans):
            relay = np.where(target < 0, -1, via[self.layout.source[:, None], target])
            across.append(self._rows(relay, first))
            inside.append(self._rows(target, first, via))
            counts.append(rows)
        return Forward(*self._traffic(across), *self._traffic(inside), self._expert_rows(counts))

    def _pieces(self, plans: Sequence[LayerPlan]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
        """Some layers after others: the number of the first, [b, T, K] device of each choice, and [b, G * E] rows that
        each expert computes."""
        step = max(1, PIECE // max(self.ids[0].size, 1))
        for first in range(0, len(plans), step):
            ids = self.ids[first : first + step]
            loads = self.total if self.loads is None else self.loads
            target = self.targets(ids, plans[first : first + step], loads[first : first + step])
            yield first, target, counted(of_expert(target, ids, self.experts), self.layout.devices * self.experts)

    def _traffic(self, found: Sequence[Flows]) -> tuple[Traffic, np.ndarray]:
        """That of all layers, and [B, G] rows that stay."""
        batch, source, target, number = (np.concatenate(part) for part in zip(*(f for f, _ in found), strict=True))
        kept = np.concatenate([stay for _, stay in found])
        return Traffic(len(kept), self.layout.devices, batch, source, target, number), kept

    def _expert_rows(self, counts: Sequence[np.ndarray]) -> Rows:
        devices = self.layout.devices
        return Rows(np.concatenate(counts).reshape(-1, devices, self.experts), np.arange(devices))

    def _rows(self, target: np.ndarray, first: int, via: np.ndarray | None = None) -> Flows:
        """One row for each token and device in ``target`` [b, T, K]; see ``flows``."""
        return flows(self.layout.source, target, self.layout.devices, first, via)

    def targets(self, ids: np.ndarray, plans: Sequence[LayerPlan], loads: np.ndarray | None = None) -> np.ndarray:
        """[b, T, K] device that serves each choice of b of the layers; ids: [b, T, K]; loads: [b, E] of their batches,
        where shares are decided by them."""
        served = self._targets(ids, plans, loads)
        return np.where(ids < 0, -1, served) if self._identity else served

    @cached_property
    def _identity(self) -> bool:
        """Whether any choice is of an identity expert."""
        return bool((self.ids < 0).any())

    def _targets(self, ids: np.ndarray, plans: Sequence[LayerPlan], loads: np.ndarray | None) -> np.ndarray:
        """The same, with any device for the choices of identity experts."""
        groups = {period(plan, self.experts) for plan in plans}
        size = groups.pop()
        if not groups and size and ids.shape[1] * size <= SERVED:
            # The same group of devices again and again, with one copy in each: where a token goes for an expert
            # depends on the expert's place in its group alone.
            place = np.stack([owner_of(plan.slots[:size], self.experts) for plan in plans])
            where = place[np.arange(len(plans))[:, None, None], ids]
            return where if size == self.layout.devices else self._served(size)[np.arange(ids.shape[1])[:, None], where]
        found = np.empty(ids.shape, np.int64)
        for b, plan in enumerate(plans):
            shares = plan.shares if plan.speeds is None or loads is None else by_batch(plan, loads[b], self.experts)
            copies = Copies.of(plan.slots, shares, self.experts, self.hosts)
            found[b] = copies.target(self.layout.source[:, None], ids[b], self._phase[:, None])
        return found

    @cached_property
    def _tokens(self) -> np.ndarray:
        return np.arange(self.ids.shape[1]) if self.numbers is None else self.numbers

    @property
    def _phase(self) -> np.ndarray:
        return (self._tokens * COPY_STEP) % COPY_PHASES

    def _served(self, size: int) -> np.ndarray:
        """[T, size] device that serves each token for what lies at each place of every group of ``size`` devices."""
        slots = tuple((place,) for place in range(size)) * (self.layout.devices // size)
        copies = Copies.of(slots, None, size, self.hosts)
        return copies.target(self.layout.source[:, None], np.arange(size), self._phase[:, None])


Counted = TypeVar("Counted", Dispatch, Forward)
Known = dict[tuple[int, ...], tuple[Sequence[LayerPlan], Counted]]


def remembered(
    known: Known[Counted], devices: int, plans: Sequence[LayerPlan], make: Callable[[Sequence[LayerPlan]], Counted]
) -> Counted:
    """What these very plans do, made once; of more than ``REMEMBERED`` devices only the last is kept."""
    key = tuple(map(id, plans))
    if key not in known:
        if devices > REMEMBERED:
            known.clear()
        known[key] = plans, make(plans)  # the plans are kept, so that their ids are theirs
    return known[key][1]


def flows(source: np.ndarray, target: np.ndarray, devices: int, first: int = 0, via: np.ndarray | None = None) -> Flows:
    """Rows between devices, one per token and distinct target, of layers the first of which is ``first``.

    source: [T]; target: [B, T, K], -1 for none. via: [source, target] the device that such a row comes from; by default
    the token's own.
    """
    count = len(target)
    target, new = distinct(target)
    new &= target >= 0
    start = source[:, None] if via is None else via[source[:, None], target]
    key = ((np.arange(count)[:, None, None] * devices + start) * devices + target)[new]
    pairs = count * devices * devices
    if pairs <= 4 * key.size:
        every = np.bincount(key, minlength=pairs)
        key = np.flatnonzero(every)
        number = every[key]
    else:
        key, number = np.unique(key, return_counts=True)
    batch, pair = np.divmod(key, devices * devices)
    start, to = np.divmod(pair, devices)
    home = start == to
    stay = np.zeros((count, devices))
    stay[batch[home], start[home]] = number[home]
    away = ~home
    return (batch[away] + first, start[away], to[away], number[away].astype(float)), stay


def distinct(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The values with equal ones of the last axis side by side, and which of them are the first of their kind."""
    if values.shape[-1] > 2:
        values = np.sort(values, axis=-1)
    new = np.ones(values.shape, bool)
    new[..., 1:] = values[..., 1:] != values[..., :-1]
    return values, new


@lru_cache(maxsize=PLANS)
def period(plan: LayerPlan, experts: int) -> int:
    """Size of the groups of consecutive devices that all hold the same, each expert once; 0 where there are none."""
    slots, size, held = plan.slots, 0, 0
    while size < len(slots) and held < experts:
        held += len(slots[size])
        size += 1
    # Devices that hold nothing may end a group.
    while size < len(slots) and (len(slots) % size or slots[:size] * (len(slots) // size) != slots):
        held += len(slots[size])
        size += 1
    return size if plan.shares is None and plan.speeds is None and held == experts else 0


@lru_cache(maxsize=PLANS)
def held(plan: LayerPlan) -> np.ndarray:
    """[devices] experts that each device has in memory; read only."""
    stored = plan.resting() if plan.strategy == "gathered" else plan.slots if plan.resident is None else plan.resident
    count = np.fromiter(map(len, stored), np.int64)
    count.setflags(write=False)
    return count


def by_batch(plan: LayerPlan, load: np.ndarray, experts: int) -> list[list[float]]:
    """Shares in the form of the slots, as they are decided for a batch; load: [E] its tokens for each expert."""
    assert plan.speeds is not None
    decided = BatchShares(plan.slots, plan.speeds, experts)
    share = np.ones((experts, len(plan.slots)))
    weights = decided.weights(load.astype(float))
    share[decided.copied] = weights / weights.sum(1, keepdims=True)
    return [share[list(own), g].tolist() for g, own in enumerate(plan.slots)]


def owner_of(slots: Sequence[Sequence[int]], experts: int) -> np.ndarray:
    """[E] device of each expert's only copy."""
    held = [len(here) for here in slots]
    owner = np.empty(experts, np.int64)
    owner[np.fromiter((e for here in slots for e in here), int, experts)] = np.repeat(np.arange(len(held)), held)
    return owner


def of_expert(device: np.ndarray, ids: np.ndarray, experts: int) -> np.ndarray:
    """A number for each choice's device and expert, to be ``counted``; -1 for identity experts. Arrays broadcast."""
    key = device * experts + ids
    return np.where(ids < 0, -1, key) if (ids < 0).any() else key


def counted(key: np.ndarray, size: int) -> np.ndarray:
    """[B, size] how often each of 0..size-1 occurs in each row of ``key`` [B, ...]; -1 is left out."""
    count = len(key)
    flat = (key.reshape(count, -1) + np.arange(count)[:, None] * size).ravel()
    if (key < 0).any():
        flat = flat[key.ravel() >= 0]
    return np.bincount(flat, minlength=count * size).reshape(count, size)
