"""Calibration: how predictions of a served model are corrected by a few measurements of the user's own.

    TPOT = compute_scale * predicted TPOT + step_overhead_ms      step_overhead_ms >= 0
    TTFT = prefill_scale * predicted TTFT

TTFT: time to first token; TPOT: time per output token after the first. Both are means over requests, in milliseconds.
"""

from typing import Annotated, ClassVar

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .document import Document, Part

MAX_POINTS = 1000
Milliseconds = Annotated[float, Field(ge=1e-6, le=1e15)]
"""Bounds so wide that no time is outside, and so narrow that shares of two stay finite."""


class ServedLoad(Part):
    """What was asked of a server: requests of ``isl`` input and ``osl`` output tokens, ``concurrency`` at a time."""

    isl: PositiveInt
    osl: PositiveInt
    concurrency: PositiveInt

    def __str__(self) -> str:
        return f"isl {self.isl}, osl {self.osl}, concurrency {self.concurrency}"


class ServedTimes(ServedLoad):
    """Its times, predicted or measured, in milliseconds; one of the two may be missing."""

    ttft_ms: Milliseconds | None = None
    tpot_ms: Milliseconds | None = None

    @model_validator(mode="after")
    def _has_times(self) -> "ServedTimes":
        if self.ttft_ms is None and self.tpot_ms is None:
            raise ValueError("neither ttft_ms nor tpot_ms is given")
        return self


class CalibrationPoint(Part):
    """One measurement, and what was predicted for it before the correction."""

    measured: ServedTimes
    predicted: ServedTimes


class CalibrationError(Part):
    """Mean of |predicted over measured, less one|. None: nothing was measured, or too few points to leave one out."""

    tpot: NonNegativeFloat | None = None
    ttft: NonNegativeFloat | None = None


class Calibration(Document):
    """The correction, what it was fitted on, and how good it is on points that it was not fitted on."""

    kind: ClassVar[str] = "moeplan.calibration"

    compute_scale: PositiveFloat = Field(1.0, description="times the predicted time per output token")
    step_overhead_ms: NonNegativeFloat = Field(0.0, description="added to it: what an engine needs between steps")
    prefill_scale: PositiveFloat = Field(1.0, description="times the predicted time to first token")
    points: tuple[CalibrationPoint, ...] = Field(min_length=1, max_length=MAX_POINTS)
    error_before: CalibrationError = Field(description="of the points, without the correction")
    error_left_out: CalibrationError = Field(
        description="of each point, corrected by what the others alone give; none where one point is all there is"
    )
    predictions: str = Field("", description="the file that was corrected, and its digest")
    skipped: NonNegativeInt = Field(0, description="measurements that no prediction is for")

    def tpot_ms(self, predicted: float) -> float:
        """Corrected milliseconds per output token."""
        return self.compute_scale * predicted + self.step_overhead_ms

    def ttft_ms(self, predicted: float) -> float:
        """Corrected milliseconds to the first token."""
        return self.prefill_scale * predicted

    def corrected(self, times: ServedTimes) -> ServedTimes:
        """The same load with both times corrected."""
        return times.model_copy(
            update={
                "tpot_ms": None if times.tpot_ms is None else self.tpot_ms(times.tpot_ms),
                "ttft_ms": None if times.ttft_ms is None else self.ttft_ms(times.ttft_ms),
            }
        )

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan calibrate`"
