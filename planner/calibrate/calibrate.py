"""From predictions and measurements to a calibration: which belongs to which, the factors, and how good they are."""

from collections.abc import Sequence

import numpy as np

from ...spec.calibration import (
    Calibration,
    CalibrationError,
    CalibrationPoint,
    ServedLoad,
    ServedTimes,
)
from ...spec.errors import MoeplanError
from .fit import Pairs, Prior, fit, left_out, mean_error

CLOSE = 0.1  # of a load: engines' benchmarks report mean lengths, which differ a little from those that were asked for


def calibrate(
    predictions: Sequence[ServedTimes],
    measurements: Sequence[ServedTimes],
    *,
    source: str = "",
    prior: Prior | None = None,
) -> Calibration:
    """The correction of ``predictions`` by ``measurements`` of the same loads. source: names the predictions.

    Raises MoeplanError where no measurement is of a load that is predicted.
    """
    points = [point for measured in measurements if (point := _point(measured, predictions)) is not None]
    if not points:
        raise MoeplanError(_none_fits(predictions, measurements))
    pairs = Pairs.of(points)
    factors, rest = fit(pairs, prior), left_out(pairs, prior)
    return Calibration(
        compute_scale=factors.compute_scale,
        step_overhead_ms=factors.step_overhead_ms,
        prefill_scale=factors.prefill_scale,
        points=tuple(points),
        error_before=CalibrationError(tpot=mean_error(pairs.tpot), ttft=mean_error(pairs.ttft)),
        error_left_out=CalibrationError(tpot=mean_error(rest.tpot), ttft=mean_error(rest.ttft)),
        predictions=source,
        skipped=len(measurements) - len(points),
    )


def distance(a: ServedLoad, b: ServedLoad) -> float:
    """Largest difference of two loads in isl, osl or concurrency, as a share; 0: they are the same."""
    both = ((a.isl, b.isl), (a.osl, b.osl), (a.concurrency, b.concurrency))
    return float(max(abs(np.log(x / y)) for x, y in both))


def _point(measured: ServedTimes, predictions: Sequence[ServedTimes]) -> CalibrationPoint | None:
    """The measurement beside the prediction of its load; None where there is none, or no time that both have."""
    near = min(predictions, key=lambda p: distance(p, measured), default=None)
    if near is None or distance(near, measured) > CLOSE:
        return None
    both = any(None not in (getattr(near, t), getattr(measured, t)) for t in ("ttft_ms", "tpot_ms"))
    return CalibrationPoint(measured=measured, predicted=near) if both else None


def _none_fits(predictions: Sequence[ServedTimes], measurements: Sequence[ServedTimes]) -> str:
    if not predictions or not measurements:
        return f"{len(predictions)} predictions and {len(measurements)} measurements: at least one of each is needed"
    first = measurements[0]
    near = min(predictions, key=lambda p: distance(p, first))
    return (
        f"none of {len(measurements)} measurements is of a load that is predicted (within {CLOSE:.0%}, with the same "
        f"time): the first is of {ServedLoad(**_load(first))}, the nearest prediction of {ServedLoad(**_load(near))}; "
        "predict the load that was measured"
    )


def _load(times: ServedTimes) -> dict[str, int]:
    return times.model_dump(include={"isl", "osl", "concurrency"})
