"""Small traces for placements: random ones, and ones of topics whose experts are never mixed."""

import numpy as np

from moeplan.spec.trace import Trace


def random_trace(seed: int, layers: int, experts: int, tokens: int = 200, top_k: int = 2) -> Trace:
    """Skewed loads, no affinity; gate weights fall with the rank."""
    rng = np.random.default_rng(seed)
    gumbel = rng.gumbel(size=(tokens, layers, experts)) + rng.normal(size=(layers, experts))
    weights = np.sort(rng.random((tokens, layers, top_k)), axis=2)[:, :, ::-1]
    return Trace.of(np.argsort(-gumbel, axis=2)[:, :, :top_k], experts, expert_weights=weights)


def topics_trace(
    seed: int, layers: int, experts: int, tokens: int = 400, top_k: int = 2, topics: int = 2
) -> tuple[Trace, np.ndarray]:
    """Tokens of topics in turn, each with experts of its own; [layers, experts] topic of each expert."""
    rng = np.random.default_rng(seed)
    topic_of = np.stack([rng.permutation(np.arange(experts) % topics) for _ in range(layers)])
    mine = [[np.flatnonzero(row == topic) for row in topic_of] for topic in range(topics)]
    ids = [[rng.permutation(row)[:top_k] for row in mine[token % topics]] for token in range(tokens)]
    return Trace.of(np.array(ids), experts), topic_of
