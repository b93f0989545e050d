"""A cap on the mean balance as rows of ``bounds.rows``, priced for the semidefinite bound.

In windows of two layers, Z = Y - 1 / P as in ``bounds.semidefinite``; the load of each of S samples is scaled so that
a place carries 1 in the mean of a layer. hottest[s, l] is the finish of layer l's hottest device over the ideal; a
place, one device or several, is never hotter than it.

    (1) place:   sum_b load[s, l, b] Y[a, b] <= fastest * hottest[s, l]    b of layer l, a of either layer of a window
    (2) least:   hottest[s, l] >= least[s, l]
    (3) cap:     sum_{s,l} hottest[s, l] <= S * L * cap

(1) is the load of a's place in layer l, multiplied by "a is there"; ``fastest`` is the fastest place's speed over the
mean. The rows (1) have prices of at least 0, and (3) has one, mu. Over hottest, (2), the Lagrangian has a least only
while fastest times the sum of all prices of one s and l is at most mu; it is then -mu times the slack of (3) at least.
Any such prices give a bound. They rise with the violation of (1) and are projected onto that rule; what the projection
takes away per price is how much hottest exceeds least, and mu rises while that is more than (3) allows in all.
"""

# B windows (boundaries), E experts of a layer with fillers, L layers, P places, S samples

import numpy as np

from ..jit import njit

STEP = 0.9  # of the gradient step at which rows that all share their entries would just not overshoot
FIRST_PRICE = 0.15  # of the cap, per expert and sample, for costs scaled to 1 per expert
FOLLOW = 0.1  # how fast the price of the cap follows: e-fold in 1 / FOLLOW steps far from it
NEWTON_STEPS = 30  # at most; it ends where the last price that stays above 0 is known
ROUNDING = 1e-12


class CapRows:
    """(1) for every expert of a window, layer of it and sample.

    load: [S, L, E], of mean 1 per place, or 0 where a layer has none; least: [S, L]; cap: on the mean of all;
    fastest: place, over the mean speed.
    """

    def __init__(self, load: np.ndarray, least: np.ndarray, cap: float, fastest: float) -> None:
        samples, layers, experts = load.shape
        places = load.sum(axis=2).max()
        by_layer = load.transpose(1, 0, 2)
        self.load = np.stack([by_layer[:-1], by_layer[1:]], axis=1)  # [B, 2, S, E]
        self.fastest = fastest
        mean = load.sum(axis=2) / max(float(places), ROUNDING)  # of a place: 1, but 0 in a layer without load
        over = (least * fastest - mean).T
        self.excess = np.stack([over[:-1], over[1:]], axis=1)  # [B, 2, S] over the mean
        self.slack = max(samples * layers * cap - float(least.sum()), 0.0)
        self.mu = FIRST_PRICE * experts / samples
        self.price = np.zeros((layers - 1, 2, 2 * experts, samples))
        # An entry a, b is in the rows of a and of b, of all samples, and in two windows inside a layer.
        every = self.load.sum(axis=2)  # [B, 2, E]
        others = np.einsum("wkse,wke->wks", self.load, every)
        own = places * every.reshape(layers - 1, 1, 2 * experts, 1)
        self.step = np.ascontiguousarray(2 * STEP / np.maximum(2 * (others[:, :, None, :] + own), ROUNDING))

    def separate(self, windows: np.ndarray) -> None:
        """All rows are always there."""

    def ascend(self, windows: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        count, size, _ = windows.shape
        sides = windows.reshape(count, size, 2, size // 2).transpose(0, 2, 1, 3)  # [B, 2, 2E, E]
        violation = sides @ self.load.transpose(0, 1, 3, 2) - self.excess[:, :, None, :]
        taken = _climb(self.price, violation, self.step, penalty, self.mu / self.fastest) / self.fastest
        constant = -self.slack * self._dearest() - float(np.einsum("wkas,wks->", self.price, self.excess))
        if self.slack > 0:
            self.mu *= np.exp(FOLLOW * np.clip(taken / self.slack - 1.0, -1.0, 1.0))
        half = 0.5 * (self.price @ self.load).transpose(0, 2, 1, 3).reshape(count, size, size)
        return half + half.transpose(0, 2, 1), constant

    def _dearest(self) -> float:
        """The least mu that these prices allow."""
        by_side = self.price.sum(axis=2)  # [B, 2, S]
        by_layer = np.zeros((len(by_side) + 1, by_side.shape[2]))
        by_layer[:-1] += by_side[:, 0]
        by_layer[1:] += by_side[:, 1]
        return self.fastest * float(by_layer.max())


@njit(cache=True, nogil=True)
def _climb(price, violation, step, penalty, most):
    """Move the prices up with the violation, then to the nearest that sum to ``most`` per layer and sample at most.

    price, violation, step: [B, 2, 2E, S]. Nearest in the metric of the steps: max(0, price - step * taken), with one
    ``taken`` for each layer and sample, by Newton's method: the sum of the prices is convex and falls with ``taken``,
    so that from 0 it never goes too far. Returns the sum of all ``taken`` over the penalty: how far hottest exceeds
    least in all, times ``fastest``.
    """
    windows, _, rows, samples = price.shape
    taken, total, slope = np.empty(samples), np.empty(samples), np.empty(samples)
    whole = 0.0
    for layer in range(windows + 1):
        # The rows of a layer's load are in the window before it and in that after it.
        sides = [(w, k) for w, k in ((layer - 1, 1), (layer, 0)) if 0 <= w < windows]
        for w, k in sides:
            for row in range(rows):
                for s in range(samples):
                    price[w, k, row, s] += penalty * step[w, k, row, s] * violation[w, k, row, s]
        taken[:] = 0.0
        for _ in range(NEWTON_STEPS):
            total[:] = 0.0
            slope[:] = 0.0
            for w, k in sides:
                for row in range(rows):
                    for s in range(samples):
                        left = price[w, k, row, s] - step[w, k, row, s] * taken[s]
                        if left > 0:
                            total[s] += left
                            slope[s] += step[w, k, row, s]
            if (total <= most * (1 + ROUNDING)).all():
                break
            for s in range(samples):
                taken[s] += max(total[s] - most, 0.0) / max(slope[s], ROUNDING)
        for w, k in sides:
            for row in range(rows):
                for s in range(samples):
                    price[w, k, row, s] = max(price[w, k, row, s] - step[w, k, row, s] * taken[s], 0.0)
        whole += taken.sum()
    return whole / penalty
