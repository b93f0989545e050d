"""Measured curves prepared for reading many points at once."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..spec.curve import Axis, Curve
from .extrapolation import Extrapolation


class Lines(NamedTuple):
    """A curve along its last axis, for R choices of the others.

    values: [R, knots] seconds; beyond, nothing: [R] whether the others lie beyond what was measured, or at 0 or less.
    others: [R] coordinates of each other axis; extrapolation: without one, the last slope goes on beyond.
    """

    axis: Axis
    values: np.ndarray
    beyond: np.ndarray
    nothing: np.ndarray
    others: Sequence[np.ndarray] = ()
    extrapolation: Extrapolation | None = None

    def read(self, row: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds at ``at`` on the lines ``row``, and whether extrapolated; both of one shape."""
        far = _far(self.axis, at) | self.beyond[row]
        seconds = _along(self.axis, self.values, row, at, self.extrapolation)
        nothing = (at <= 0) | self.nothing[row]
        far &= ~nothing
        if self.extrapolation is not None and far.any():
            coordinates = [*(other[row[far]] for other in self.others), at[far]]
            seconds[far] *= self.extrapolation.growth(coordinates)
        return np.where(nothing, 0.0, np.maximum(seconds, 0.0)), far


class Table:
    """A curve as an array, read for whole arrays of points.

    Without an ``extrapolation`` it gives exactly what ``Curve.at`` gives; with one, seconds that follow the operator's
    work between the measured points and beyond them.
    """

    def __init__(self, curve: Curve, extrapolation: Extrapolation | None = None) -> None:
        self.axes, self.extrapolation = curve.axes, extrapolation
        self.grid = np.asarray(curve.median).reshape([len(axis.values) for axis in curve.axes])
        self.values = [np.asarray(axis.values) for axis in curve.axes]

    def lines(self, *coordinates: ArrayLike) -> Lines:
        """The lines along the last axis at R points of all others; coordinates: one [R] per axis but the last."""
        points = [np.asarray(at, float) for at in coordinates]
        rows = np.arange(len(points[0])) if points else np.zeros(1, int)
        beyond, nothing = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        rest = np.broadcast_to(self.grid, (len(rows), *self.grid.shape))  # [R, axes that are left]
        for axis, at in zip(self.axes, points, strict=False):
            rest = _along(axis, rest, rows, at, self.extrapolation)
            beyond |= _far(axis, at)
            nothing |= at <= 0
        return Lines(self.axes[-1], rest, beyond, nothing, points, self.extrapolation)

    def read(self, **coordinates: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and whether extrapolated, both in the common shape of the coordinates (one per axis)."""
        given = [np.asarray(coordinates[axis.name], float) for axis in self.axes]
        shape = np.broadcast_shapes(*(at.shape for at in given))
        last = np.broadcast_to(given[-1], shape).ravel()
        if all(at.size == 1 for at in given[:-1]):
            lines, row = self.lines(*(at.reshape(1) for at in given[:-1])), np.zeros(last.size, int)
        else:
            lines = self.lines(*(np.broadcast_to(at, shape).ravel() for at in given[:-1]))
            row = np.arange(last.size)
        seconds, beyond = lines.read(row, last)
        return seconds.reshape(shape), beyond.reshape(shape)


def _far(axis: Axis, at: np.ndarray) -> np.ndarray:
    """Whether a reading there is extrapolated."""
    return at > axis.values[-1] if axis.beyond == "flagged" else np.zeros(at.shape, bool)


def _along(
    axis: Axis, grid: np.ndarray, row: np.ndarray, at: np.ndarray, extrapolation: Extrapolation | None
) -> np.ndarray:
    """``grid`` [R, knots, ...] read at ``at`` on its rows ``row``: at the last point, where what is beyond grows from
    there."""
    knots = np.asarray(axis.values)
    if extrapolation is not None:
        at = at if axis.beyond == "linear" else np.minimum(at, knots[-1])
        knots, at = extrapolation.along(axis.name, knots), extrapolation.along(axis.name, at)
    across = (..., *(None,) * (grid.ndim - 2))  # a value per point, for all axes that are left
    if len(knots) == 1:
        return grid[row, 0] * np.maximum(1.0, at / knots[0])[across]
    upper = np.clip(np.searchsorted(knots, at), 1, len(knots) - 1)
    low, high = grid[row, upper - 1], grid[row, upper]
    weight = np.maximum((at - knots[upper - 1]) / (knots[upper] - knots[upper - 1]), 0.0)[across]
    line = low * (1 - weight) + high * weight
    return np.where(weight > 1, np.maximum(line, high), line)  # a falling last slope: flat
