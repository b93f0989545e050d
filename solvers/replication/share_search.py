"""Changes of one layer's copies under optimal shares: the second compiled loop of ``replicate``."""

# E experts, G devices, R slots

import numpy as np

from ..jit import njit
from ..slots import EMPTY
from .shares import layer_shares

THRESHOLD = 2.0  # at the start, relative to what is left above the target


@njit(cache=True, nogil=True)
def improve_shares(
    at: np.ndarray,
    load: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    zone_of_device: np.ndarray,
    target: float,
    tries: int,
    seed: int,
    halt: np.ndarray,
) -> np.ndarray:
    """[R] experts: changes that lower the hottest device under optimal shares; at most ``tries``.

    Every change involves a device that the proof of the present optimum names: no other can lower it. One that makes
    it hotter by less than a threshold, which falls to 0, is kept for the time being (threshold accepting). Returns the
    best. at: [R], load: [E], first: [G + 1]; ends when ``target`` is met, or ``halt`` [1] is set.
    """
    np.random.seed(seed)
    slots = len(at)
    at = at.copy()
    device = np.empty(slots, np.int64)
    copies = np.zeros(len(load), np.int64)
    for g in range(len(speed)):
        device[first[g] : first[g + 1]] = g
    for r in range(slots):
        if at[r] != EMPTY:
            copies[at[r]] += 1
    _, value, proof = layer_shares(at, device, load, speed)
    best, best_at = value, at.copy()
    threshold = THRESHOLD * (value - target)
    for i in range(tries):
        allowed = threshold * (1 - i / tries) ** 2 + value * 1e-12
        if value <= target * (1 + 1e-9) or halt[0]:
            break
        r, q = np.random.randint(slots), np.random.randint(slots)
        g, h, a, b = device[r], device[q], at[r], at[q]
        replace = np.random.random() < 0.5
        if zone_of_device[g] != zone_of_device[h] or a == b or g == h or not (proof[g] or proof[h]):
            continue
        if b == EMPTY or (a == EMPTY and not replace) or (replace and a != EMPTY and copies[a] == 1):
            continue
        twice = False
        for s in range(first[g], first[g + 1]):
            twice = twice or at[s] == b
        if not replace:
            for s in range(first[h], first[h + 1]):
                twice = twice or at[s] == a
        if twice:
            continue
        at[r] = b
        if not replace:
            at[q] = a
        _, then, named = layer_shares(at, device, load, speed)
        if then <= value + allowed:
            value, proof = then, named
            if value < best * (1 - 1e-12):
                best = value
                best_at[:] = at
            if replace:
                copies[b] += 1
                if a != EMPTY:
                    copies[a] -= 1
        else:
            at[r], at[q] = a, b
    return best_at
