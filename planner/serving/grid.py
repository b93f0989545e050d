"""Interpolation of measured times over one or more sizes, in log space."""

from collections.abc import Sequence

import numpy as np


class Grid:
    """Measured seconds at points of one or more sizes.

    The points need not be a full grid: below each value of the first size the others may differ. Between two measured
    values of a size the logarithm of the time is linear in the logarithm of the size. Below the smallest value the time
    is that of the smallest (a launch takes what it takes); above the largest it goes on with the slope of the last two
    values, falling never. ``outside`` tells whether the last
    answer was one of these.

    Several times of one point (kernels that the engine chooses among) count as the shortest.
    """

    def __init__(self, sizes: Sequence[np.ndarray], seconds: np.ndarray) -> None:
        """``sizes``: one array [points] per size, the slowest varying first. ``seconds``: [points]."""
        self.outside = False
        self._first, inverse = np.unique(np.asarray(sizes[0], dtype=float), return_inverse=True)
        self._log = np.log(self._first)
        self._times: np.ndarray | None = None
        self._below: list[Grid] = []
        if len(sizes) == 1:
            shortest = np.full(len(self._first), np.inf)
            np.minimum.at(shortest, inverse, seconds)
            self._times = np.log(shortest)
            return
        for value in range(len(self._first)):
            chosen = inverse == value
            self._below.append(Grid([size[chosen] for size in sizes[1:]], seconds[chosen]))

    def __call__(self, *at: float) -> float:
        """Seconds at these sizes, one per size."""
        self.outside = False
        return float(np.exp(self._at(at)))

    def _at(self, at: tuple[float, ...]) -> float:
        size = at[0]
        low = int(np.searchsorted(self._first, size, side="right")) - 1
        last = len(self._first) - 1
        if low < 0 or (low == last and size > self._first[last]):
            self.outside = True
        if low < 0 or last == 0:
            return self._value(max(low, 0), at)
        if self._first[low] == size:
            return self._value(low, at)
        low = min(low, last - 1)
        below, above = self._value(low, at), self._value(low + 1, at)
        share = (np.log(size) - self._log[low]) / (self._log[low + 1] - self._log[low])
        if share > 1:  # no faster than at the last measured size
            return above + max(above - below, 0.0) * (share - 1)
        return below + (above - below) * share

    def _value(self, index: int, at: tuple[float, ...]) -> float:
        if self._times is not None:
            return float(self._times[index])
        below = self._below[index]
        below.outside = False
        result = below._at(at[1:])
        self.outside |= below.outside
        return result
