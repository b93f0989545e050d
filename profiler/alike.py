"""Which measured devices, pairs and groups are alike: those that a profile could not tell apart.

Two curves agree where they have the same grid and

- at nine of ten points they lie no further apart than repeated measurements of one of them did (their spread), and
- on average over all points no further than ``SYSTEMATIC``, however wide the spreads are.

Numbers without a spread agree within ``NUMBER``. ``SYSTEMATIC`` also stands in for spreads below it: no two processors
of one product are equal to the last percent. All curves of a device must agree, so that one that is slow at anything
stays what it is; where measurements were noisy, equal devices may stay apart, which costs nothing but length.
"""

from collections.abc import Sequence

import numpy as np

from ..spec.cluster.sameness import Sample

SYSTEMATIC = 0.03
NUMBER = 0.05
POINTS = 0.9  # of a curve's points must lie within their spread


def within_spread(samples: Sequence[Sample]) -> list[int]:
    """A label for each sample. All of one label agree with the one among them that is nearest to the middle of all."""
    labels = np.full(len(samples), -1)
    grids: dict[tuple, list[int]] = {}
    for i, sample in enumerate(samples):
        grids.setdefault(tuple(curve.axes for curve in sample.curves), []).append(i)
    label = 0
    for members in grids.values():
        left = np.array(members)
        table = _Table([samples[i] for i in members])
        at = np.arange(len(members))
        while len(at):
            middle = at[np.argsort(table.level[at], kind="stable")[len(at) // 2]]
            same = table.agree(middle, at)
            labels[left[at[same]]] = label
            at, label = at[~same], label + 1
    return labels.tolist()


class _Table:
    """Samples of one grid as arrays: log seconds and spreads [samples, points], and each point's curve [points]."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        curves = [sample.curves for sample in samples]
        self.seconds = _log([[value for curve in of for value in curve.median] for of in curves])
        self.spread = np.array([[value for curve in of for value in curve.spread] for of in curves])
        self.numbers = _log([sample.numbers for sample in samples])
        sizes = [len(curve.median) for curve in curves[0]]
        self.curve, self.curves = np.repeat(np.arange(len(sizes)), sizes), len(sizes)
        self.level = self.seconds.mean(1) if self.seconds.size else self.numbers.sum(1)

    def agree(self, one: int, others: np.ndarray) -> np.ndarray:
        """[others] whether they agree with ``one``; it does with itself."""
        apart = self.seconds[others] - self.seconds[one]
        allowed = np.maximum(SYSTEMATIC, np.maximum(self.spread[others], self.spread[one]))
        points = np.maximum(np.bincount(self.curve, minlength=self.curves), 1)
        within = self._by_curve(np.abs(apart) <= allowed) / points
        average = self._by_curve(apart) / points
        numbers = np.abs(self.numbers[others] - self.numbers[one]) <= NUMBER
        return (within >= POINTS).all(1) & (np.abs(average) <= SYSTEMATIC).all(1) & numbers.all(1)

    def _by_curve(self, values: np.ndarray) -> np.ndarray:
        """[samples, curves] sums over each curve's points."""
        sums = np.zeros((len(values), self.curves))
        np.add.at(sums.T, self.curve, values.T)
        return sums


def _log(values: Sequence[Sequence[float]]) -> np.ndarray:
    """Logarithms, in which differences are relative; of nothing measured a very small number."""
    return np.log(np.maximum(np.array(values, float).reshape(len(values), -1), 1e-12))
