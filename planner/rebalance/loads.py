"""The latest traffic, in memory that does not grow: a plain window of batches, and a decaying mean."""

# B batches, L layers, E experts

from collections import deque

import numpy as np

PAIRS_PER_EXPERT = 4
"""Token-expert pairs of a batch, for each expert of a layer: records of fewer are put together."""


class Loads:
    """Counts [L, E] by the time that they were recorded.

    span: seconds of the window; least, most: batches that it holds whatever their age, and at most. Half of what the
    decaying mean holds is from the last ``span`` seconds.
    """

    def __init__(self, span: float, least: int, most: int, layers: int, experts: int) -> None:
        self.span, self.least = span, least
        self.batches: deque[tuple[float, np.ndarray]] = deque(maxlen=most)
        self.pending = np.zeros((layers, experts))
        self.decayed = np.zeros((layers, experts))
        self.last = 0.0

    def add(self, when: float, counts: np.ndarray) -> np.ndarray | None:
        """The batch [L, E] that these counts complete, or None while it is too small.

        when: seconds; a clock that was set back counts as standing still.
        """
        when = max(when, self.last)
        self.decayed *= 0.5 ** ((when - self.last) / self.span)
        self.decayed += counts
        self.last = when
        self.pending += counts
        if self.pending.sum(axis=1).max() < PAIRS_PER_EXPERT * counts.shape[1]:
            return None
        batch, self.pending = self.pending, np.zeros_like(self.pending)
        self.batches.append((when, batch))
        # The oldest stays until the one after it is as old as the window, so that a full window is seen to be full.
        while len(self.batches) > self.least and self.batches[1][0] <= when - self.span:
            self.batches.popleft()
        return batch

    def keep_last(self, count: int) -> None:
        """Forget all but so many batches."""
        while len(self.batches) > count:
            self.batches.popleft()

    @property
    def covered(self) -> float:
        """Seconds from the oldest batch to the last record."""
        return self.last - self.batches[0][0] if self.batches else 0.0

    def stacked(self) -> np.ndarray:
        """[B, L, E]"""
        return np.stack([counts for _, counts in self.batches])
