"""Measured curves prepared for reading many points at once."""

import numpy as np
from numpy.typing import ArrayLike

from ..spec.curve import Curve


class Table:
    """A curve as an array. ``read`` gives exactly what ``Curve.at`` gives, for whole arrays of points."""

    def __init__(self, curve: Curve) -> None:
        self.axes = curve.axes
        self.grid = np.asarray(curve.median).reshape([len(axis.values) for axis in curve.axes])
        self.values = [np.asarray(axis.values) for axis in curve.axes]

    def read(self, **coordinates: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and whether extrapolated, both in the common shape of the coordinates (one per axis)."""
        points = np.broadcast_arrays(*(np.asarray(coordinates[axis.name], float) for axis in self.axes))
        shape = points[0].shape
        beyond, nothing = np.zeros(points[0].size, bool), np.zeros(points[0].size, bool)
        rest = np.broadcast_to(self.grid, (points[0].size, *self.grid.shape))  # [points, axes that are left]
        every = np.arange(points[0].size)
        for axis, values, at in zip(self.axes, self.values, points, strict=True):
            x = at.ravel()
            nothing |= x <= 0
            if axis.beyond == "flagged":
                beyond |= x > values[-1]
            across = (slice(None), *(None,) * (rest.ndim - 2))  # a value per point, for all axes that are left
            if len(values) == 1:
                rest = rest[:, 0] * np.maximum(1.0, x / values[0])[across]
                continue
            upper = np.clip(np.searchsorted(values, x), 1, len(values) - 1)
            low, high = rest[every, upper - 1], rest[every, upper]
            weight = np.maximum((x - values[upper - 1]) / (values[upper] - values[upper - 1]), 0.0)[across]
            line = low * (1 - weight) + high * weight
            rest = np.where(weight > 1, np.maximum(line, high), line)  # a falling last slope is continued flat
        seconds = np.where(nothing, 0.0, np.maximum(rest, 0.0))
        return seconds.reshape(shape), (beyond & ~nothing).reshape(shape)
