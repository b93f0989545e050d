"""Tokens of a trace that all take the same way: a constant input, padding, or a fault of the recording."""

import numpy as np

from .trace import Trace

MANY = 0.25  # of the tokens on one way are worth a warning,
UNLIKELY = 10.0  # where they are so many times more than chance would bring together


def repeated_rows(trace: Trace) -> str:
    """A warning in words where many tokens choose the same experts in every layer; else empty.

    By chance, if layers knew nothing of each other, the product over layers of how often each choice comes would.
    """
    if trace.counts_only or trace.tokens < 2 or trace.top_k == trace.num_experts:
        return ""
    ids = np.sort(trace.expert_ids, axis=2)
    flat = np.ascontiguousarray(ids.reshape(len(ids), -1))
    whole = flat.view(np.dtype((np.void, flat.shape[1] * flat.itemsize))).ravel()  # compared as bytes
    rows, first, tokens = np.unique(whole, return_index=True, return_counts=True)
    share = float(tokens.max() / len(ids))
    why = "padding, one repeated prompt or a fault of the recording? Its affinity and balance are those of that one row"
    if len(rows) == 1:
        return f"all {len(ids)} tokens choose the same experts in every layer: {why}"
    chosen = ids[first[tokens.argmax()]]
    chance = float(np.prod([(ids[:, layer] == chosen[layer]).all(axis=1).mean() for layer in range(trace.layers)]))
    if share < MANY or share < UNLIKELY * chance:
        return ""
    return f"{share:.0%} of the tokens choose the same experts in every layer: {why}"
