"""Which copy of an expert serves a token: the rule of ``spec.routing.copy_table``, without its table."""

# G devices, H hosts, E experts

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..spec.routing import COPY_PHASES


@dataclass(frozen=True)
class Copies:
    """The copies of all experts of one layer.

    holder: devices that hold copies, by expert and device; near: the same by expert, host and device.
    first: [E, H + 1] where those of an expert that lie on host h or a later one begin in it.
    held: [G, E]. bounds: with shares, [E, G] the phases, of 1, up to which devices 0..g serve.
    """

    holder: np.ndarray
    near: np.ndarray
    first: np.ndarray
    held: np.ndarray
    hosts: np.ndarray
    bounds: np.ndarray | None

    @classmethod
    def of(
        cls,
        slots: Sequence[Sequence[int]],
        shares: Sequence[Sequence[float]] | None,
        experts: int,
        hosts: np.ndarray,
    ) -> "Copies":
        sizes = [len(here) for here in slots]
        device = np.repeat(np.arange(len(sizes)), sizes)
        expert = np.fromiter((e for here in slots for e in here), int, len(device))
        held = np.zeros((len(sizes), experts), bool)
        held[device, expert] = True
        order = np.lexsort((device, hosts[device], expert))
        count = int(hosts.max()) + 1
        first = np.searchsorted(
            (expert * (count + 1) + hosts[device])[order],
            np.arange(experts)[:, None] * (count + 1) + np.arange(count + 1),
        )
        bounds = None
        if shares is not None:
            share = np.fromiter((s for here in shares for s in here), float, len(device))
            weight = np.zeros((experts, len(sizes)))
            weight[expert, device] = share
            bounds = np.cumsum(weight / weight.sum(1, keepdims=True), axis=1)
        return cls(device[np.lexsort((device, expert))], device[order], first, held, hosts, bounds)

    def target(self, source: np.ndarray, expert: np.ndarray, phase: np.ndarray) -> np.ndarray:
        """Device that serves ``expert`` for a token on ``source`` at ``phase`` of COPY_PHASES; arrays broadcast."""
        source, expert, phase = np.broadcast_arrays(source, expert, phase)
        if self.bounds is not None:
            table = ((np.arange(COPY_PHASES) + 0.5) / COPY_PHASES > self.bounds[:, :-1, None]).sum(1)
            return table[expert, phase]
        host = self.hosts[source]
        start, count = self.first[expert, host], self.first[expert, host + 1] - self.first[expert, host]
        away = count == 0
        count = np.where(away, self.first[expert, -1] - self.first[expert, 0], count)
        # The copy whose part of the phases holds this one: the largest k with (phase + 1/2) / PHASES > k / count.
        pick = -(-(2 * phase + 1) * count // (2 * COPY_PHASES)) - 1
        everywhere = np.where(away, self.first[expert, 0] + pick, 0)
        served = np.where(away, self.holder[everywhere], self.near[np.where(away, 0, start + pick)])
        return np.where(self.held[source, expert], source, served)
