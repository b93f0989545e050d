"""What the solvers see of a trace: traffic between layers, experts needed together, loads that may come."""

# T tokens, L layers, E experts, K top-k, W windows, S samples

import numpy as np

from ...solvers.annealing import Affinity, pairs
from ...spec.trace import WHOLE_SEQUENCES, Trace

WINDOWS = SAMPLES = 16
DRAWN = 4  # windows in a sample
SMOOTHING = 0.4  # of the traffic is counted over all chosen experts, not the first alone
SHARPNESS = 3  # power of the gate weights by which those are counted
PARTIAL_SUMS = 0.02  # of a move between devices: what a token's partial sum costs beside it


def windows(trace: Trace, count: int = WINDOWS) -> np.ndarray:
    """[W, L, E] token-expert pairs in equal consecutive parts of the trace; one part where it has counts only."""
    if trace.counts_only:
        return trace.expert_counts[None]
    return np.stack([_counts(part, trace.num_experts) for part in np.array_split(trace.expert_ids, count) if len(part)])


def load_samples(trace: Trace) -> np.ndarray:
    """[S, L, E] loads as tokens to come may bring them: each the sum of ``DRAWN`` windows drawn at random.

    A block bootstrap (Kunsch 1989). All windows in a sample would give the spread of this trace around the truth; what
    comes spreads as much again, and drifts: a quarter of the windows doubles the spread. A trace of few sequences does
    not show how sequences differ: then the windows themselves, with twice the spread again.
    """
    parts = windows(trace)
    if trace.counts_only or len(trace.seq_len) <= WHOLE_SEQUENCES:
        return parts
    drawn = np.random.default_rng(0).integers(0, len(parts), (SAMPLES, min(DRAWN, len(parts))))
    return parts[drawn].sum(axis=1)


def transitions(trace: Trace) -> np.ndarray:
    """[L-1, E, E] tokens whose first expert is a in one layer and b in the next."""
    first, experts = trace.expert_ids[:, :, 0].astype(np.int64), trace.num_experts
    pairs = first[:, :-1] * experts + first[:, 1:]
    return np.array([np.bincount(row, minlength=experts**2) for row in pairs.T], float).reshape(-1, experts, experts)


def coherent_affinity(trace: Trace) -> Affinity:
    """Moves of the first expert between layers, then partial sums; per token.

    A recording of some thousand tokens fills few of the E x E pairs of a boundary. A token's first choice is often
    nearly a tie, so its other choices, by the power ``SHARPNESS`` of their gate weights, say which pairs are likely.
    """
    smooth = (1 - SMOOTHING) * transitions(trace) + SMOOTHING * _soft_transitions(trace)
    return Affinity.of(smooth / trace.tokens, PARTIAL_SUMS * _first_with_others(trace) / trace.tokens)


def fan_out_affinity(trace: Trace) -> Affinity:
    """Pairs of a token's experts, per token and other expert: what keeps the de-duplicated fan-out low."""
    together = pairs(trace.expert_ids, trace.num_experts) / (trace.tokens * max(trace.top_k - 1, 1))
    return Affinity.of(np.zeros((trace.layers - 1, *together.shape[1:])), together)


def _counts(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L, E] of ids [T, L, K]."""
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(ids.shape[1])]) * 1.0


def _soft_transitions(trace: Trace) -> np.ndarray:
    """[L-1, E, E] every token's unit spread over all pairs of its experts of two layers."""
    weights = np.maximum(trace.expert_weights.astype(float), 0) ** SHARPNESS
    total = weights.sum(axis=2, keepdims=True)
    weights = np.where(total > 0, weights / np.where(total > 0, total, 1.0), 1.0 / trace.top_k)
    found, before = [], None
    for layer in range(trace.layers):
        now = np.zeros((trace.tokens, trace.num_experts))
        np.put_along_axis(now, trace.expert_ids[:, layer].astype(np.int64), weights[:, layer], axis=1)
        if before is not None:
            found.append(before.T @ now)
        before = now
    return np.array(found).reshape(-1, trace.num_experts, trace.num_experts)


def _first_with_others(trace: Trace) -> np.ndarray:
    """[L, E, E] symmetric: tokens whose first expert is one of the pair and another choice the other."""
    experts, ids = trace.num_experts, trace.expert_ids.astype(np.int64)
    found = np.zeros((trace.layers, experts, experts))
    for layer in range(trace.layers):
        pairs = (ids[:, layer, :1] * experts + ids[:, layer, 1:]).ravel()
        found[layer] = np.bincount(pairs, minlength=experts**2).reshape(experts, experts)
    return found + found.transpose(0, 2, 1)
