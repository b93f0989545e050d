"""Measured curves prepared for reading many points at once."""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from ..spec.curve import Axis, Curve


class Lines(NamedTuple):
    """A curve along its last axis, for R choices of the others.

    values: [R, knots] seconds; beyond, nothing: [R] whether the others lie beyond what was measured, or at 0 or less.
    """

    axis: Axis
    values: np.ndarray
    beyond: np.ndarray
    nothing: np.ndarray

    def read(self, row: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Seconds at ``at`` on the lines ``row``, and whether extrapolated; both of one shape."""
        seconds, beyond, nothing = _along(self.axis, self.values, row, at)
        nothing |= self.nothing[row]
        return np.where(nothing, 0.0, np.maximum(seconds, 0.0)), (beyond | self.beyond[row]) & ~nothing


class Table:
    """A curve as an array. ``read`` gives exactly what ``Curve.at`` gives, for whole arrays of points."""

    def __init__(self, curve: Curve) -> None:
        self.axes = curve.axes
        self.grid = np.asarray(curve.median).reshape([len(axis.values) for axis in curve.axes])
        self.values = [np.asarray(axis.values) for axis in curve.axes]

    def lines(self, *coordinates: ArrayLike) -> Lines:
        """The lines along the last axis at R points of all others; coordinates: one [R] per axis but the last."""
        points = [np.asarray(at, float) for at in coordinates]
        rows = np.arange(len(points[0])) if points else np.zeros(1, int)
        beyond, nothing = np.zeros(len(rows), bool), np.zeros(len(rows), bool)
        rest = np.broadcast_to(self.grid, (len(rows), *self.grid.shape))  # [R, axes that are left]
        for axis, at in zip(self.axes, points, strict=False):
            rest, far, none = _along(axis, rest, rows, at)
            beyond |= far
            nothing |= none
        return Lines(self.axes[-1], rest, beyond, nothing)

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


def _along(axis: Axis, grid: np.ndarray, row: np.ndarray, at: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``grid`` [R, knots, ...] read at ``at`` on its rows ``row``: values, whether extrapolated, whether nothing."""
    knots = np.asarray(axis.values)
    nothing = at <= 0
    beyond = at > knots[-1] if axis.beyond == "flagged" else np.zeros(at.shape, bool)
    across = (..., *(None,) * (grid.ndim - 2))  # a value per point, for all axes that are left
    if len(knots) == 1:
        return grid[row, 0] * np.maximum(1.0, at / knots[0])[across], beyond, nothing
    upper = np.clip(np.searchsorted(knots, at), 1, len(knots) - 1)
    low, high = grid[row, upper - 1], grid[row, upper]
    weight = np.maximum((at - knots[upper - 1]) / (knots[upper] - knots[upper - 1]), 0.0)[across]
    line = low * (1 - weight) + high * weight
    return np.where(weight > 1, np.maximum(line, high), line), beyond, nothing  # a falling last slope: flat
