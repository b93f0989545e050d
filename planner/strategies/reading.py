"""When an ``offload`` device reads its experts, waits for them and computes them, layer by layer, in the order that
``spec.offload`` states; and which of them its host had better compute.
"""

import heapq
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

MOST_CHOICES = 16  # numbers of rows that are tried for a device in a layer


class Cold(NamedTuple):
    """One layer's experts on one device: seconds of those in memory; of each that it reads and needs, in order; whether
    those that it reads ahead, in order, are needed; seconds of those that its host computes, and how many these are."""

    hot: float
    seconds: list[float]
    ahead: list[bool]
    host: float = 0.0
    hosted: int = 0


@dataclass
class Reading:
    """One device's reader: when it is free, and when each of its places is.

    read: seconds of one expert. begun: when it could begin to read ahead for the layer that comes. needed, listed,
    ahead, vain, host: experts so far, see ``spec.offload.Reads``.
    """

    read: float
    places: list[float]
    begun: float = 0.0
    free: float = 0.0
    needed: int = 0
    listed: int = 0
    ahead: int = 0
    vain: int = 0
    host: int = 0

    def layer(self, known: float, now: float, cold: Cold) -> tuple[float, float]:
        """Seconds in which the device waits for experts, and computes them; ``known``: when it knows what its tokens
        need; ``now``: when they are there, and their experts' turn has come."""
        self.needed += len(cold.seconds)
        self.listed += len(cold.ahead)
        self.ahead += sum(cold.ahead)
        self.host += cold.hosted
        there: list[float] = []
        for wanted in cold.ahead:
            if not self.places:
                break
            begin = max(self.free, self.begun, self.places[0])
            if begin >= known:  # from then on only what is needed is read
                break
            heapq.heappop(self.places)
            self.free = begin + self.read
            if wanted:
                there.append(self.free)
            else:
                self.vain += 1
                heapq.heappush(self.places, max(self.free, known))
        ready, waited = now + cold.hot + cold.host, 0.0
        for i, seconds in enumerate(cold.seconds):
            if i < len(there):
                come = there[i]
            else:
                self.free = come = max(self.free, known, heapq.heappop(self.places)) + self.read
            waited += max(come - ready, 0.0)
            ready = max(come, ready) + seconds
            heapq.heappush(self.places, ready)
        self.begun = known
        return waited, cold.hot + cold.host + sum(cold.seconds)


class Needed(NamedTuple):
    """What one layer's tokens need of one device's experts.

    hot: seconds of those in memory. rows, alone, hosted: of each that is not, what is to be read ahead first (``early``
    of them), then most rows first: its rows, seconds of computing it once it is read, and of having the host compute it
    (infinite where there is none). ahead: as in ``Cold``.
    """

    hot: float
    rows: np.ndarray
    alone: np.ndarray
    hosted: np.ndarray
    early: int
    ahead: list[bool]

    def cold(self, host_rows: int) -> Cold:
        """Where the host computes those with at most so many rows that are not to be read ahead."""
        there = (np.arange(len(self.rows)) >= self.early) & (self.rows <= host_rows)
        host = self.hosted[there]
        return Cold(self.hot, self.alone[~there].tolist(), self.ahead, float(host.sum()), len(host))

    def best(self, reading: Reading, known: float, now: float) -> int:
        """The number of rows with which the device is done first in this layer; of several the largest, which reads
        least. ``known``, ``now``: as ``Reading.layer`` takes them."""
        if not np.isfinite(self.hosted[self.early :]).any():
            return 0
        tried = [0, *np.unique(self.rows[self.early :])[:MOST_CHOICES].tolist()]

        def seconds(host_rows: int) -> float:
            copy = replace(reading, places=list(reading.places))
            return sum(copy.layer(known, now, self.cold(host_rows)))

        return min(tried, key=lambda host_rows: (seconds(host_rows), -host_rows))
