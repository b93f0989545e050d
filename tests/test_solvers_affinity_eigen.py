import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.solvers.bounds.eigen import CALLS, EigenClip
from moeplan.solvers.bounds.rows import TOLERANCE, _violated


def clipped(matrices, highest):
    values, vectors = np.linalg.eigh(matrices)
    return (vectors * np.clip(values, 0, highest)[:, None, :]) @ vectors.transpose(0, 2, 1)


def symmetric(rng, *shape):
    matrices = rng.standard_normal(shape)
    return matrices + matrices.transpose(0, 2, 1)


@given(st.integers(0, 2**32 - 1), st.integers(2, 24), st.sampled_from([0.0, 1e-3, 1e-2, 1.0]))
@settings(max_examples=80, deadline=None)
def test_matrices_that_change_are_followed(seed, size, change):
    """Whatever the change, what is left out is small; it is nothing where nothing changes."""
    rng = np.random.default_rng(seed)
    matrices, highest = symmetric(rng, 3, size, size), rng.uniform(0.1, 3.0)
    clip = EigenClip(highest)
    for call in range(2 * CALLS):
        found, exact = clip(matrices), clipped(matrices, highest)
        assert (found == found.transpose(0, 2, 1)).all()
        error = np.linalg.norm(found - exact, axis=(1, 2)) / np.linalg.norm(matrices, axis=(1, 2))
        assert (error < (1e-5 if change == 0 or call == 0 else 0.04)).all()
        matrices = matrices + change * symmetric(rng, 3, size, size)


def test_once_nothing_changes_nothing_is_left_out():
    rng = np.random.default_rng(0)
    clip, matrices = EigenClip(1.0), symmetric(rng, 2, 12, 12)
    clip(matrices)
    matrices = matrices + 0.02 * symmetric(rng, 2, 12, 12)
    errors = [np.abs(clip(matrices) - clipped(matrices, 1.0)).max() for _ in range(CALLS)]
    assert errors[0] > 1e-4  # by the formula
    assert errors[-1] < 1e-5  # decomposed anew


@pytest.mark.parametrize("kind", [1, -1])
def test_violated_triangles_are_all_found(kind):
    rng = np.random.default_rng(1)
    for _ in range(20):
        shared = np.clip(symmetric(rng, 1, 9, 9)[0] + 0.4, 0, 1)
        np.fill_diagonal(shared, 1.0)
        # y[a, b, c]: what the row of a, b, c is violated by
        excess = kind * (shared[:, :, None] + shared[:, None, :] - 1) - shared[None, :, :]
        worst = {}
        for a, b in np.argwhere(~np.eye(9, dtype=bool)).tolist():
            for c in range(9) if kind > 0 else range(b + 1, 9):
                if (kind > 0 or b > a) and c not in (a, b) and excess[a, b, c] > max(TOLERANCE, worst.get((a, b), 0)):
                    worst[a, b] = excess[a, b, c]
        rows = _violated(shared, kind)
        assert len(rows) == len(worst)
        assert np.allclose(sorted(excess[tuple(rows.T)]), sorted(worst.values()), atol=1e-6)
