"""Bytes of a step over each ordered pair of devices; of hosts, or of runs of hosts, where the pairs are too many."""

from collections.abc import Sequence

import numpy as np

from ..spec.plan import LinkTraffic
from .costs import Costs
from .stages import Stage

MOST_DEVICES = 256
"""Up to which every pair of devices is listed (65,280 entries)."""
MOST_HOSTS = 64
"""Up to which every pair of hosts is listed beyond it; more hosts are counted in so many runs of consecutive ones."""


class Links:
    """Adds up what stages move."""

    def __init__(self, costs: Costs) -> None:
        devices = costs.devices
        hosts = int(costs.cluster.host_index.max()) + 1
        by_host = costs.cluster.host_index * min(MOST_HOSTS, hosts) // hosts
        self.of = np.arange(devices) if devices <= MOST_DEVICES else by_host
        self.bytes = np.zeros((int(self.of.max()) + 1,) * 2)

    def add(self, stages: Sequence[Stage], layers: int) -> None:
        """Those of so many layers together, of which each exchanges what the stages say, or all the same."""
        for stage in stages:
            for exchange in stage.exchanges:
                part = self.of[np.array(exchange.group)]
                found = exchange.traffic.between(part) * (layers if exchange.traffic.count == 1 else 1)
                self.bytes[: len(found), : len(found)] += found

    def traffic(self) -> tuple[LinkTraffic, ...]:
        return tuple(
            LinkTraffic(source=int(i), target=int(j), bytes=round(self.bytes[i, j]))
            for i, j in np.argwhere(self.bytes > 0)
        )
