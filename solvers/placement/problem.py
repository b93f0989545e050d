"""The affinity placement problem that bounds are proven for: validated input, and the levels at which tokens pay.

A token pays ``device_weight`` when it changes devices and ``host_weight - device_weight`` more when it changes hosts.
So the cost is a sum over *levels*: a weight, and the places (sets of devices) that a token pays it to change.
"""

# L layers, E experts, G devices

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from numpy.typing import ArrayLike

from ..result import Infeasible

Place = tuple[int, ...]  # its devices


@dataclass(frozen=True)
class Level:
    """weight: what a token pays to change places; places: the devices of each."""

    weight: float
    places: tuple[Place, ...]


@dataclass(frozen=True)
class AffinityProblem:
    """transitions [L-1, E, E], together [L, E, E] (a < b only), capacity, hosts, speed [G], load [L, E], limit [L].

    Without a limit, ``limit`` is infinite. 0 <= device_weight <= host_weight.
    """

    transitions: np.ndarray
    together: np.ndarray
    capacity: np.ndarray
    hosts: np.ndarray
    device_weight: float
    host_weight: float
    load: np.ndarray
    speed: np.ndarray
    limit: np.ndarray

    @property
    def layers(self) -> int:
        return len(self.load)

    @property
    def experts(self) -> int:
        return self.load.shape[1]

    @property
    def devices(self) -> int:
        return len(self.capacity)

    @property
    def levels(self) -> list[Level]:
        """Those at which a token pays anything; two of the same places are one."""
        single: tuple[Place, ...] = tuple((g,) for g in range(self.devices))
        shared = self.on_hosts(range(self.devices))
        weights = {single: self.device_weight}
        weights[shared] = weights.get(shared, 0.0) + self.host_weight - self.device_weight
        return [Level(weight, places) for places, weight in weights.items() if weight > 0 and len(places) > 1]

    def on_hosts(self, devices: Sequence[int]) -> tuple[Place, ...]:
        """The devices, grouped by host."""
        ordered = sorted(devices, key=lambda g: (self.hosts[g], g))
        return tuple(tuple(group) for _, group in groupby(ordered, key=lambda g: self.hosts[g]))

    @classmethod
    def checked(
        cls,
        transitions: ArrayLike,
        capacity: ArrayLike,
        hosts: ArrayLike,
        device_weight: float,
        host_weight: float,
        *,
        together: ArrayLike | None = None,
        load: ArrayLike | None = None,
        speed: ArrayLike | None = None,
        limit: ArrayLike | None = None,
    ) -> "AffinityProblem":
        """Raises ``ValueError`` on malformed input and ``Infeasible`` when slots are missing."""
        counts = np.asarray(transitions, float)
        if counts.ndim != 3 or counts.shape[1] != counts.shape[2] or counts.shape[1] == 0 or not _tokens(counts):
            raise ValueError(f"transitions must be finite, non-negative [L - 1, E, E], got {list(counts.shape)}")
        layers, experts = len(counts) + 1, counts.shape[1]
        shared = np.zeros((layers, experts, experts)) if together is None else np.asarray(together, float)
        if shared.shape != (layers, experts, experts) or not _tokens(shared):
            raise ValueError(
                f"together must be finite, non-negative [{layers}, {experts}, {experts}], got {list(shared.shape)}"
            )
        slots, host = np.asarray(capacity), np.asarray(hosts)
        if slots.ndim != 1 or len(slots) == 0 or slots.dtype.kind not in "iu" or (slots < 0).any():
            raise ValueError(f"capacity must hold a whole number of slots for each device, got {capacity!r}")
        if host.shape != slots.shape or host.dtype.kind not in "iu" or (host < 0).any():
            raise ValueError(f"hosts must hold a host number for each of {len(slots)} devices, got {hosts!r}")
        if not 0 <= device_weight <= host_weight < np.inf:
            raise ValueError(
                f"weights must be 0 <= device_weight <= host_weight, got {device_weight} and {host_weight}"
            )
        loads = np.zeros((layers, experts)) if load is None else np.asarray(load, float)
        if loads.shape != (layers, experts) or not _tokens(loads):
            raise ValueError(f"load must be finite, non-negative [{layers}, {experts}], got {list(loads.shape)}")
        speeds = np.ones(len(slots)) if speed is None else np.asarray(speed, float)
        if speeds.shape != slots.shape or not np.isfinite(speeds).all() or (speeds <= 0).any():
            raise ValueError(f"speed must hold a positive number for each of {len(slots)} devices, got {speed!r}")
        limits = np.full(layers, np.inf) if limit is None else np.asarray(limit, float)
        if limits.shape != (layers,) or not (limits >= 0).all():
            raise ValueError(f"limit must hold a number of at least 0 for each of {layers} layers, got {limit!r}")
        total = int(slots.sum())
        if total < experts:
            raise Infeasible(
                f"{experts} experts need {experts - total} more slots: the devices hold {total}",
                unit="slots",
                missing=experts - total,
            )
        return cls(
            counts,
            shared,
            slots.astype(np.int64),
            host.astype(np.int64),
            float(device_weight),
            float(host_weight),
            loads,
            speeds,
            limits,
        )


def _tokens(counts: np.ndarray) -> bool:
    return bool(np.isfinite(counts).all() and (counts >= 0).all())
