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

from itertools import pairwise

import numpy as np
from scipy.sparse import csr_array

from ...spec.trace import WHOLE_SEQUENCES, Trace

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


def interpolated(trace: Trace) -> np.ndarray:
    """[L-1, E, E] traffic per token, each boundary summing to 1; of a single token, its own pairs."""
    if trace.tokens < 2 or trace.layers < 2:
        return transitions(trace) / trace.tokens
    count = PARTS if len(trace.seq_len) > WHOLE_SEQUENCES else PARTS_OF_FEW
    parts = [_views(part) for part in trace.parts(count)]
    views = np.sum(parts, axis=0)
    pairs = [np.nonzero(part[0]) for part in parts]
    step = -(-sum(len(pair[0]) for pair in pairs) // ENOUGH)
    pairs = [tuple(index[::step] for index in pair) for pair in pairs]
    others = [np.maximum(views - part, 0.0) for part in parts]  # not below 0 by rounding
    known = np.concatenate([_shares(other, *pair) for other, pair in zip(others, pairs, strict=True)], axis=1)
    seen = np.concatenate([part[0][pair] for part, pair in zip(parts, pairs, strict=True)])
    weights = mixture(known, seen)
    mixed = np.tensordot(weights[:-1] / trace.tokens, views, axes=1)
    return mixed + weights[-1] * np.einsum("la,lb->lab", *_margins(views))


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


def _views(trace: Trace) -> np.ndarray:
    """[V - 1, L-1, E, E] tokens per pair: counted, and shared out by each power."""
    return np.stack([transitions(trace), *(_shared_out(trace, power) for power in POWERS)])


def _margins(views: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[L-1, E] shares of the experts before and after each boundary, in the most even view."""
    tokens = views[1].sum(axis=(1, 2))[:, None]
    return views[1].sum(axis=2) / tokens, views[1].sum(axis=1) / tokens


def _shares(views: np.ndarray, boundary: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """[V, N] shares of N pairs of experts a and b under each view; the last is the independent one."""
    before, after = _margins(views)
    tokens = views[:, boundary[:1]].sum(axis=(1, 2, 3))[:, None]
    return np.concatenate([views[:, boundary, a, b] / tokens, [before[boundary, a] * after[boundary, b]]])


def _shared_out(trace: Trace, power: int) -> np.ndarray:
    """[L-1, E, E] every token's unit spread over all pairs of its experts of two layers."""
    weights = np.maximum(trace.expert_weights.astype(float), 0) ** power
    total = weights.sum(axis=2, keepdims=True)
    weights = np.divide(weights, total, out=np.full_like(weights, 1.0 / trace.top_k), where=total > 0)
    rows = np.arange(trace.tokens + 1) * trace.top_k
    shape = (trace.tokens, trace.num_experts)
    chosen = [
        csr_array((weights[:, layer].ravel(), trace.expert_ids[:, layer].ravel(), rows), shape)
        for layer in range(trace.layers)
    ]
    return np.stack([(a.T @ b).toarray() for a, b in pairwise(chosen)])
