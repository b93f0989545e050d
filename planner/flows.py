"""Bytes between devices to seconds: a flow model over measured links and uplinks.

It is used for what the measured collectives cannot say: how much longer unequal traffic takes than equal traffic.
Each ordered pair is a flow. A flow takes at least: its link's measured seconds; all that its source sends (its target
receives) over the best rate of the source's (the target's) links; all that crosses its hosts' uplinks over their
measured rates. The largest of these is attained by rate allocation, one bottleneck at a time, so it is taken as the
flow's time.
"""

# n members, C link classes, F flows, B exchanges

import numpy as np

from ..spec.cluster import Cluster
from ..spec.levels import Groups
from .curves import Table
from .spread import Spread, beside, blocks, elsewhere
from .traffic import Traffic

FASTEST = 1e15  # bytes per second; makes every link's time strictly increase, so that it can be inverted
ROWS = 256  # sources whose links are looked at together: no n x n table is kept


class FlowModel:
    """The flows among ``group``; members are indexed by position in it.

    parts: of positions; where they are given, only members of one part exchange, in all parts at the same time.
    within, between: the class of the links inside hosts, and of those between them; where there are several, one that
    is as slow as any of them at every size.
    """

    def __init__(self, cluster: Cluster, group: tuple[int, ...], parts: Groups = ()) -> None:
        self.cluster, self.members, n = cluster, np.array(group), len(group)
        self.part = np.zeros(n, int)
        for number, part in enumerate(parts):
            self.part[list(part)] = number
        self.host = cluster.host_index[self.members]
        hosts = cluster.hosts
        self.uplink_out = np.array([h.uplink_out or np.inf for h in hosts])
        self.uplink_in = np.array([h.uplink_in or np.inf for h in hosts])
        classes = cluster.link_classes
        self._within: set[int] = set()
        self._between: set[int] = set()
        present = self._present(len(classes))
        used = np.flatnonzero(present[0].any(1))
        self.knots = np.unique(np.concatenate([classes[c].curve.axes[0].values for c in used] or [(1.0,)]))
        self.latency, rate = np.zeros(len(classes)), np.zeros(len(classes))
        self.times = np.zeros((len(classes), len(self.knots)))  # [C, knots]
        for c in used:
            curve, latency = classes[c].curve, classes[c].latency
            # More bytes never take less: noise only adds time, so a smaller message counts at most what a larger took.
            seconds = np.minimum.accumulate(Table(curve).read(bytes=self.knots)[0][::-1])[::-1]
            self.times[c] = seconds + self.knots / FASTEST
            largest = curve.axes[0].values[-1]
            whole = curve.at(bytes=largest).seconds
            rate[c] = largest / max(whole - latency, 1e-3 * whole, largest / FASTEST)
            self.latency[c] = latency
        self.worst_latency = float(self.latency.max(initial=0.0))
        self.out_rate, self.in_rate = (
            np.where(seen.any(0), np.where(seen, rate[:, None], 0.0).max(0, initial=0.0), np.inf)  # inf: has no peers
            for seen in present[:2]
        )
        self.components = self._components(present)
        self.equal = [component.max(0) for component in self.components]
        self.within, self.between = self._slowest(self._within), self._slowest(self._between)

    def _slowest(self, classes: set[int]) -> int | None:
        """The class, where there is one; of several a new one, as slow as the slowest at every size."""
        if len(classes) < 2:
            return min(classes, default=None)
        some = sorted(classes)
        self.times = np.vstack([self.times, self.times[some].max(0)])
        self.latency = np.append(self.latency, self.latency[some].max())
        return len(self.times) - 1

    @property
    def regular(self) -> bool:
        """Whether hosts have equally many consecutive members, all links between them are alike, and all inside."""
        hosts = len(np.unique(self.host))
        each = len(self.members) // hosts
        return self.even and len(self._between) == 1 and (len(self._within) == 1 or each == 1)

    @property
    def even(self) -> bool:
        """Whether several hosts have equally many consecutive members."""
        return len(np.unique(self.host)) > 1 and blocks(self.host)

    def _present(self, classes: int) -> list[np.ndarray]:
        """[C, n] whether a member is the source, the target of a link of each class; of such a link between hosts."""
        n = len(self.members)
        present = [np.zeros((classes, n), bool) for _ in range(4)]
        for first in range(0, n, ROWS):
            some = self.members[first : first + ROWS, None]
            kind = self.cluster.link_class_index(some, self.members[None, :])
            kind = np.where(self.part[first : first + ROWS, None] == self.part, kind, -1)
            source, target = np.nonzero(kind >= 0)
            kind = kind[source, target]
            source += first
            across = self.host[source] != self.host[target]
            for seen, end in zip(present[:2], (source, target), strict=True):
                seen[kind, end] = True
            for seen, end in zip(present[2:], (source, target), strict=True):
                seen[kind[across], end[across]] = True
            self._within |= set(np.unique(kind[~across]).tolist())
        apart = np.flatnonzero(present[2].any(1))
        self._between = set(apart.tolist())
        return present

    def _components(self, present: list[np.ndarray]) -> list[np.ndarray]:
        """For each part [distinct flows, knots] seconds that each rule demands of an equal exchange in all parts.

        Flows of one class differ in their members' rates and uplinks only, of which the slowest demand the most at
        every size: one row for each class and rule says all.
        """
        hosts, parts = len(self.uplink_out), int(self.part.max()) + 1
        each = np.bincount(self.part * hosts + self.host, minlength=parts * hosts).reshape(parts, hosts)
        size = each.sum(1)
        crossing = (each * (size[:, None] - each)).sum(0)
        peers = size[self.part] - 1
        loads = (  # seconds per byte of an equal exchange, by member
            peers / self.out_rate,
            peers / self.in_rate,
            (crossing / self.uplink_out)[self.host],
            (crossing / self.uplink_in)[self.host],
        )
        found = []
        for part in range(parts):
            rows = [self.times[(present[0] & (self.part == part)).any(1)]]
            for everyone, load in zip(present, loads, strict=True):
                seen = everyone & (self.part == part)
                classes = seen.any(1)
                worst = np.where(seen, load, 0.0).max(1, initial=0.0)[classes]
                rows.append(worst[:, None] * self.knots + self.latency[classes, None])
            found.append(np.concatenate(rows) if size[part] > 1 else np.zeros((1, len(self.knots))))
        return found

    def _link(self, kind: np.ndarray, size: np.ndarray) -> np.ndarray:
        """Seconds of messages over links of these classes."""
        if len(self.knots) == 1:
            return self.times[kind, 0] * np.maximum(1.0, size / self.knots[0])
        upper = np.clip(np.searchsorted(self.knots, size), 1, len(self.knots) - 1)
        low, high = self.knots[upper - 1], self.knots[upper]
        weight = np.maximum((size - low) / (high - low), 0.0)
        return self.times[kind, upper - 1] * (1 - weight) + self.times[kind, upper] * weight

    def _loads(self, traffic: Traffic | Spread) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """[B, n] seconds that all a member sends, receives needs, and what crosses its host's uplink, out and in."""
        sent, received = traffic.across(self.host)
        return (
            traffic.sent() / self.out_rate,
            traffic.received() / self.in_rate,
            self._uplinks(sent, self.uplink_out)[:, self.host],
            self._uplinks(received, self.uplink_in)[:, self.host],
        )

    def _listed(self, traffic: Traffic, loads: tuple[np.ndarray, ...]) -> np.ndarray:
        """[B, n] when the last of these flows of each member has ended."""
        at, source, target = traffic.batch, traffic.source, traffic.target
        kind = self.cluster.link_class_index(self.members[source], self.members[target])
        out, into, up_out, up_in = loads
        busiest = np.maximum(out[at, source], into[at, target])
        uplink = np.maximum(up_out[at, source], up_in[at, target])
        busiest = np.where(self.host[source] != self.host[target], np.maximum(busiest, uplink), busiest)
        seconds = np.maximum(self._link(kind, traffic.bytes), busiest + self.latency[kind])
        last = np.zeros(traffic.count * traffic.members)
        np.maximum.at(last, at * traffic.members + source, seconds)
        np.maximum.at(last, at * traffic.members + target, seconds)
        return last.reshape(traffic.count, traffic.members)

    def _products(self, spread: Spread, loads: tuple[np.ndarray, ...]) -> np.ndarray:
        """[B, n] when the last flow of each member has ended: its longest message, its own loads and the largest of
        those at the other ends."""
        out, into, up_out, up_in = loads
        source, target = (out, np.maximum(out, up_out)), (into, np.maximum(into, up_in))
        last = np.zeros((spread.count, spread.members))
        for far, kind in ((False, self.within), (True, self.between)):
            if kind is None:
                continue
            a, c, _, _ = spread.far if far else spread.near
            for mine, others, load, other_load in ((a, c, source[far], target[far]), (c, a, target[far], source[far])):
                busy = np.where(others > 0, other_load, 0.0)
                if far:
                    largest, busiest = elsewhere(others, spread.hosts), elsewhere(busy, spread.hosts)
                else:
                    largest = beside(others, spread.cell, spread.hosts)
                    busiest = beside(busy, spread.cell, spread.hosts)
                message = self._link(np.array(kind), mine * largest)
                seconds = np.maximum(message, np.maximum(load, busiest) + self.latency[kind])
                last = np.maximum(last, np.where((mine > 0) & (largest > 0), seconds, 0.0))
        return last

    def _uplinks(self, crossing: np.ndarray, rate: np.ndarray) -> np.ndarray:
        """[B, hosts] seconds that the uplinks need for what [B, n] members send (receive) across hosts."""
        place = np.arange(len(crossing))[:, None] * len(rate) + self.host
        return np.bincount(place.ravel(), crossing.ravel(), len(crossing) * len(rate)).reshape(-1, len(rate)) / rate

    def seconds(self, traffic: Traffic | Spread) -> np.ndarray:
        """[B, n] when the last flow that a member sends or receives has ended."""
        loads = self._loads(traffic)
        if isinstance(traffic, Traffic):
            return self._listed(traffic, loads)
        return self._products(traffic, loads)

    def equal_size(self, seconds: np.ndarray, part: int = 0) -> np.ndarray:
        """[B] bytes per pair whose equal exchange takes ``seconds`` [B] in a part; at least the smallest measured
        message."""
        components, equal = self.components[part], self.equal[part]
        if len(self.knots) == 1:
            return self.knots[0] * np.maximum(seconds / equal[0], 1.0)
        k = np.clip(np.searchsorted(equal, seconds, side="right") - 1, 0, len(self.knots) - 2)
        start = components[:, k]
        slope = (components[:, k + 1] - start) / (self.knots[k + 1] - self.knots[k])
        rising = slope > 0
        reach = np.where(rising, (seconds - start) / np.where(rising, slope, 1.0), np.inf).min(0)
        return np.where(seconds <= equal[0], self.knots[0], self.knots[k] + reach)
