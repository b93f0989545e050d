"""Interpolation of measured times."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.serving.grid import Grid

SIZES = np.array([1.0, 2, 4, 16, 64])
SECONDS = np.array([3e-6, 3e-6, 5e-6, 9e-6, 4e-5])


def test_measured_points_are_given_back() -> None:
    grid = Grid([SIZES], SECONDS)
    assert [grid(size) for size in SIZES] == pytest.approx(list(SECONDS), rel=1e-12)
    assert not grid.outside


def test_points_of_several_sizes_that_fill_no_grid() -> None:
    rows = [(1, 1, 1.0), (1, 8, 2.0), (4, 2, 3.0), (4, 4, 5.0), (4, 64, 7.0)]
    grid = Grid([np.array([r[0] for r in rows]), np.array([r[1] for r in rows])], np.array([r[2] for r in rows]))
    for first, second, value in rows:
        assert grid(first, second) == pytest.approx(value)
        assert not grid.outside
    assert grid(1, 16) > 2.0
    assert grid.outside
    assert grid(4, 1) == pytest.approx(3.0)
    assert grid.outside


@given(st.floats(1.0, 64.0))
def test_a_power_law_is_exact(size: float) -> None:
    grid = Grid([SIZES], 2e-6 * SIZES**0.7)
    assert grid(size) == pytest.approx(2e-6 * size**0.7, rel=1e-9)


@given(st.floats(0.1, 1000.0), st.floats(0.1, 1000.0))
def test_times_that_grow_stay_so(one: float, two: float) -> None:
    grid = Grid([SIZES], SECONDS)
    small, large = sorted((one, two))
    assert grid(small) <= grid(large) * (1 + 1e-12)


def test_outside_is_told() -> None:
    grid = Grid([SIZES], SECONDS)
    assert grid(0.5) == pytest.approx(SECONDS[0])
    assert grid.outside
    assert grid(256) == pytest.approx(SECONDS[-1] * SECONDS[-1] / SECONDS[-2], rel=1e-9)
    assert grid.outside


def test_of_several_kernels_the_shortest() -> None:
    assert Grid([np.array([4.0, 4.0, 8.0])], np.array([2.0, 1.0, 3.0]))(4) == pytest.approx(1.0)


def test_beyond_the_last_size_time_never_falls() -> None:
    assert Grid([np.array([4.0, 8.0])], np.array([2.0, 1.0]))(64) == pytest.approx(1.0)
