"""Time of a device's experts in one layer, for uneven loads, from measured rows of even ones.

Tables of expert kernels hold times t(e, n): n tokens in all, spread evenly over E experts on e devices. A device has
then p = n K / e pairs of token and expert, and E / e experts. Read as T(p, held) that serves any load:

    seconds(pairs, active, held) = T(active, held) + [T(pairs, held) - T(held, held)]+

The first term reads the weights of the experts that get a token, one each; the second computes what goes beyond one
token for each. Rows of other ``held`` are interpolated in the logarithm, rows beyond the largest p of a ``held`` follow
the ratios of the next larger one that has them, and beyond all rows time grows with the pairs.

Time depends on the size of an expert, hidden x inter, in both terms: a shape without rows is read from the nearest one,
what is above the launch time scaled by the sizes' ratio.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True, eq=False)
class KernelTable:
    """Even rows of one GPU, engine, format and shape.

    held: [C] experts on a device, rising. pairs, seconds: for each, [N] rising pairs and their times.
    ratio: of the wanted expert's size to that of the rows; 1: the very shape was measured.
    """

    held: np.ndarray
    pairs: tuple[np.ndarray, ...]
    seconds_of: tuple[np.ndarray, ...]
    ratio: float = 1.0
    origin: str = ""

    @classmethod
    def of(
        cls,
        devices: np.ndarray,
        tokens: np.ndarray,
        seconds: np.ndarray,
        experts: int,
        top_k: int,
        *,
        ratio: float = 1.0,
        origin: str = "",
    ) -> "KernelTable":
        """From rows [N]: devices e, tokens n, seconds; of several rows of one load the median counts."""
        held, columns, times = [], [], []
        for e in sorted(set(np.asarray(devices).tolist()), reverse=True):
            mine = devices == e
            at = np.unique(tokens[mine])
            if experts % e or len(at) < 2:
                continue
            held.append(experts // e)
            columns.append(at * top_k / e)
            times.append(np.array([np.median(seconds[mine & (tokens == n)]) for n in at]))
        if not held:
            raise ValueError("no even rows of experts that divide over the devices")
        return cls(np.array(held), tuple(columns), tuple(times), ratio, origin)

    @property
    def launch(self) -> float:
        """Seconds of the smallest load."""
        return float(min(t.min() for t in self.seconds_of))

    @cached_property
    def noise(self) -> float:
        """How far a row lies from the line through its neighbours, as a standard deviation of logarithms.

        By the median, so that where the curve bends, between reading weights and computing, does not count as noise.
        """
        off = []
        for p, t in zip(self.pairs, self.seconds_of, strict=True):
            x, y = np.log(p), np.log(t)
            between = y[:-2] + (y[2:] - y[:-2]) * (x[1:-1] - x[:-2]) / (x[2:] - x[:-2])
            # A point beside the mean of two: 1 + 1/4 + 1/4 of its variance.
            off.append(np.abs(y[1:-1] - between) / np.sqrt(1.5))
        found = np.concatenate(off)
        return float(1.4826 * np.median(found)) if len(found) else 0.0

    def covers(self, pairs: float) -> bool:
        """Whether rows reach so many pairs on a device."""
        return pairs <= max(p[-1] for p in self.pairs)

    def seconds(self, pairs: np.ndarray, active: np.ndarray, held: int) -> np.ndarray:
        """[...] seconds of devices with ``held`` experts, ``active`` of which get ``pairs`` pairs in all."""
        pairs, active = np.asarray(pairs, float), np.minimum(np.asarray(active, float), held)
        beyond = self._read(np.maximum(pairs, held), held) - self._read(np.array(float(held)), held)
        raw = self._read(active, held) + np.maximum(beyond, 0.0)
        return self.launch + self.ratio * (raw - self.launch)

    def _read(self, pairs: np.ndarray, held: int) -> np.ndarray:
        """[...] T(pairs, held)."""
        right = int(np.clip(np.searchsorted(self.held, held), 0, len(self.held) - 1))
        left = right if self.held[right] <= held or right == 0 else right - 1
        low = self._column(pairs, left)
        if left == right:
            return low
        weight = np.log(held / self.held[left]) / np.log(self.held[right] / self.held[left])
        return low ** (1 - weight) * self._column(pairs, right) ** weight

    def _column(self, pairs: np.ndarray, column: int) -> np.ndarray:
        """[...] of one ``held`` of the rows."""
        p, t = self.pairs[column], self.seconds_of[column]
        x = np.log(np.maximum(pairs, p[0]))
        found = np.exp(np.interp(x, np.log(p), np.log(t)))
        over = pairs > p[-1]
        if not over.any():
            return found
        larger = next((c for c in range(column + 1, len(self.held)) if self.pairs[c][-1] > p[-1]), None)
        if larger is None:
            return np.where(over, t[-1] * np.maximum(pairs, p[-1]) / p[-1], found)
        ratio = self._column(np.maximum(pairs, p[-1]), larger) / self._column(np.array(p[-1]), larger)
        return np.where(over, t[-1] * ratio, found)
