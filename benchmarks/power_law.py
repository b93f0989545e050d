"""Loads as the makers of measured tables draw them, and the hottest device under experts by number or under EPLB.

Rows named ``power_law_A`` time the hottest device of one draw: popularities of experts with density x^-A between 1 and
0.8 times the tokens (0.01 and 2 where there are fewer pairs than experts), scaled to tokens x top-k pairs, rounded, at
most one pair of a token and an expert; what rounding left goes to the least loaded experts, the highest numbers first.
Where there are few tokens that gives all experts of a token to one device, which recorded routing does not do. Rows
``power_law_A_eplb`` balance this very draw: their placement has seen the batch that it serves.
"""

# D draws, E experts, G devices

import numpy as np

from moeplan.solvers.replication.eplb import eplb
from moeplan.solvers.slots import EMPTY


def power_law(tokens: int, experts: int, top_k: int, exponent: float, draws: int, seed: int) -> np.ndarray:
    """[D, E] pairs of each expert in steps of ``tokens`` tokens."""
    low, high = (1.0, 0.8 * tokens) if tokens * top_k > experts else (0.01, 2.0)
    power = 1 - exponent
    uniform = np.random.default_rng(seed).random((draws, experts))
    drawn = (uniform * (high**power - low**power) + low**power) ** (1 / power)
    pairs = np.rint(drawn / drawn.sum(axis=1, keepdims=True) * tokens * top_k).astype(np.int64)
    pairs = np.minimum(pairs, tokens)
    for row in pairs:
        _complete(row, tokens * top_k, tokens)
    return pairs


def by_number(pairs: np.ndarray, devices: int) -> tuple[np.ndarray, np.ndarray]:
    """[D] pairs of the hottest device, and experts of it that have any; experts in equal blocks."""
    return _hottest(pairs.astype(float).reshape(len(pairs), devices, -1))


def under_eplb(pairs: np.ndarray, devices: int, slots: int) -> tuple[np.ndarray, np.ndarray]:
    """The same of EPLB's placement of these very pairs."""
    found = eplb(pairs, slots, 1, 1, devices)
    taken = np.take_along_axis(pairs, np.maximum(found.expert_of, 0), axis=1) * found.share_of
    return _hottest(np.where(found.expert_of == EMPTY, 0.0, taken).reshape(len(pairs), devices, -1))


def _hottest(loads: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """loads: [D, G, slots of a device]."""
    rows = loads[np.arange(len(loads)), loads.sum(axis=2).argmax(axis=1)]
    return rows.sum(axis=1), np.minimum(rows, 1.0).sum(axis=1)


def _complete(row: np.ndarray, total: int, most: int) -> None:
    """Make ``row`` [E] sum to ``total``, in place: one pair at a time to or from the least loaded, last ones first."""
    while missing := total - int(row.sum()):
        order = np.argsort(-row, kind="stable")[::-1]
        if missing > 0:
            row[order[row[order] < most][:missing]] += 1
        else:
            row[order[row[order] > 0][:-missing]] -= 1
