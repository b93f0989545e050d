"""How an operator's seconds go on between the sizes that were measured, and beyond them: as its work does.

A straight line through the last two points would have attention grow with the length of its prompts, of which it
multiplies every token with every other. Beyond, the last measured point is multiplied by how much more there is to do
(``spec.work``). Where the work has several parts, what each of them takes is told by the last points: a part that is
slower than its share of the work makes time grow faster; none makes it grow slower. Between two points seconds rise
with the same parts, from the one to the other.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np

from ..spec.curve import Curve
from ..spec.operators import Shape
from ..spec.work import BENT, work


class Extrapolation:
    """For one curve of an operator.

    Seconds beyond are those at the nearest measured point times ``growth``. That is 1 at this point and rises from
    there with every coordinate, at least in proportion to the work.
    """

    def __init__(self, operator: str, shape: Shape, curve: Curve) -> None:
        self.operator, self.shape = operator, shape
        self.names = [axis.name for axis in curve.axes]
        self.last = [axis.values[-1] if axis.beyond == "flagged" else np.inf for axis in curve.axes]
        self._times = self._calibrated(curve)

    def growth(self, coordinates: Sequence[np.ndarray]) -> np.ndarray:
        """Times the seconds at the nearest measured point; coordinates: one array per axis, all of one shape, above 0,
        in the order of the curve's axes."""
        near = [np.minimum(at, last) for at, last in zip(coordinates, self.last, strict=True)]
        here, there = self._work(coordinates), self._work(near)
        grown = here.sum(0) / there.sum(0)
        if self._times is None:
            return grown
        call, parts = self._times[0], self._times[1:]
        return np.maximum(grown, (call + np.tensordot(parts, here, 1)) / (call + np.tensordot(parts, there, 1)))

    def along(self, axis: str, at: np.ndarray) -> np.ndarray:
        """What seconds are a straight line over, between two points: the coordinate, or, where work does not grow
        straight with it, the time of its parts (of their FLOPs, where the last points tell none apart)."""
        if axis not in BENT.get(self.operator, ()):
            return at
        parts = self._work([at if name == axis else np.ones_like(at) for name in self.names])
        if self._times is None or not self._times[1:].any():
            return parts.sum(0)
        return np.tensordot(self._times[1:], parts, 1)

    def _work(self, coordinates: Sequence[np.ndarray]) -> np.ndarray:
        return work(self.operator, self.shape, dict(zip(self.names, coordinates, strict=True)))

    def _calibrated(self, curve: Curve) -> np.ndarray | None:
        """Time of a call, and of each unit of its parts, none below 0, nearest to the last two points along every axis,
        in times of the longest; None where the work has one part, or where these took no time."""
        from scipy.optimize import nnls  # a moment to load: commands start without it

        sizes = [len(axis.values) for axis in curve.axes]
        last_two = [range(max(0, size - 2), size) for size in sizes]
        at = [np.array(points) for points in zip(*product(*self._values(curve, last_two)), strict=True)]
        seconds = np.asarray(curve.median).reshape(sizes)[np.ix_(*last_two)].ravel()
        parts = self._work(at)
        if len(parts) == 1 or not seconds.any():
            return None
        unit = parts.max(1)  # numbers of one size
        found, _ = nnls(np.column_stack([np.ones(len(seconds)), (parts / unit[:, None]).T]), seconds / seconds.max())
        return np.append(found[0], found[1:] / unit)

    @staticmethod
    def _values(curve: Curve, indices: Sequence[range]) -> list[list[float]]:
        return [[axis.values[i] for i in own] for axis, own in zip(curve.axes, indices, strict=True)]
