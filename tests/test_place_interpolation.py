"""Interpolated traffic: shares that sum to one, weights that are likeliest, better on tokens to come than counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.interpolation import interpolated, mixture, transitions
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(2, 9), st.integers(1, 40), st.integers(1, 2))
def test_every_boundary_sums_to_one(seed, layers, experts, tokens, top_k):
    found = interpolated(random_trace(seed, layers, experts, tokens, top_k))
    assert found.shape == (layers - 1, experts, experts)
    assert (found >= 0).all()
    assert found.sum(axis=(1, 2)) == pytest.approx(np.ones(layers - 1))


def test_without_gate_weights_all_choices_count_alike():
    ids = np.array([[[0, 1], [2, 3]], [[0, 1], [2, 3]], [[0, 1], [3, 2]], [[0, 1], [3, 2]]])
    zero = Trace.of(ids, 4, expert_weights=np.zeros(ids.shape, np.float32))
    found = interpolated(zero)[0]
    assert found[0, 2] > 0
    assert found[1, 3] > 0  # never first together, but chosen together
    assert found[2:].sum() == 0


@given(st.integers(0, 10**6))
def test_the_mixture_is_the_likeliest(seed):
    rng = np.random.default_rng(seed)
    known, seen = rng.random((3, 12)), rng.integers(0, 9, 12) + 1.0
    weights = mixture(known, seen)
    assert weights.sum() == pytest.approx(1)

    def likelihood(mixed):
        return float((seen * np.log(mixed @ known)).sum())

    for other in rng.dirichlet(np.ones(3), 50):
        assert likelihood(weights) >= likelihood(other) - 1e-3 * seen.sum()


def test_views_that_allow_nothing_seen_leave_even_weights():
    assert mixture(np.zeros((2, 3)), np.ones(3)).tolist() == [0.5, 0.5]


def test_tokens_to_come_are_likelier_than_by_counts():
    """Tokens of three topics that choose among near ties: pairs never counted come, and were foreseen."""
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 3, 900)
    logits = rng.normal(size=(3, 4, 24)) * 3
    noisy = logits[topic] + rng.normal(size=(900, 4, 24)) * 0.7
    ids = np.argsort(-noisy, axis=2)[:, :, :4]
    kept = np.take_along_axis(noisy, ids, axis=2)
    weights = np.exp(kept - kept.max(axis=2, keepdims=True)).astype(np.float32)
    trace = Trace.of(ids, 24, expert_weights=weights / weights.sum(axis=2, keepdims=True), seq_len=[90] * 10)
    fitted, rest = trace.part(0, 0.3), transitions(trace.part(0.3, 1))

    def surprise(shares):
        return -float((rest * np.log(shares + 1e-4)).sum() / rest.sum())

    assert surprise(interpolated(fitted)) < surprise(transitions(fitted) / fitted.tokens) - 0.02
