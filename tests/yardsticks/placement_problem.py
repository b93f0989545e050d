"""The affinity placement problem as exact programs and brute force need it: a placement's cost and rules, symmetry."""

# L layers, E experts, G devices

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import ArrayLike

from moeplan.solvers.placement import problem
from moeplan.solvers.placement.crossings import crossings, host_weights
from moeplan.solvers.placement.problem import Place

ROUNDING = 1e-9  # relative, of sums of loads


class AffinityProblem(problem.AffinityProblem):
    """With placements [L, E], which keep to slots and limit or do not, and what of it is interchangeable."""

    def pairs(self) -> list[tuple[int, int, float]]:
        """(i, j, tokens) of all pairs of experts with tokens; expert e of layer l is number l * E + e."""
        experts, found = self.experts, []
        for layer, e, other in np.argwhere(np.triu(self.together, 1) > 0).tolist():
            found.append((layer * experts + e, layer * experts + other, float(self.together[layer, e, other])))
        for layer, e, after in np.argwhere(self.transitions > 0).tolist():
            tokens = float(self.transitions[layer, e, after])
            found.append((layer * experts + e, (layer + 1) * experts + after, tokens))
        return found

    def movement(self, placed: np.ndarray) -> float:
        """The objective of a placement [L, E]."""
        weight = host_weights(self.hosts, self.device_weight, self.host_weight)
        inside = sum(
            float((np.triu(shared, 1) * weight[np.ix_(row, row)]).sum())
            for shared, row in zip(self.together, placed, strict=True)
        )
        return crossings(placed, self.transitions, weight) + inside

    def most_load(self, layer: int, devices: Sequence[int]) -> float:
        """Load that the devices together may have in a layer; a whole number where all loads are."""
        most_load = float(self.limit[layer] * self.speed[list(devices)].sum()) * (1 + ROUNDING)
        whole = np.isfinite(most_load) and (self.load[layer] == np.floor(self.load[layer])).all()
        return float(np.floor(most_load)) if whole else most_load

    def keeps(self, placed: np.ndarray) -> bool:
        """Whether a placement keeps to slots and limit."""
        for layer, row in enumerate(placed):
            held = np.bincount(row, minlength=self.devices)
            carried = np.bincount(row, self.load[layer], self.devices)
            most_load = [self.most_load(layer, [g]) for g in range(self.devices)]
            if (held > self.capacity).any() or (carried > np.array(most_load) * (1 + ROUNDING)).any():
                return False
        return True

    def interchangeable(self, devices: Sequence[int]) -> list[list[Place]]:
        """Groups of single devices of one host with equal slots and speed."""
        kinds: dict[tuple[int, int, float], list[Place]] = {}
        for g in devices:
            kinds.setdefault((int(self.hosts[g]), int(self.capacity[g]), float(self.speed[g])), []).append((g,))
        return list(kinds.values())

    def interchangeable_hosts(self) -> list[list[Place]]:
        """Groups of hosts with equal devices."""
        kinds: dict[tuple[tuple[int, float], ...], list[Place]] = {}
        for places in self.on_hosts(range(self.devices)):
            kind = tuple(sorted((int(self.capacity[g]), float(self.speed[g])) for g in places))
            kinds.setdefault(kind, []).append(places)
        return list(kinds.values())

    def only(self, layer: int) -> "AffinityProblem":
        """The problem of one layer by itself."""
        part = slice(layer, layer + 1)
        return replace(
            self,
            transitions=self.transitions[:0],
            together=self.together[part],
            load=self.load[part],
            limit=self.limit[part],
        )

    def by_host(self) -> "AffinityProblem":
        """The same problem with whole hosts for devices."""
        places = self.on_hosts(range(self.devices))
        return replace(
            self,
            capacity=np.array([self.capacity[list(place)].sum() for place in places]),
            hosts=np.arange(len(places)),
            device_weight=self.host_weight,
            speed=np.array([self.speed[list(place)].sum() for place in places]),
        )

    def checked_placement(self, incumbent: ArrayLike) -> np.ndarray:
        """A placement [L, E] that keeps to slots and limit, or ``ValueError``."""
        placed = np.asarray(incumbent)
        if placed.shape != self.load.shape or placed.dtype.kind not in "iu":
            raise ValueError(f"incumbent must be devices {list(self.load.shape)}, got {list(placed.shape)}")
        if (placed < 0).any() or (placed >= self.devices).any() or not self.keeps(placed):
            raise ValueError("incumbent breaks the slots or the limit, or names a device that does not exist")
        return placed.astype(np.int64)
