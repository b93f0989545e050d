"""Slots: experts with several copies on devices, as arrays.

A device g has capacity[g] slots in every layer; slots are numbered device by device. A slot holds a copy of an expert
or nothing, and a copy takes a share of its expert's tokens:

    (1) every expert has a copy                        ``Slots._check_hosted``
    (2) no device holds two copies of an expert        ``Slots._check_hosted``
    (3) an expert's shares are >= 0 and sum to 1       ``Slots._check_shares``
"""

# L layers, E experts, G devices, R slots

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

EMPTY = -1
ROUNDING = 1e-6  # of an expert's shares, as documents round them


@dataclass(frozen=True, eq=False)
class Slots:
    """Which copies are where, and the shares that they take.

    expert_of: [L, R] int64, ``EMPTY`` for an empty slot; the slots of a device are adjacent.
    share_of: [L, R] float64 fraction of its expert's tokens that each copy takes; 0 for an empty slot.
    capacity: [G] int64 slots of each device; R = sum(capacity).

    Raises ``ValueError`` naming the layer and the rule that it breaks.
    """

    expert_of: np.ndarray
    share_of: np.ndarray
    capacity: np.ndarray

    def __post_init__(self) -> None:
        object.__setattr__(self, "expert_of", np.asarray(self.expert_of, np.int64))
        object.__setattr__(self, "share_of", np.asarray(self.share_of, float))
        object.__setattr__(self, "capacity", np.asarray(self.capacity, np.int64))
        slots = int(self.capacity.sum())
        if self.capacity.ndim != 1 or (self.capacity < 0).any():
            raise ValueError(f"capacity must hold a whole number of slots per device, got {self.capacity.tolist()}")
        if self.expert_of.ndim != 2 or self.expert_of.shape[1] != slots or self.expert_of.size == 0:
            raise ValueError(f"expert_of must be [layers, {slots} slots], got {list(self.expert_of.shape)}")
        if self.share_of.shape != self.expert_of.shape:
            raise ValueError(f"share_of must be {list(self.expert_of.shape)}, got {list(self.share_of.shape)}")
        self._check_hosted()
        self._check_shares()

    def _check_hosted(self) -> None:
        if self.expert_of.min() < EMPTY or self.expert_of.max() == EMPTY:
            raise ValueError("expert_of must hold expert numbers from 0, and -1 for empty slots")
        missing = np.argwhere(self.copies == 0)
        if len(missing):
            layer, expert = missing[0].tolist()
            raise ValueError(f"layer {layer}: expert {expert} has no copy; every expert below the highest needs one")
        place = np.where(self.expert_of == EMPTY, EMPTY, self.device_of_slot * self.num_experts + self.expert_of)
        place.sort(axis=1)
        twice = np.argwhere((place[:, 1:] == place[:, :-1]) & (place[:, 1:] != EMPTY))
        if len(twice):
            layer, slot = twice[0].tolist()
            device, expert = divmod(int(place[layer, slot]), self.num_experts)
            raise ValueError(f"layer {layer}: device {device} holds expert {expert} twice")

    def _check_shares(self) -> None:
        if not (np.isfinite(self.share_of).all() and self.share_of.min() >= 0):
            raise ValueError("share_of must hold finite fractions of at least 0")
        if (self.share_of[self.expert_of == EMPTY] != 0).any():
            raise ValueError("an empty slot has a share")
        total = _per_expert(self.expert_of, self.num_experts, self.share_of)
        wrong = np.argwhere(np.abs(total - 1) > ROUNDING)
        if len(wrong):
            layer, expert = wrong[0].tolist()
            raise ValueError(f"layer {layer}: shares of expert {expert} sum to {total[layer, expert]:g}, not 1")

    @property
    def num_experts(self) -> int:
        return int(self.expert_of.max()) + 1

    @property
    def device_of_slot(self) -> np.ndarray:
        """[R] the device of each slot."""
        return np.repeat(np.arange(len(self.capacity)), self.capacity)

    @property
    def copies(self) -> np.ndarray:
        """[L, E] number of copies."""
        return _per_expert(self.expert_of, self.num_experts)

    def finish(self, load: ArrayLike, speed: ArrayLike) -> np.ndarray:
        """[L, G] load over speed of each device; load: [L, E] tokens, speed: [G]."""
        loads, speeds = np.asarray(load, float), np.asarray(speed, float)
        layers, devices = len(self.expert_of), len(self.capacity)
        if loads.shape != (layers, self.num_experts) or speeds.shape != (devices,):
            expected = f"[{layers}, {self.num_experts}] and [{devices}]"
            raise ValueError(f"load and speed must be {expected}, got {list(loads.shape)} and {list(speeds.shape)}")
        tokens = np.where(self.expert_of == EMPTY, 0.0, np.take_along_axis(loads, self.expert_of, 1) * self.share_of)
        cell = np.arange(layers)[:, None] * devices + self.device_of_slot
        return np.bincount(cell.ravel(), tokens.ravel(), layers * devices).reshape(layers, devices) / speeds

    def hottest(self, load: ArrayLike, speed: ArrayLike) -> np.ndarray:
        """[L] load over speed of the hottest device."""
        return self.finish(load, speed).max(axis=1)

    def to_lists(self) -> list[tuple[list[list[int]], list[list[float]]]]:
        """Per layer: the experts on each device, ascending, and their shares in the same order."""
        ends = np.cumsum(self.capacity).tolist()
        cuts = list(zip([0, *ends], ends, strict=False))
        layers = []
        for experts, shares in zip(self.expert_of.tolist(), self.share_of.tolist(), strict=True):
            both = [
                sorted(pair for pair in zip(experts[a:b], shares[a:b], strict=True) if pair[0] != EMPTY)
                for a, b in cuts
            ]
            layers.append(([[e for e, _ in here] for here in both], [[s for _, s in here] for here in both]))
        return layers

    @classmethod
    def even(cls, expert_of: ArrayLike, capacity: ArrayLike) -> "Slots":
        """Even shares for copies that are placed already; expert_of: [L, R]."""
        placed = np.asarray(expert_of, np.int64)
        copies = _per_expert(placed, int(placed.max()) + 1)
        share = np.where(placed == EMPTY, 0.0, 1 / np.maximum(np.take_along_axis(copies, placed, 1), 1))
        return cls(placed, share, np.asarray(capacity))

    @classmethod
    def from_device_of(cls, device_of: ArrayLike, capacity: ArrayLike) -> "Slots":
        """Single copies; device_of: [L, E]."""
        placed, slots = np.asarray(device_of, np.int64), np.asarray(capacity, np.int64)
        first = np.concatenate([[0], np.cumsum(slots)])
        expert_of = np.full((len(placed), int(slots.sum())), EMPTY)
        for layer, devices in enumerate(placed):
            held = np.bincount(devices, minlength=len(slots))
            if len(held) > len(slots) or (held > slots).any():
                full = int(np.argmax(held[: len(slots)] > slots)) if len(held) == len(slots) else len(slots)
                raise ValueError(f"layer {layer}: device {full} has too few slots for its experts")
            experts = np.argsort(devices, kind="stable")
            rank = np.arange(len(devices)) - np.repeat(np.cumsum(held) - held, held)
            expert_of[layer, first[devices[experts]] + rank] = experts
        return cls.even(expert_of, slots)

    @classmethod
    def from_lists(
        cls,
        slots: Sequence[Sequence[Sequence[int]]],
        shares: Sequence[Sequence[Sequence[float]] | None] | None,
        capacity: ArrayLike,
    ) -> "Slots":
        """The inverse of ``to_lists``: experts (and shares; none: even) per layer and device."""
        counts = np.asarray(capacity, np.int64)
        first = np.concatenate([[0], np.cumsum(counts)])
        expert_of = np.full((len(slots), int(counts.sum())), EMPTY)
        share_of = np.zeros(expert_of.shape)
        for layer, devices in enumerate(slots):
            if len(devices) != len(counts) or any(len(e) > c for e, c in zip(devices, counts, strict=True)):
                raise ValueError(f"layer {layer}: {[len(e) for e in devices]} experts in {counts.tolist()} slots")
            for g, experts in enumerate(devices):
                expert_of[layer, first[g] : first[g] + len(experts)] = experts
            given = shares[layer] if shares is not None else None
            if given is None:
                share_of[layer] = cls.even(expert_of[layer : layer + 1], counts).share_of[0]
                continue
            for g, taken in enumerate(given):
                share_of[layer, first[g] : first[g] + len(taken)] = taken
        return cls(expert_of, share_of, counts)


def _per_expert(expert_of: np.ndarray, num_experts: int, weights: np.ndarray | None = None) -> np.ndarray:
    """[L, E] number of copies of each expert, or the sum of their weights [L, R]."""
    layers = len(expert_of)
    cell = np.where(expert_of == EMPTY, num_experts, expert_of) + np.arange(layers)[:, None] * (num_experts + 1)
    flat = np.bincount(cell.ravel(), None if weights is None else weights.ravel(), layers * (num_experts + 1))
    return flat.reshape(layers, num_experts + 1)[:, :-1]
