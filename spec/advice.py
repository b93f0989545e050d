"""Advice: whether balancing the experts of a served model pays, by how much, and how sure that is."""

from typing import ClassVar, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from .document import Document, Part
from .placement import TraceSource

Maker = Literal["eplb", "moeplan"]
MAKERS: tuple[Maker, ...] = ("eplb", "moeplan")
CONFIDENCE = 0.9
LEAST = 0.01
"""Of the time of the experts: a smaller gain is no reason to balance."""


class Interval(Part):
    """A middle value, and the ends between which it is with a probability of 90 %."""

    low: float
    middle: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval is above or below zero, else 0."""
        return (self.low > 0) - (self.high < 0)


class PhaseAdvice(Part):
    """What one placement does to prefill or decode steps, beside experts by number in one copy each.

    A gain is the share of the time that is saved; below zero the placement is slower.
    """

    phase: Literal["prefill", "decode"]
    tokens: PositiveInt = Field(description="of a step, over all devices")
    hottest_before: PositiveFloat = Field(description="pairs of the busiest device over the mean, mean over layers")
    hottest: PositiveFloat = Field(description="the same under the placement, on the part it was not fitted on")
    seconds_before: PositiveFloat = Field(description="of the experts of all layers in a step, without it")
    gain: Interval = Field(description="of the time of the mixture-of-experts layers, moving counted where asked for")
    steps: Interval = Field(description="gain of single steps: nine of ten lie between the ends")
    most: float = Field(description="gain if every device of every layer had the mean load")
    step_gain: Interval | None = Field(None, description="of the whole step, where its time is known")
    pays: bool = Field(description="the interval of the gain is above zero, and its middle worth the trouble")


class OptionAdvice(Part):
    """One placement: who made it, in how many slots, and what it costs."""

    placement: Maker
    slots: PositiveInt = Field(description="of each layer; the number of experts: no redundant ones")
    redundant: NonNegativeInt
    memory_bytes: NonNegativeInt = Field(description="of redundant experts on the device with most, all layers")
    moved_bytes: NonNegativeInt = Field(description="that all devices load to go from experts by number to it")
    move_seconds: NonNegativeFloat = Field(description="of the device that loads most, over the link")
    replan_seconds: NonNegativeFloat = Field(
        description="to go from the placement of one part of the fitted tokens to that of the next: of each re-plan"
    )
    pays_back_steps: tuple[PositiveFloat | None, ...] = Field(
        description="steps after which the first move is paid back, by phase; none: never"
    )
    phases: tuple[PhaseAdvice, ...] = Field(min_length=1)


class Advice(Document):
    """The answer to: does it pay, and with how many redundant experts."""

    kind: ClassVar[str] = "moeplan.advice"

    model: str
    device: str = Field(description="type of GPU, or the file of a measured cluster")
    engine: str
    devices: PositiveInt = Field(description="that the experts are divided over")
    kernel: str = Field(description="where the times of experts come from")
    noise: NonNegativeFloat = Field(description="of these times, as a standard deviation of logarithms")
    link_bytes_per_second: PositiveFloat
    replan_every: PositiveInt | None = Field(None, description="steps; none: the placement stays")
    options: tuple[OptionAdvice, ...] = Field(min_length=1)
    best: tuple[int | None, ...] = Field(description="by phase, the option to use; none: leave balancing off")
    phases: tuple[Literal["prefill", "decode"], ...]
    trace: TraceSource
    notes: tuple[str, ...] = ()
    seed: int = 0
