"""Interpolated traffic: shares that sum to one, weights that are likeliest, better on tokens to come than counts."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.place.interpolation import PARTS, interpolated, mixture, transitions
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


@pytest.mark.parametrize("lengths", [[90] * 10, [30] * 3, [5, 400, 5, 5, 5]])
def test_parts_are_the_whole_trace(lengths):
    trace = random_trace(3, 3, 8, sum(lengths), 2)
    trace = Trace.of(trace.expert_ids, 8, seq_len=lengths)
    parts = trace.parts(4)
    assert 2 <= len(parts) <= 4
    assert np.array_equal(np.concatenate([part.expert_ids for part in parts]), trace.expert_ids)
    if len(lengths) > 3:  # sequences are whole
        assert np.concatenate([part.seq_len for part in parts]).tolist() == lengths


def test_weights_learned_from_most_of_the_recording_are_better(monkeypatch):
    """Views of a half are poorer than those of the whole that the weights are for: counts would weigh too little."""

    def surprise(seed, parts):
        monkeypatch.setattr("moeplan.planner.place.interpolation.PARTS", parts)
        rng = np.random.default_rng(seed)
        first = rng.integers(0, 12, 4000)
        second = (first + rng.geometric(0.3, 4000) - 1) % 12
        ids = np.stack([first, second], axis=1)[:, :, None]
        trace = Trace.of(ids, 12, seq_len=[20] * 200)
        fitted, rest = trace.part(0, 0.05), transitions(trace.part(0.05, 1))
        return -float((rest * np.log(interpolated(fitted))).sum() / rest.sum())

    halves, usual = ([surprise(seed, parts) for seed in range(12)] for parts in (2, PARTS))
    assert np.mean(usual) < np.mean(halves)
