"""The three factors of a calibration, by least squares with a prior toward no correction.

Over n measured points i with predictions p[i] and measurements m[i], a the compute scale, o the step overhead:

    minimise  sum_i (log(a p[i] + o) - log m[i])^2 / SPREAD^2  +  (log a)^2 / PRIOR^2  +  (o / (OVERHEAD min p))^2
    with      o >= 0

and of TTFT, with b the prefill scale, the same without overhead, which has a closed form:

    log b = sum_i log(m[i] / p[i]) / (n + SPREAD^2 / PRIOR^2)

SPREAD is how far rows of one setup (model, GPU, engine) lie from their common factor, PRIOR how far that factor is from
1, both as standard deviations of logarithms. They are rounded from 1,469 published measurements of 24 setups beside the
plain sum of measured kernel times. One point can therefore not bend everything: it is believed by
PRIOR^2 / (PRIOR^2 + SPREAD^2), which is 64 % for TPOT and 66 % for TTFT.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ...spec.calibration import CalibrationPoint


@dataclass(frozen=True)
class Prior:
    """How much is believed before anything is measured; see above. overhead: of the least predicted TPOT."""

    tpot_spread: float = 0.15
    tpot_scale: float = 0.2
    overhead: float = 0.1
    ttft_spread: float = 0.5
    ttft_scale: float = 0.7

    def times(self, factor: float) -> "Prior":
        """The same with corrections ``factor`` times as far from none."""
        return replace(
            self,
            tpot_scale=factor * self.tpot_scale,
            overhead=factor * self.overhead,
            ttft_scale=factor * self.ttft_scale,
        )


@dataclass(frozen=True)
class Factors:
    """What ``Calibration`` holds: scales, and milliseconds of overhead."""

    compute_scale: float = 1.0
    step_overhead_ms: float = 0.0
    prefill_scale: float = 1.0

    def tpot(self, predicted: np.ndarray) -> np.ndarray:
        """Corrected TPOT of predicted ones, milliseconds."""
        return self.compute_scale * predicted + self.step_overhead_ms

    def ttft(self, predicted: np.ndarray) -> np.ndarray:
        """Corrected TTFT of predicted ones, milliseconds."""
        return self.prefill_scale * predicted


@dataclass(frozen=True, eq=False)
class Pairs:
    """Predicted and measured milliseconds, [n] each; points without one of the times are left out of it."""

    tpot: tuple[np.ndarray, np.ndarray]
    ttft: tuple[np.ndarray, np.ndarray]

    @classmethod
    def of(cls, points: Sequence[CalibrationPoint]) -> "Pairs":
        both = []
        for name in ("tpot_ms", "ttft_ms"):
            found = [(getattr(p.predicted, name), getattr(p.measured, name)) for p in points]
            kept = np.array([pair for pair in found if None not in pair], float).reshape(-1, 2)
            both.append((kept[:, 0], kept[:, 1]))
        return cls(*both)


def fit(pairs: Pairs, prior: Prior | None = None) -> Factors:
    """The factors that follow from measured points; 1, 0 and 1 where there are none."""
    prior = prior or Prior()
    scale, overhead = _fit_tpot(*pairs.tpot, prior)
    return Factors(scale, overhead, _fit_ttft(*pairs.ttft, prior))


def left_out(pairs: Pairs, prior: Prior | None = None) -> Pairs:
    """[n] each time as it is corrected by what all other points give, beside the measured one; empty for n < 2."""
    prior = prior or Prior()
    found = []
    for name in ("tpot", "ttft"):
        predicted, measured = getattr(pairs, name)
        count = len(predicted)
        corrected = []
        for i in range(count if count > 1 else 0):
            rest = np.arange(count) != i
            if name == "tpot":
                scale, overhead = _fit_tpot(predicted[rest], measured[rest], prior)
                corrected.append(scale * predicted[i] + overhead)
            else:
                corrected.append(_fit_ttft(predicted[rest], measured[rest], prior) * predicted[i])
        found.append((np.array(corrected, float), measured[: len(corrected)]))
    return Pairs(*found)


def mean_error(both: tuple[np.ndarray, np.ndarray]) -> float | None:
    """Mean of |predicted / measured - 1|; None where there is no point."""
    predicted, measured = both
    return float(np.abs(predicted / measured - 1).mean()) if len(predicted) else None


def _fit_tpot(predicted: np.ndarray, measured: np.ndarray, prior: Prior) -> tuple[float, float]:
    """Compute scale and milliseconds of step overhead."""
    if not len(predicted):
        return 1.0, 0.0
    from scipy.optimize import least_squares  # takes a third of a second to load

    unit, wanted = prior.overhead * predicted.min(), np.log(measured)

    def residuals(x: np.ndarray) -> np.ndarray:
        corrected = np.log(np.exp(x[0]) * predicted + x[1] * unit)
        return np.concatenate([(corrected - wanted) / prior.tpot_spread, [x[0] / prior.tpot_scale, x[1]]])

    start = [float(np.median(wanted - np.log(predicted))), 0.1]
    found = least_squares(residuals, start, bounds=([-np.inf, 0.0], np.inf), xtol=1e-12, ftol=1e-12, gtol=1e-12).x
    return float(np.exp(found[0])), float(found[1] * unit)


def _fit_ttft(predicted: np.ndarray, measured: np.ndarray, prior: Prior) -> float:
    """Prefill scale."""
    if not len(predicted):
        return 1.0
    off = np.log(measured / predicted)
    return float(np.exp(off.sum() / (len(off) + (prior.ttft_spread / prior.ttft_scale) ** 2)))
