"""Bytes between devices to seconds: a flow model over measured links and uplinks.

It is used for what the measured collectives cannot say: how much longer unequal traffic takes than equal traffic.
Each ordered pair is a flow. A flow takes at least: its link's measured seconds; all that its source sends (its target
receives) over the best rate of the source's (the target's) links; all that crosses its hosts' uplinks over their
measured rates. The largest of these is attained by rate allocation, one bottleneck at a time, so it is taken as the
flow's time.
"""

import numpy as np

from ..spec.cluster import Cluster
from .curves import Table

FASTEST = 1e15  # bytes per second; makes every link's time strictly increase, so that it can be inverted


class FlowModel:
    """The flows among ``group``; matrices are indexed by position in the group, [source, target]."""

    def __init__(self, cluster: Cluster, group: tuple[int, ...]) -> None:
        n = len(group)
        self.off = ~np.eye(n, dtype=bool)
        members = np.array(group)
        of = cluster.link_class_index(members[:, None], members[None, :])
        used = {c: cluster.link_classes[c] for c in np.unique(of[self.off]).tolist()}
        self.knots = np.unique(np.concatenate([link.curve.axes[0].values for link in used.values()]))
        self.times = np.zeros((n, n, len(self.knots)))
        self.latency = np.zeros((n, n))
        rate = np.zeros((n, n))
        for c, link in used.items():
            pair = of == c
            # More bytes never take less: noise only adds time, so a smaller message counts at most what a larger took.
            seconds = np.minimum.accumulate(Table(link.curve).read(bytes=self.knots)[0][::-1])[::-1]
            self.times[pair] = seconds + self.knots / FASTEST
            self.latency[pair] = link.latency
            largest = link.curve.axes[0].values[-1]
            whole = link.curve.at(bytes=largest).seconds
            rate[pair] = largest / max(whole - link.latency, 1e-3 * whole, largest / FASTEST)
        self.out_rate, self.in_rate = rate.max(1), rate.max(0)
        self.host = cluster.host_index[members]
        self.uplink_out = np.array([h.uplink_out or np.inf for h in cluster.hosts])
        self.uplink_in = np.array([h.uplink_in or np.inf for h in cluster.hosts])
        self.crosses = self.host[:, None] != self.host[None, :]
        ones = self.off.astype(float)
        parts = np.stack([self._parts(s * ones) for s in self.knots], axis=-1)
        self.components = parts[np.broadcast_to(self.off, parts.shape[:3])]  # [flows x rules, knots]
        self.equal = self.components.max(0)

    def _parts(self, sizes: np.ndarray) -> np.ndarray:
        """Seconds that each rule demands of each flow: [rule, source, target]."""
        upper = np.clip(np.searchsorted(self.knots, sizes), 1, max(len(self.knots) - 1, 1))
        if len(self.knots) == 1:
            link = self.times[..., 0] * np.maximum(1.0, sizes / self.knots[0])
        else:
            low, high = self.knots[upper - 1], self.knots[upper]
            weight = np.maximum((sizes - low) / (high - low), 0.0)
            row, column = np.indices(sizes.shape)
            link = self.times[row, column, upper - 1] * (1 - weight) + self.times[row, column, upper] * weight
        out = (sizes.sum(1) / self.out_rate)[:, None] + self.latency
        into = (sizes.sum(0) / self.in_rate)[None, :] + self.latency
        outward, inward = self.crossing(sizes)
        hosts = len(self.uplink_out)
        up_out = np.bincount(self.host, outward, hosts) / self.uplink_out
        up_in = np.bincount(self.host, inward, hosts) / self.uplink_in
        up = np.maximum(up_out[self.host][:, None], up_in[self.host][None, :])
        return np.stack([link, out, into, np.where(self.crosses, up + self.latency, 0.0)])

    def crossing(self, sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Bytes that each device sends to, and receives from, other hosts."""
        across = np.where(self.crosses, sizes, 0.0)
        return across.sum(1), across.sum(0)

    def seconds(self, sizes: np.ndarray) -> np.ndarray:
        """Per device, when the last flow that it sends or receives has ended. sizes: [source, target] bytes."""
        flows = np.where(self.off & (sizes > 0), self._parts(np.where(self.off, sizes, 0.0)).max(0), 0.0)
        return np.maximum(flows.max(1), flows.max(0))

    def equal_size(self, seconds: float) -> float:
        """The bytes per pair whose equal exchange takes ``seconds``; at least the smallest measured message."""
        if seconds <= self.equal[0]:
            return float(self.knots[0])
        if len(self.knots) == 1:
            return float(self.knots[0] * seconds / self.equal[0])
        k = min(int(np.searchsorted(self.equal, seconds, side="right")) - 1, len(self.knots) - 2)
        slope = (self.components[:, k + 1] - self.components[:, k]) / (self.knots[k + 1] - self.knots[k])
        rising = slope > 0
        reach = (seconds - self.components[rising, k]) / slope[rising]
        return float(self.knots[k] + reach.min())
