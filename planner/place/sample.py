"""What the solvers see of a trace: traffic between layers, experts needed together, loads that may come."""

# T tokens, L layers, E experts, K top-k, W windows, S samples

import numpy as np

from ...solvers.placement.affinity import Affinity, pairs
from ...spec.trace import WHOLE_SEQUENCES, Trace
from ..budget import Budget
from .interpolation import interpolated, transitions

WINDOWS = 16
SAMPLES, DRAWN_FROM = 32, 48  # load samples, and windows that they are drawn from
DRAWN, DRAWN_OF_FEW = (2, 6), (2,)  # windows in a sample, in turns; of a trace of few sequences
PARTIAL_SUMS = 0.005  # of a move between devices: what a partial sum of a token counts beside it, which comes second


def windows(trace: Trace, count: int = WINDOWS) -> np.ndarray:
    """[W, L, E] token-expert pairs in equal consecutive parts of the trace; one part where it has counts only."""
    if trace.counts_only:
        return trace.expert_counts[None]
    return np.stack([_counts(part, trace.num_experts) for part in np.array_split(trace.expert_ids, count) if len(part)])


def load_samples(trace: Trace) -> np.ndarray:
    """[S, L, E] loads as tokens to come may bring them: each the sum of a few windows drawn at random.

    A block bootstrap (Kunsch 1989). All windows in a sample would give the spread of this trace around the truth; what
    comes spreads as much again, and drifts, by how much a trace cannot say: on the second halves of recorded traces,
    samples of 2 to 47 of 48 windows had the spread that came. Half of the samples are therefore of few windows, half of
    more. A trace of few sequences does not show how sequences differ: then all are of few.
    """
    if trace.counts_only:
        return trace.expert_counts[None]
    parts, random = windows(trace, DRAWN_FROM), np.random.default_rng(0)
    sizes = DRAWN if len(trace.seq_len) > WHOLE_SEQUENCES else DRAWN_OF_FEW
    drawn = [random.integers(0, len(parts), sizes[i % len(sizes)]) for i in range(SAMPLES)]
    return np.stack([parts[windows_of].sum(axis=0) for windows_of in drawn])


def coherent_affinity(trace: Trace, budget: Budget | None = None, partial: float = PARTIAL_SUMS) -> Affinity:
    """Moves of the first expert between layers as tokens to come will bring them, then partial sums; per token.

    partial: what one of these counts beside a move. Raises ``OutOfTime`` where the budget ends first.
    """
    shares = interpolated(trace) if budget is None else interpolated(trace, lambda: budget.late)
    return Affinity.of(shares, partial * _first_with_others(trace) / trace.tokens)


def counted_affinity(trace: Trace, partial: float = PARTIAL_SUMS) -> Affinity:
    """The same as counted on the trace, which takes no time worth speaking of."""
    return Affinity.of(transitions(trace) / trace.tokens, partial * _first_with_others(trace) / trace.tokens)


def fan_out_affinity(trace: Trace) -> Affinity:
    """Pairs of a token's experts, per token and other expert: what keeps the de-duplicated fan-out low."""
    together = pairs(trace.expert_ids, trace.num_experts) / (trace.tokens * max(trace.top_k - 1, 1))
    return Affinity.of(np.zeros((trace.layers - 1, *together.shape[1:])), together)


def _counts(ids: np.ndarray, experts: int) -> np.ndarray:
    """[L, E] of ids [T, L, K]."""
    return np.stack([np.bincount(ids[:, layer].ravel(), minlength=experts) for layer in range(ids.shape[1])]) * 1.0


def _first_with_others(trace: Trace) -> np.ndarray:
    """[L, E, E] symmetric: tokens whose first expert is one of the pair and another choice the other."""
    experts, ids = trace.num_experts, trace.expert_ids.astype(np.int64)
    found = np.zeros((trace.layers, experts, experts))
    for layer in range(trace.layers):
        pairs = (ids[:, layer, :1] * experts + ids[:, layer, 1:]).ravel()
        found[layer] = np.bincount(pairs, minlength=experts**2).reshape(experts, experts)
    return found + found.transpose(0, 2, 1)
