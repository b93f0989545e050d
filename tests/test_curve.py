"""Curves: exact at the measured points, between their neighbours in between, honest beyond."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moeplan.spec.curve import Axis, Curve, Reading


def line(values: list[float], medians: list[float], beyond: str = "flagged") -> Curve:
    axis = Axis.model_validate({"name": "tokens", "values": values, "beyond": beyond})
    return Curve(axes=(axis,), median=tuple(medians), spread=(0.0,) * len(medians))


def test_between_points_it_is_linear() -> None:
    curve = line([1, 3, 7], [10, 20, 60])
    assert curve.at(tokens=2) == Reading(15, False)
    assert curve.at(tokens=6) == Reading(50, False)
    assert curve.at(tokens=7) == Reading(60, False)


def test_below_the_first_point_the_first_counts() -> None:
    assert line([8, 16], [5, 9]).at(tokens=1) == Reading(5, False)


def test_nothing_to_do_takes_no_time() -> None:
    assert line([8, 16], [5, 9]).at(tokens=0) == Reading(0, False)


def test_beyond_the_last_point_the_slope_goes_on_and_is_flagged() -> None:
    assert line([1, 3], [10, 20]).at(tokens=5) == Reading(30, True)
    assert line([1, 3], [10, 20], "linear").at(tokens=5) == Reading(30, False)


def test_more_work_never_costs_less_beyond_the_last_point() -> None:
    """The last two points may fall by noise; their slope must not run down to zero seconds."""
    assert line([1, 2, 4], [10, 12, 11]).at(tokens=100) == Reading(11, True)


def test_a_single_point_scales() -> None:
    assert line([4], [10]).at(tokens=2) == Reading(10, False)
    assert line([4], [10]).at(tokens=8) == Reading(20, True)
    assert line([4], [10], "linear").at(tokens=8) == Reading(20, False)


def test_two_axes() -> None:
    axes = (Axis(name="a", values=(1, 2)), Axis(name="b", values=(10, 20, 40)))
    curve = Curve(axes=axes, median=(1, 2, 4, 3, 6, 12), spread=(0,) * 6)
    assert curve.at(a=1, b=20).seconds == 2  # last axis fastest
    assert curve.at(a=2, b=10).seconds == 3
    assert curve.at(a=1.5, b=30).seconds == pytest.approx((3 + 9) / 2)
    assert curve.at(a=3, b=20) == Reading(10, True)


@pytest.mark.parametrize("coordinates", [{}, {"other": 1}, {"tokens": 1, "other": 1}])
def test_wrong_coordinates(coordinates: dict[str, float]) -> None:
    with pytest.raises(KeyError, match="axes"):
        line([1, 2], [1, 2]).at(**coordinates)


@pytest.mark.parametrize(
    ("values", "medians", "rule"),
    [
        ([1, 1], [1, 2], "increase"),
        ([2, 1], [1, 2], "increase"),
        ([0, 1], [1, 2], "above 0"),
        ([-1, 1], [1, 2], "above 0"),
        ([1, 2], [1], "2 grid points"),
        ([1, 2], [1, -1], "negative"),
        ([1, float("nan")], [1, 1], "finite"),
        ([1, 2], [1, float("inf")], "finite"),
        ([], [], "at least 1"),
    ],
)
def test_malformed_curves(values: list[float], medians: list[float], rule: str) -> None:
    with pytest.raises(ValidationError, match=rule):
        line(values, medians)


@st.composite
def grids(draw: st.DrawFn) -> tuple[list[float], list[float]]:
    values = sorted(draw(st.sets(st.integers(1, 1000), min_size=2, max_size=6)))
    medians = draw(st.lists(st.floats(0, 100), min_size=len(values), max_size=len(values)))
    return [float(v) for v in values], medians


@settings(max_examples=60, deadline=None)
@given(grids(), st.floats(0.01, 2000))
def test_properties(grid: tuple[list[float], list[float]], x: float) -> None:
    values, medians = grid
    curve = line(values, medians)
    for value, median in zip(values, medians, strict=True):
        assert curve.at(tokens=value) == Reading(pytest.approx(median), False)
    seconds, extrapolated = curve.at(tokens=x)
    assert extrapolated == (x > values[-1])
    if x <= values[-1]:
        assert seconds == pytest.approx(float(np.interp(x, values, medians)), abs=1e-9)
    else:
        assert seconds >= medians[-1] - 1e-9


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=5, unique=True), st.floats(0.5, 40), st.floats(0.5, 80))
def test_a_bilinear_function_is_read_back_exactly(xs: list[int], x: float, y: float) -> None:
    xs = sorted({*xs, 1, 51})
    ys = [1, 7, 100]
    axes = (Axis(name="x", values=tuple(xs)), Axis(name="y", values=tuple(ys)))
    medians = tuple(2.0 + 3.0 * a + 5.0 * b + 0.5 * a * b for a in xs for b in ys)
    curve = Curve(axes=axes, median=medians, spread=(0.0,) * len(medians))
    a, b = max(x, 1.0), max(y, 1.0)
    assert curve.at(x=x, y=y).seconds == pytest.approx(2 + 3 * a + 5 * b + 0.5 * a * b)
