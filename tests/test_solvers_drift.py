"""The drift test: how often it cries wolf, how soon it sees a change, and the ranks that both rest on."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.solvers.drift import POWERS, DriftTest, Reference

LAYERS, EXPERTS, PAIRS = 2, 6, 150


def shares(rng: np.random.Generator) -> np.ndarray:
    """[L, E]"""
    return rng.dirichlet(np.ones(EXPERTS), LAYERS)


def batch(rng: np.random.Generator, share: np.ndarray, rho: float, pairs: int = PAIRS) -> np.ndarray:
    """[L, E] multinomial around shares that differ from batch to batch: Dirichlet with overdispersion ``rho``."""
    rows = share if rho == 0 else [rng.dirichlet(row * (1 / rho - 1) + 1e-9) for row in share]
    return np.stack([rng.multinomial(pairs, row) for row in rows]).astype(float)


def batches(rng: np.random.Generator, share: np.ndarray, rho: float, count: int) -> np.ndarray:
    return np.stack([batch(rng, share, rho) for _ in range(count)])


def run_length(seed: int, rho: float, between: float, most: int) -> int:
    """Batches of unchanged traffic until a false alarm, or ``most``."""
    rng = np.random.default_rng(seed)
    share = shares(rng)
    test = DriftTest.of(batches(rng, share, rho, 20), between)
    for count in range(1, most + 1):
        if test.look(batch(rng, share, rho)):
            return count
    return most


@pytest.mark.parametrize("rho", [0.0, 0.02, 0.2])
def test_false_alarms_are_as_rare_as_promised(rho: float) -> None:
    """The mean number of batches to one is at least ``between``, cut runs counted short; so many runs that three
    standard errors are well below the margin that the test has."""
    between, runs = 20.0, 60
    lengths = np.array([run_length(seed, rho, between, 200) for seed in range(runs)])
    assert lengths.mean() - 3 * lengths.std(ddof=1) / runs**0.5 >= 0.9 * between
    assert lengths.mean() >= between


def test_false_alarms_by_markov() -> None:
    """P(alarm among the first t batches) is at most t / between: the evidence has the mean t at most."""
    runs, looks, between = 150, 25, 100.0
    alarms = sum(run_length(1000 + seed, 0.05, between, looks + 1) <= looks for seed in range(runs))
    expected = looks / between
    assert alarms / runs <= expected + 3 * (expected * (1 - expected) / runs) ** 0.5


@pytest.mark.parametrize("rho", [0.0, 0.02])
def test_a_planted_shift_is_seen_soon_and_dated(rho: float) -> None:
    delays, dated = [], []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        share = shares(rng)
        test = DriftTest.of(batches(rng, share, rho, 20), 1000.0)
        calm = [test.look(batch(rng, share, rho)) for _ in range(20)]
        if any(calm):
            continue
        other = 0.5 * share + 0.5 * np.roll(share, 1, axis=1)
        delays.append(next(count for count in range(1, 200) if test.look(batch(rng, other, rho))))
        dated.append(test.changed)
    assert len(delays) >= 18
    assert np.median(delays) <= 12
    assert np.median(np.abs(np.array(dated) - delays)) <= 4


def test_overdispersion_is_estimated() -> None:
    for rho in (0.0, 0.05, 0.3):
        rng = np.random.default_rng(1)
        found = Reference.of(batches(rng, np.full((LAYERS, EXPERTS), 1 / EXPERTS), rho, 400)).overdispersion
        assert np.abs(found - rho).max() < 0.05 * (1 + rho)


def test_scores_are_about_one_whatever_the_size_of_a_batch() -> None:
    rng = np.random.default_rng(2)
    share = np.full((LAYERS, EXPERTS), 1 / EXPERTS)
    reference = Reference.of(batches(rng, share, 0.05, 300))
    for pairs in (30, 300, 3000):
        found = np.mean([reference.scores(batch(rng, share, 0.05, pairs)[None]) for _ in range(300)])
        assert 0.85 < found < 1.15


@given(known=st.lists(st.integers(0, 5), min_size=1, max_size=12))
def test_factors_have_mean_one_over_all_ranks(known: list[int]) -> None:
    """Which of the scores came last is equally likely for each: the factors are an e-value, with ties or without."""
    total = np.zeros(len(POWERS))
    for last in range(len(known)):
        others = sorted(float(value) for i, value in enumerate(known) if i != last)
        test = DriftTest(Reference(np.full((1, 2), 0.5), np.zeros(1)), 10.0, others)
        total += test._factor(float(known[last]))
    assert total / len(known) == pytest.approx(np.ones(len(POWERS)))


def test_a_factor_by_hand() -> None:
    test = DriftTest(Reference(np.full((1, 2), 0.5), np.zeros(1)), 10.0, [1.0, 2.0, 3.0])
    low, high = Fraction(1, 4), Fraction(2, 4)  # one score is above 2.5, and it is the second of four
    by_hand = [(float(high) ** k - float(low) ** k) / float(high - low) for k in POWERS]
    assert test._factor(2.5) == pytest.approx(by_hand)


def test_the_same_batches_give_the_same_evidence() -> None:
    rng = np.random.default_rng(3)
    share = shares(rng)
    one, two = (DriftTest.of(batches(np.random.default_rng(4), share, 0.1, 20), 100.0) for _ in range(2))
    more = batches(rng, share, 0.1, 10)
    assert [one.look(b) for b in more] == [two.look(b) for b in more]
    assert one.evidence == two.evidence > 0


def test_layers_and_batches_without_tokens_are_no_change() -> None:
    counts = np.ones((8, 2, 4)) * 50
    counts[:, 1] = 0
    test = DriftTest.of(counts, 100.0)
    assert not any(test.look(np.array([[50.0] * 4, [0.0] * 4])) for _ in range(50))
    assert np.isfinite(test.evidence)
    assert not test.look(np.zeros((2, 4)))


@pytest.mark.parametrize("shape", [(3, 2, 4), (8, 4)])
def test_too_small_a_reference_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="4 or more batches"):
        DriftTest.of(np.ones(shape), 100.0)
