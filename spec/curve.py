"""Measured curves: medians with spread over a grid, read by multilinear interpolation."""

from itertools import pairwise
from math import prod
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from .document import Part

MAX_SECONDS = 1e9
MAX_COORDINATE = 2.0**60
"""Bytes, tokens and the like; beyond these two, sums of products would leave what a float holds."""


class Reading(NamedTuple):
    """A value read from a curve: seconds, and whether it lies beyond what was measured."""

    seconds: float
    extrapolated: bool


class Axis(Part):
    """One coordinate of a grid.

    ``beyond`` says what lies past the last value: ``linear`` where the operation is linear by construction (one more
    expert in a loop costs the same again), ``flagged`` where a reading is reported as extrapolated. Both continue the
    last slope, and a falling one (noise) flat; plans have operators grow as their work does instead, where it is
    flagged. Below the first value the first value counts: nothing is cheaper than the smallest measured call.
    """

    name: str
    values: tuple[float, ...] = Field(min_length=1)
    beyond: Literal["flagged", "linear"] = "flagged"

    @model_validator(mode="after")
    def _increasing(self) -> "Axis":
        if self.values[0] <= 0 or any(a >= b for a, b in pairwise(self.values)):
            raise ValueError(f"values of axis {self.name} must be above 0 and increase")
        if self.values[0] < 1e-9 or self.values[-1] > MAX_COORDINATE:
            raise ValueError(f"values of axis {self.name} must lie in 1e-9..{MAX_COORDINATE:.3g}")
        return self


class Curve(Part):
    """Seconds over a grid of axes.

    ``median`` and ``spread`` are flat, last axis fastest. Spread is (90th - 10th percentile) / median, no unit.
    """

    axes: tuple[Axis, ...] = Field(min_length=1)
    median: tuple[float, ...]
    spread: tuple[float, ...]

    @model_validator(mode="after")
    def _complete(self) -> "Curve":
        points = prod(len(axis.values) for axis in self.axes)
        if not len(self.median) == len(self.spread) == points:
            raise ValueError(f"{points} grid points need as many medians and spreads, got {len(self.median)}")
        if min(self.median) < 0 or min(self.spread) < 0:
            raise ValueError("a duration or its spread is negative")
        if max(self.median) > MAX_SECONDS or max(self.spread) > MAX_SECONDS:
            raise ValueError(f"a duration or its spread is above {MAX_SECONDS:g}")
        return self

    def at(self, **coordinates: float) -> Reading:
        """Interpolate; a reading with any coordinate at 0 or less is 0 seconds (nothing to do)."""
        names = [axis.name for axis in self.axes]
        if set(coordinates) != set(names):
            raise KeyError(f"curve has axes {names}, got {sorted(coordinates)}")
        if min(coordinates.values()) <= 0:
            return Reading(0.0, False)
        grid = np.asarray(self.median).reshape([len(axis.values) for axis in self.axes])
        extrapolated = False
        for axis in self.axes:
            x, values = float(coordinates[axis.name]), axis.values
            if len(values) == 1 or x <= values[0]:
                extrapolated |= len(values) == 1 and x > values[0] and axis.beyond == "flagged"
                scale = max(1.0, x / values[0]) if len(values) == 1 else 1.0
                grid = grid[0] * scale
                continue
            upper = min(int(np.searchsorted(values, x)), len(values) - 1)
            extrapolated |= x > values[-1] and axis.beyond == "flagged"
            low, high = values[upper - 1], values[upper]
            weight = (x - low) / (high - low)
            line = grid[upper - 1] * (1 - weight) + grid[upper] * weight
            grid = np.maximum(line, grid[upper]) if x > high else line
        return Reading(max(float(grid), 0.0), extrapolated)
