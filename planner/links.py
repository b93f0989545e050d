"""Bytes of a step over each ordered pair of devices; of hosts, where the pairs are too many to list."""

from collections.abc import Sequence

import numpy as np

from ..spec.plan import LinkTraffic
from .costs import Costs
from .stages import Stage

MOST_DEVICES = 256
"""Up to which every pair of devices is listed (65,280 entries)."""


class Links:
    """Adds up what stages move."""

    def __init__(self, costs: Costs) -> None:
        devices = costs.devices
        self.of = np.arange(devices) if devices <= MOST_DEVICES else costs.cluster.host_index
        self.bytes = np.zeros((int(self.of.max()) + 1,) * 2)

    def add(self, stages: Sequence[Stage]) -> None:
        """One layer's."""
        for stage in stages:
            for exchange in stage.exchanges:
                part = self.of[np.array(exchange.group)]
                found = exchange.traffic.between(part)
                self.bytes[: len(found), : len(found)] += found

    def traffic(self) -> tuple[LinkTraffic, ...]:
        return tuple(
            LinkTraffic(source=int(i), target=int(j), bytes=round(self.bytes[i, j]))
            for i, j in np.argwhere(self.bytes > 0)
        )
