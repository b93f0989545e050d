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


def chained_trace(seed: int, layers: int, experts: int, tokens: int, top_k: int, stay: float = 0.6) -> Trace:
    """Skewed loads and affinity: with probability ``stay`` a first choice follows from that of the layer before.

    Sequences of 256 tokens. Neighbours of the first choice are likelier to be among the others.
    """
    rng = np.random.default_rng(seed)
    popularity = rng.normal(size=(layers, experts)) * 0.7
    after = [rng.permutation(experts) for _ in range(layers)]
    first, rows = rng.integers(0, experts, tokens), np.arange(tokens)
    ids = np.empty((tokens, layers, top_k), np.int32)
    for layer in range(layers):
        drawn = rng.integers(0, experts, tokens)
        first = np.where(rng.random(tokens) < stay, after[layer][first], drawn) if layer else drawn
        score = rng.gumbel(size=(tokens, experts)) + popularity[layer]
        near = (first[:, None] + np.arange(1, 4)) % experts
        np.put_along_axis(score, near, np.take_along_axis(score, near, axis=1) + 3.0, axis=1)
        score[rows, first] = np.inf
        best = np.argpartition(-score, top_k, axis=1)[:, :top_k]
        order = np.argsort(-np.take_along_axis(score, best, axis=1), axis=1, kind="stable")
        ids[:, layer] = np.take_along_axis(best, order, axis=1)
    gates = np.sort(rng.random((tokens, layers, top_k)), axis=2)[:, :, ::-1].astype(np.float32)
    return Trace.of(ids, experts, expert_weights=gates, seq_len=np.full(tokens // 256, 256))
