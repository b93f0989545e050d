"""Tokens of a trace that all take the same way: a constant input, padding, or a fault of the recording."""

import numpy as np

from .trace import Trace

MANY = 0.25  # of the tokens on one way are worth a warning,
UNLIKELY = 10.0  # where they are so many times more than chance would bring together


def repeated_rows(trace: Trace) -> str:
    """A warning where many tokens choose the same experts in every layer; else empty.

    Chance is what the other tokens show: if layers knew nothing of each other, the product over layers of how often
    they choose so. In one layer nothing is repeated but a choice, which its load shows.
    """
    if trace.counts_only or trace.tokens < 2 or trace.top_k == trace.num_experts:
        return ""
    # Rows that are equal are equal in the first layer too: most traces need no look at the others.
    if _commonest(np.sort(trace.expert_ids[:, 0], axis=1)) < MANY:
        return ""
    ids = np.sort(trace.expert_ids, axis=2)
    flat = np.ascontiguousarray(ids.reshape(len(ids), -1))
    whole = flat.view(np.dtype((np.void, flat.shape[1] * flat.itemsize))).ravel()  # compared as bytes
    rows, first, tokens = np.unique(whole, return_index=True, return_counts=True)
    share = float(tokens.max() / len(ids))
    why = "padding, one repeated prompt or a fault of the recording? Its affinity and balance are those of that one row"
    if len(rows) == 1:
        return f"all {len(ids)} tokens choose the same experts in every layer: {why}"
    like = ids == ids[first[tokens.argmax()]]  # [T, L, K]
    others = like[~like.all(axis=(1, 2))].all(axis=2)  # [tokens, L]
    chance = float(np.prod(others.mean(axis=0)))
    if trace.layers < 2 or share < MANY or share < UNLIKELY * chance:
        return ""
    return f"{share:.0%} of the tokens choose the same experts in every layer: {why}"


def _commonest(rows: np.ndarray) -> float:
    """Share of the commonest of rows [T, K]."""
    _, count = np.unique(rows, axis=0, return_counts=True)
    return float(count.max() / len(rows))
