"""Fan-out: how many devices and hosts hold the experts that a token chose, which is what ``ep`` dispatch sends.

    weighted fan-out of a token = device_weight * devices + (host_weight - device_weight) * hosts

A copy to another device of a host that is reached anyway costs ``device_weight``, the first one on a host
``host_weight``. Tokens that choose the same experts pay the same, so they may be counted as sets.
"""

# T tokens, L layers, K top-k, S distinct sets, N placements, E experts (-1: none, which needs no device), G devices

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

ExpertSets = tuple[np.ndarray, np.ndarray]  # ([S, K] experts, [S] tokens)


def expert_sets(expert_ids: ArrayLike) -> list[ExpertSets]:
    """The distinct sets of every layer and the tokens of each; expert_ids: [T, L, K]."""
    ids = np.sort(np.asarray(expert_ids, np.int64), axis=2)
    least = min(int(ids.min(initial=0)), 0)
    base, top_k = int(ids.max(initial=0)) + 1 - least, ids.shape[2]
    if base**top_k >= 2**63:
        return [np.unique(ids[:, layer], axis=0, return_counts=True) for layer in range(ids.shape[1])]
    # Numbers sort much faster than rows, in the same order.
    digits = base ** np.arange(top_k - 1, -1, -1, dtype=np.int64)
    found = [np.unique((ids[:, layer] - least) @ digits, return_counts=True) for layer in range(ids.shape[1])]
    return [(keys[:, None] // digits % base + least, count) for keys, count in found]


def places(place_of: np.ndarray, members: np.ndarray) -> np.ndarray:
    """[S] distinct places of each row's experts; place_of: [E], members: [S, K]."""
    at = np.sort(np.where(members < 0, -1, place_of[members]), axis=1)
    return (at[:, 0] >= 0) + (np.diff(at, axis=1) != 0).sum(axis=1)


def fan_outs(at: np.ndarray, sets: ExpertSets, levels: Sequence[tuple[float, np.ndarray]]) -> np.ndarray:
    """[N] weighted fan-out of a layer's tokens in each placement at [N, E]; levels: (weight, place of each device)."""
    members, tokens = sets
    found = np.zeros(len(at))
    for weight, place in levels:
        where = place[at]
        for p in range(int(place.max()) + 1):
            there = where == p  # [N, E]
            for chosen, count in zip(members, tokens.tolist(), strict=True):
                found += weight * count * there[:, chosen[chosen >= 0]].any(axis=1)
    return found
