"""Traffic between adjacent layers as tokens to come will bring it: pairs of first choices, smoothed.

A recording of some thousand tokens fills few of the E x E pairs of a boundary, and what it counts there is partly
chance. Other views of the same tokens are coarser but steadier:
    counted        pairs of first choices
    shared out     every token's unit spread over all pairs of its choices in two layers, by a power of their gate
                   weights: a first choice is often nearly a tie
    independent    what both layers would give without any affinity
They are mixed with weights that make the first choices of each part of the recording likeliest under the views of all
others: deleted interpolation (Jelinek and Mercer 1980), by expectation maximisation. Parts are whole sequences; a
recording of up to three is only halved, since the more parts there are of one sequence, the more alike they are.
"""

# T tokens, L layers, E experts, K top-k, V views

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from ...spec.trace import WHOLE_SEQUENCES, Trace
from ..budget import OutOfTime

POWERS = (1, 3, 6)  # of the gate weights: from nearly even shares to nearly the first choice alone
ENOUGH = 50_000  # kinds of pairs, evenly picked, show how to mix a handful of views
PARTS, PARTS_OF_FEW = 4, 2  # of a recording, and of one of few sequences
ROUNDS = 100  # of expectation maximisation, which nears the optimum slowly but never leaves it
LEAST_WEIGHT = 1e-9  # of a view: below it, it has vanished, and only the end of the rounds has kept it from 0


def transitions(trace: Trace) -> np.ndarray:
    """[L-1, E, E] tokens whose first expert is a in one layer and b in the next."""
    first, experts = trace.expert_ids[:, :, 0].astype(np.int64), trace.num_experts
    pairs = first[:, :-1] * experts + first[:, 1:]
    return np.array([np.bincount(row, minlength=experts**2) for row in pairs.T], float).reshape(-1, experts, experts)


def interpolated(trace: Trace, late: Callable[[], bool] = lambda: False) -> np.ndarray:
    """[L-1, E, E] traffic per token, each boundary summing to 1; of a single token, its own pairs.

    late: asked at every boundary; ``OutOfTime`` once it says so.
    """
    # Imported when it is needed: its compiled loop takes a second to load.
    from ...solvers.placement.traffic import add_pairs

    if trace.tokens < 2 or trace.layers < 2:
        return transitions(trace) / trace.tokens
    count = PARTS if len(trace.seq_len) > WHOLE_SEQUENCES else PARTS_OF_FEW
    cuts = np.cumsum([0, *(part.tokens for part in trace.parts(count))])
    views = np.zeros((1 + len(POWERS), trace.layers - 1, trace.num_experts, trace.num_experts))
    parts = np.empty((len(cuts) - 1, 1 + len(POWERS), *views.shape[2:]))
    known, seen = [], []
    picked, shares = _Picked(trace, cuts), _gate_shares(trace, 0)
    for boundary in range(trace.layers - 1):
        if late():
            raise OutOfTime("traffic between layers")
        before, shares = shares, _gate_shares(trace, boundary + 1)
        ids, after = trace.expert_ids[:, boundary], trace.expert_ids[:, boundary + 1]
        parts[:] = 0.0
        for part, (low, high) in zip(parts, pairwise(cuts), strict=True):
            add_pairs(ids[low:high], after[low:high], before[:, low:high], shares[:, low:high], part)
        whole = parts.sum(axis=0)
        views[:, boundary] = whole
        for number, part in enumerate(parts):
            pairs = picked.of(number, np.flatnonzero(part[0]))
            known.append(_shares_of_others(whole, part, pairs, trace.tokens - int(cuts[number + 1] - cuts[number])))
            seen.append(part[0].ravel()[pairs])
    weights = mixture(np.concatenate(known, axis=1), np.concatenate(seen))
    mixed = np.tensordot(weights[:-1] / trace.tokens, views, axes=1)
    even = views[1]
    mixed += weights[-1] * even.sum(axis=2)[:, :, None] * even.sum(axis=1)[:, None, :] / trace.tokens**2
    return mixed


def mixture(likelihoods: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """[V] weights, summing to 1, that make what was seen likeliest.

    likelihoods: [V, N] of N kinds of events under each view; seen: [N] how often each came.
    """
    weights = np.full(len(likelihoods), 1 / len(likelihoods))
    for _ in range(ROUNDS):
        parts = weights[:, None] * likelihoods
        whole = parts.sum(axis=0)
        # An event that no view allows says nothing about the views.
        credit = (parts * np.divide(seen, whole, out=np.zeros_like(whole), where=whole > 0)).sum(axis=1)
        if not credit.any():
            break
        weights = credit / credit.sum()
    weights = np.where(weights < LEAST_WEIGHT, 0.0, weights)
    return weights / weights.sum()


class _Picked:
    """Evenly every n-th kind of pair that a part of the trace has, boundary after boundary."""

    def __init__(self, trace: Trace, cuts: Sequence[int] | np.ndarray) -> None:
        experts, first = trace.num_experts, trace.expert_ids[:, :, 0].astype(np.int64)
        codes = (first[:, :-1] * experts + first[:, 1:]).T
        kinds = sum(len(np.unique(row[low:high])) for row in codes for low, high in pairwise(cuts))
        self.step = -(-kinds // ENOUGH)
        self.passed = [0] * (len(cuts) - 1)

    def of(self, part: int, pairs: np.ndarray) -> np.ndarray:
        """Those of the next boundary's ``pairs`` that are picked."""
        first = -self.passed[part] % self.step
        self.passed[part] += len(pairs)
        return pairs[first :: self.step]


def _shares_of_others(whole: np.ndarray, part: np.ndarray, pairs: np.ndarray, tokens: int) -> np.ndarray:
    """[V, N] shares of N pairs of experts, flat indices, under each view of all parts but one; then independent.

    whole, part: [V - 1, E, E] views of a boundary; tokens: of the others, what each of their views sums to.
    """
    experts = whole.shape[1]
    flat = whole.reshape(len(whole), -1)[:, pairs] - part.reshape(len(part), -1)[:, pairs]
    before, after = (np.maximum(whole[1].sum(axis=axis) - part[1].sum(axis=axis), 0.0) / tokens for axis in (1, 0))
    independent = before[pairs // experts] * after[pairs % experts]
    return np.concatenate([np.maximum(flat, 0.0) / tokens, [independent]])  # not below 0 by rounding


def _gate_shares(trace: Trace, layer: int) -> np.ndarray:
    """[P, T, K] shares of each token's unit by each power of its gate weights in a layer; even where all are 0."""
    gates = np.maximum(trace.expert_weights[:, layer].astype(float), 0)
    found = np.stack([gates**power for power in POWERS])
    total = found.sum(axis=2, keepdims=True)
    return np.divide(found, total, out=np.full_like(found, 1.0 / trace.top_k), where=total > 0)
