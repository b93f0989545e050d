"""Report: what a plan did cost, part by part, against its prediction."""

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from .document import Document, Part
from .load import Load
from .offload import Reads
from .selection import Selection

if TYPE_CHECKING:
    import pandas


class Comparison(Part):
    """One quantity, predicted and measured, in seconds."""

    predicted: float
    measured: float = Field(description="median over the repetitions")
    spread: float = Field(description="(90th - 10th percentile) / median")

    @property
    def error(self) -> float:
        """(predicted - measured) / measured."""
        return (self.predicted - self.measured) / self.measured if self.measured else 0.0


class PartComparison(Comparison):
    """One part of one layer (mean over devices, waiting included)."""

    layer: int = Field(description="index among all layers; -1 outside the layers")
    part: str


class NumericalCheck(Part):
    """The plan's output beside the plain single-process reference."""

    relative_error: float = Field(description="max |output - reference| / max |reference|")
    tolerance: float
    layers: int = Field(description="layers that were compared")
    tokens: int
    passed: bool


class WeightsCheck(Part):
    """A checkpoint's weights, read a second time by other code than the run's and its reference's."""

    stored: str = Field(description="the stored dtype, or the quantisation scheme")
    values: int = Field(description="weights computed again from the bytes of the files, one at a time")
    differing: int = Field(description="of these, how many the run reads otherwise")
    transformers: str = Field("", description="version of Transformers; empty where it is not installed")
    layers: int = Field(0, description="layers whose logits were compared with Transformers' own loading; 0: none")
    tokens: int = Field(0, description="tokens of that comparison")
    relative_error: float | None = Field(None, description="max |logits - Transformers'| / max |Transformers'|")
    tolerance: float
    reason: str = Field("", description="why there was no comparison with Transformers")
    passed: bool


class ProbeComparison(Part):
    """One profiled point timed again beside the steps: seconds of the slowest device."""

    kind: Literal["compute", "memory", "exchange"]
    operator: str
    at: dict[str, int]
    profiled: float
    measured: float

    @property
    def factor(self) -> float:
        """How many times slower than when it was profiled."""
        return self.measured / self.profiled if self.profiled else 1.0


class Machine(Part):
    """How the machine was during the steps, beside how it was when it was profiled."""

    load: Load = Field(description="what others took of the processors during the steps")
    profile_load: Load | None = Field(None, description="and during the profile")
    probes: tuple[ProbeComparison, ...] = ()
    rescaled: Comparison | None = Field(None, description="the step, its prediction multiplied by what the probes say")


class Lap(Part):
    """What a device did from ``begin`` to ``end``, in seconds from the step's begin; waiting counts in what waits."""

    device: int
    layer: int = Field(description="index among all layers; -1 for what stands outside the layers")
    part: str
    begin: float = Field(ge=0)
    end: float = Field(ge=0)


class ExpertsUsed(Part):
    """Distinct experts of one layer in a step, means over the compared steps."""

    layer: int = Field(description="index among all layers")
    experts: int = Field(description="how many the layer has")
    before: float
    after: float


class SelectionReport(Part):
    """Decoding steps with a batch-aware selection of experts beside steps without, and how far the output moved.

    Both kinds of steps ran in turn. Divergence is the mean over ``tokens`` distributions of the next token.
    """

    selection: Selection
    budget: float = Field(ge=0, description="largest divergence that passes, in nats")
    divergence: float = Field(description="mean Kullback-Leibler divergence from the exact distribution, in nats")
    changed: float = Field(ge=0, le=1, description="part of the distributions whose likeliest token is another one")
    tokens: int = Field(description="distributions that were compared")
    text: str = Field("", description="what the model read; empty: random tokens after a random context")
    perplexity: tuple[float, float] | None = Field(None, description="of the text, exact and selected")
    layers: tuple[ExpertsUsed, ...]
    exact_seconds: float = Field(description="median step without selection")
    selected_seconds: float = Field(description="median step with it")
    speedup: float = Field(description="median over pairs of steps of exact / selected")
    speedup_low: float = Field(description="10th percentile of the same")
    speedup_high: float = Field(description="90th percentile")
    check: NumericalCheck | None = Field(
        description="the selected step beside a reference that selects by the same rule"
    )
    passed: bool


class Report(Document):
    """Predicted, measured, error."""

    kind: ClassVar[str] = "moeplan.report"

    plan: str = Field(description="digest of the plan")
    model: str
    workload: str
    step: Comparison
    repetitions: int
    parts: tuple[PartComparison, ...]
    memory: tuple[int, ...] = Field(description="measured peak bytes of each device")
    check: NumericalCheck | None
    weights: WeightsCheck | None = Field(None, description="None for random weights")
    tolerance: float
    passed: bool
    notes: tuple[str, ...] = ()
    environment: dict[str, str]
    machine: Machine | None = None
    reads: Reads | None = Field(None, description="of offload plans: experts, means over the steps")
    selection: SelectionReport | None = Field(None, description="where a selection was asked for")
    timeline: tuple[Lap, ...] = Field((), description="the step of median duration, where it was asked for")

    def parts_frame(self) -> "pandas.DataFrame":
        """One row per layer (-1 outside the layers) and part: predicted, measured and spread in seconds, error."""
        import pandas as pd  # takes half a second, and few ask for it

        columns = ["layer", "part", "predicted", "measured", "spread", "error"]
        return pd.DataFrame([row.model_dump() | {"error": row.error} for row in self.parts], columns=columns)
