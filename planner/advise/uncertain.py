"""How sure a gain is: windows of the trace that it was not fitted on, single steps, and the noise of the tables.

A gain is 1 - on / off, of times that the same batches take with and without a placement.

- Windows: the gain is computed in each of W consecutive parts of the held-out tokens; their spread, with Student's
  factor for so few, is that of its mean.
- Tables: two times that are read from different places of a curve err apart, by ``noise`` each; from the same place
  they err together, and their ratio does not. Between, the error grows with the distance, up to a factor of two.
"""

# W windows, B batches

import numpy as np

from ...spec.advice import CONFIDENCE, Interval

TAIL = (1 - CONFIDENCE) / 2


def gain_of(off: np.ndarray, on: np.ndarray, noise: float) -> Interval:
    """The mean gain and its 90 % interval; off, on: [W, B] seconds of the same batches; noise: of logarithms."""
    ratio = on.sum(axis=1) / off.sum(axis=1)  # [W]
    mean = float(on.sum() / off.sum())
    windows = len(ratio)
    spread = float(ratio.std(ddof=1) / np.sqrt(windows)) if windows > 1 else 0.0
    half = np.hypot(student(windows - 1) * spread, student(np.inf) * ratio_noise(mean, noise))
    return Interval(low=1 - mean - half, middle=1 - mean, high=1 - mean + half)


def steps_of(off: np.ndarray, on: np.ndarray) -> Interval:
    """Gains of single steps: their 5 %, 50 % and 95 % points; off, on: [W, B]."""
    low, middle, high = np.quantile(1 - on.ravel() / off.ravel(), [TAIL, 0.5, 1 - TAIL])
    return Interval(low=float(low), middle=float(middle), high=float(high))


def ratio_noise(ratio: float, noise: float) -> float:
    """Standard deviation of a ratio of two times that are read from a curve with ``noise`` (of logarithms)."""
    return float(ratio * np.sqrt(2) * noise * min(1.0, abs(np.log2(ratio))))


def student(freedom: float) -> float:
    """The factor of a 90 % interval; 0 where there is nothing to tell a spread from."""
    if freedom < 1:
        return 0.0
    from scipy.special import ndtri, stdtrit

    return float(ndtri(1 - TAIL) if np.isinf(freedom) else stdtrit(freedom, 1 - TAIL))


def scaled(interval: Interval, factor: float, less: float = 0.0) -> Interval:
    """A gain as a share of something larger, and less what is lost in any case."""
    low, middle, high = (factor * x - less for x in (interval.low, interval.middle, interval.high))
    return Interval(low=low, middle=middle, high=high)
