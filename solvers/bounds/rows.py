"""Linear inequalities on who shares a place, priced for the semidefinite bound of ``bounds.semidefinite``.

For windows of two layers, Z = Y - 1 / P as there:

    (1) transitive:  Y[a, b] + Y[a, c] - Y[b, c] <= 1                     ``Triangles``
    (2) two places:  Y[a, b] + Y[a, c] + Y[b, c] >= 1 where P is 2        ``Triangles``
    (3) load:        sum_b load[b] Y[a, b] <= limit, of one layer's b     ``LoadRows``

(3) is the balance limit of a's device, multiplied by "a is there"; ``bounds.cap_rows`` has its like for a limit on the
mean over the layers. Every row has a price of at least 0; it rises with the row's violation (projected gradient ascent,
damped by how many rows share an entry) and enters the cost of the entries. Any prices give a bound.
"""

# B windows (boundaries), E experts of a layer with fillers, N rows

from typing import Protocol

import numpy as np

from ..jit import njit

STEP = 0.3  # of the gradient step at which rows that all share their entries would just not overshoot
TOLERANCE = 0.02  # violation from which a triangle is worth a row
MOST_NEW = 1000  # rows that one window may gain at a time


class Rows(Protocol):
    def separate(self, windows: np.ndarray) -> None:
        """Drop rows that cost nothing, take in those that Z [B, 2E, 2E] violates."""

    def ascend(self, windows: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        """Move the prices; (what they charge for every entry of Z [B, 2E, 2E], constant)."""


class Triangles:
    """(1) and (2), found as they are violated.

    at [N, 4]: window, a, b, c; sign [N]: 1 for (1), -1 for (2): sign * (Y[a, b] + Y[a, c] - 1) - Y[b, c] <= 0.
    """

    def __init__(self, windows: int, experts: int, places: int) -> None:
        self.shape, self.places = (windows, 2 * experts, 2 * experts), places
        self.at, self.sign, self.price = np.zeros((0, 4), np.int64), np.zeros(0), np.zeros(0)
        self.sharing = np.ones(self.shape)

    def separate(self, windows: np.ndarray) -> None:
        paid = self.price > 0
        at, sign, price = [self.at[paid]], [self.sign[paid]], [self.price[paid]]
        for kind in (1, -1) if self.places == 2 else (1,):
            for window, shared in enumerate(windows + 1 / self.places):
                rows = _violated(shared, kind)
                at.append(np.column_stack([np.full(len(rows), window), rows]))
                sign.append(np.full(len(rows), float(kind)))
                price.append(np.zeros(len(rows)))
        self.at, self.sign, self.price = np.concatenate(at), np.concatenate(sign), np.concatenate(price)
        # A row found again is there already: the first of equals, which has the price, stays.
        code = np.ravel_multi_index(tuple(self.at.T), (len(windows), *self.shape[1:], self.shape[1]))
        first = np.unique(2 * code + (self.sign > 0), return_index=True)[1]
        first.sort()
        self.at, self.sign, self.price = self.at[first], self.sign[first], self.price[first]
        self.sharing = _sharing(self.at, self.shape)

    def ascend(self, windows: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        tax = np.zeros(self.shape)
        shift = 1 / self.places
        _ascend(windows, shift, self.at, self.sign, self.price, self.sharing, 2 * STEP * penalty, tax)
        return tax, float(self.price @ (self.sign * (2 * shift - 1) - shift))


class LoadRows:
    """(3), for every expert of a window and both of its layers.

    load [L, E], scaled so that a place carries 1 in the mean of a layer; limit [L], in that unit.
    """

    def __init__(self, load: np.ndarray, limit: np.ndarray) -> None:
        self.load = np.stack([load[:-1], load[1:]], axis=1)  # [B, 2, E]
        self.excess = np.stack([limit[:-1], limit[1:]], axis=1) - 1.0  # [B, 2] over the mean
        windows, _, experts = self.load.shape
        self.price = np.zeros((windows, 2 * experts, 2))
        # An entry a, b is in the rows of a and of b, and in two windows inside a layer.
        own = self.load.reshape(windows, 2 * experts, 1) * self.load.sum(axis=2)[:, None, :]
        self.sharing = 2 * (own + (self.load**2).sum(axis=2)[:, None, :])

    def separate(self, windows: np.ndarray) -> None:
        """All rows are always there."""

    def ascend(self, windows: np.ndarray, penalty: float) -> tuple[np.ndarray, float]:
        count, size, _ = windows.shape
        carried = np.einsum("kisb,ksb->kis", windows.reshape(count, size, 2, size // 2), self.load)
        violation = carried - self.excess[:, None, :]
        step = 2 * STEP * penalty / np.where(self.sharing > 0, self.sharing, 1.0)
        self.price = np.maximum(self.price + step * violation, 0.0)
        half = 0.5 * np.einsum("kis,ksb->kisb", self.price, self.load).reshape(count, size, size)
        return half + half.transpose(0, 2, 1), -float(np.einsum("kis,ks->", self.price, self.excess))


def _violated(shared: np.ndarray, kind: int) -> np.ndarray:
    """[N, 3] the rows of one window that Y violates most, of each pair a, b the worst."""
    shared = shared.astype(np.float32)
    excess = _worst_excess(shared, kind)
    pairs = np.argwhere(excess > TOLERANCE)
    if len(pairs) > MOST_NEW:
        worst = np.argpartition(-excess[tuple(pairs.T)], MOST_NEW)[:MOST_NEW]
        worst.sort()
        pairs = pairs[worst]
    rows = np.column_stack([pairs, _thirds(shared, kind, np.ascontiguousarray(pairs))])
    rows[:, 1:].sort(axis=1)
    return rows


# With c one of a and b nothing is violated, since the diagonal is 1 and no entry exceeds it: the loops may visit it.
@njit(cache=True, nogil=True, fastmath={"nnan", "nsz"})
def _worst_excess(shared, kind):
    """[2E, 2E] for every pair a, b the largest violation over all c; of (2), b > a and c > b only."""
    count = len(shared)
    excess = np.zeros((count, count), shared.dtype)
    for a in range(count):
        for b in range(a + 1 if kind < 0 else 0, count):
            worst = np.float32(-4.0)
            if kind > 0:
                for c in range(count):
                    worst = max(worst, shared[a, c] - shared[b, c])
                excess[a, b] = worst + shared[a, b] - np.float32(1.0)
            else:
                for c in range(b + 1, count):
                    worst = max(worst, -shared[a, c] - shared[b, c])
                excess[a, b] = worst - shared[a, b] + np.float32(1.0)
        excess[a, a] = 0.0
    return excess


@njit(cache=True, nogil=True)
def _thirds(shared, kind, pairs):
    """[N] the c of the largest violation of each pair a, b; pairs: [N, 2]."""
    thirds = np.empty(len(pairs), np.int64)
    for row in range(len(pairs)):
        a, b = pairs[row]
        if kind > 0:
            thirds[row] = np.argmax(shared[a] - shared[b])
        else:
            thirds[row] = b + 1 + np.argmin(shared[a, b + 1 :] + shared[b, b + 1 :])
    return thirds


@njit(cache=True, nogil=True)
def _sharing(at, shape):
    """[B, 2E, 2E] how many rows an entry is in; an entry inside a layer is one with that of the next window."""
    sharing = np.zeros(shape)
    experts = shape[1] // 2
    for window, a, b, c in at:
        for first, second in ((a, b), (a, c), (b, c)):
            for i, j in ((first, second), (second, first)):
                sharing[window, i, j] += 1.0
                if i < experts and j < experts and window > 0:
                    sharing[window - 1, i + experts, j + experts] += 1.0
                if i >= experts and j >= experts and window + 1 < shape[0]:
                    sharing[window + 1, i - experts, j - experts] += 1.0
    return sharing


@njit(cache=True, nogil=True)
def _ascend(windows, shift, at, sign, price, sharing, step, tax):
    for row in range(len(at)):
        window, a, b, c = at[row]
        z, load = windows[window], sharing[window]
        violation = sign[row] * (z[a, b] + z[a, c] + 2 * shift - 1.0) - z[b, c] - shift
        price[row] = max(0.0, price[row] + step * violation / (load[a, b] + load[a, c] + load[b, c]))
        half = 0.5 * price[row]
        for i, j in ((a, b), (b, a), (a, c), (c, a)):
            tax[window, i, j] += sign[row] * half
        tax[window, b, c] -= half
        tax[window, c, b] -= half
