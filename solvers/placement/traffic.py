"""Pairs of experts that tokens choose in two layers, each pair weighted by both of its gates: a compiled loop."""

# T tokens, E experts, K top-k, P powers of the gate weights

import numpy as np

from ..jit import njit


@njit(cache=True, nogil=True)
def add_pairs(
    before: np.ndarray, after: np.ndarray, shares_before: np.ndarray, shares_after: np.ndarray, found: np.ndarray
) -> None:
    """Add to found [1 + P, E, E]: one for each token's pair of first choices, then each power's product of shares.

    before, after: [T, K] int32 experts of two layers; shares_before, shares_after: [P, T, K] float64.
    """
    tokens, top_k = before.shape
    for t in range(tokens):
        found[0, before[t, 0], after[t, 0]] += 1.0
        for p in range(len(shares_before)):
            for i in range(top_k):
                row, share = found[1 + p, before[t, i]], shares_before[p, t, i]
                for j in range(top_k):
                    row[after[t, j]] += share * shares_after[p, t, j]
