"""Placement: which device holds which experts of every layer, how good that is, and how sure we are."""

from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from .cluster import MAX_DEVICES
from .document import Document, Part
from .model import MAX_EXPERTS, MAX_LAYERS

if TYPE_CHECKING:
    import pandas

MAX_CELLS = 2**26
"""Layers x experts x devices: tables of so many numbers are held (DeepSeek-V3 on 320 devices has 4.8 million)."""
Objective = Literal["latency", "locality", "balance"]
Movement = Literal["coherent", "ep"]
Shares = Literal["even", "optimal"]


class PlacementDevice(Part):
    """One device: its host, its speed beside the others, and how many experts of a layer it may hold."""

    host: str
    speed: float = Field(1.0, ge=1e-9, le=1e18)
    capacity: int = Field(ge=1, le=2**20, description="expert slots per layer")


def check_copies(slots: tuple[tuple[int, ...], ...], shares: tuple[tuple[float, ...], ...] | None) -> None:
    """Raise ``ValueError`` where a device holds an expert twice or the shares of an expert do not divide its tokens."""
    if any(len(set(experts)) != len(experts) for experts in slots):
        raise ValueError("a device holds an expert twice")
    if shares is None:
        return
    if [len(s) for s in shares] != [len(e) for e in slots]:
        raise ValueError("shares must have the form of slots")
    total: dict[int, float] = {}
    for experts, taken in zip(slots, shares, strict=True):
        for expert, share in zip(experts, taken, strict=True):
            if share < 0:
                raise ValueError(f"the share of expert {expert} is negative")
            total[expert] = total.get(expert, 0.0) + share
    for expert, share in total.items():
        if abs(share - 1) > 1e-6:
            raise ValueError(f"the shares of expert {expert} sum to {share:g}, not 1")


class PlacementLayer(Part):
    """One mixture-of-experts layer: the experts on each device, and which share of its tokens each copy takes.

    Without ``shares`` the copies of an expert take even shares.
    """

    slots: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...] | None = None

    @model_validator(mode="after")
    def _consistent(self) -> "PlacementLayer":
        check_copies(self.slots, self.shares)
        return self

    def share_matrix(self, num_experts: int) -> np.ndarray:
        """[experts, devices] fraction of each expert's tokens that each device takes; rows sum to 1."""
        matrix = np.zeros((num_experts, len(self.slots)))
        for device, experts in enumerate(self.slots):
            matrix[list(experts), device] = 1.0 if self.shares is None else self.shares[device]
        return matrix / matrix.sum(axis=1, keepdims=True)


class Score(Part):
    """One placement on one part of a trace.

    balance: the hottest device's time over the ideal (all devices equally busy), 1 is perfect.
    boundary_cross: share of (token, boundary between layers) whose top-1 experts sit apart; single copies only.
    fanout: mean number of distinct devices (hosts) that hold a token's top-k experts, per layer.
    """

    tokens: NonNegativeFloat
    balance_mean: float
    balance_max: float
    boundary_cross_device: float | None = None
    boundary_cross_host: float | None = None
    fanout_device: float | None = None
    fanout_host: float | None = None
    step_seconds: PositiveFloat | None = Field(default=None, description="predicted, where a cluster was given")


class Scores(Part):
    """The same placement on the part that it was fitted on, and on the rest."""

    fit: Score
    held_out: Score | None = None


class PlacementSolver(Part):
    """How sure we are: no placement that keeps the limits has an objective below ``bound``."""

    status: Literal["optimal", "feasible", "time_limit"]
    objective: float
    bound: float
    gap: float = Field(ge=0, description="(objective - bound) / objective")
    seconds: float = Field(ge=0, description="recorded time, the one field that differs between equal solves")
    minimised: str = Field(description="what the objective is, as text")
    found_by: str = Field(default="", description="the solver that found the placement; empty in older files")
    bounds: dict[str, float] = Field(default_factory=dict, description="every bound that was computed; the best counts")


class TraceSource(Part):
    """The routing that was used, and the part of it that was fitted (fractions of its tokens, whole sequences)."""

    path: str = ""
    digest: str = ""
    fit: tuple[float, float] = (0.0, 1.0)
    tokens: NonNegativeInt = 0
    counts_only: bool = False


class Moves(Part):
    """What changes against a previous placement: copies that a device must load because it did not hold them."""

    previous: str
    copies: NonNegativeInt
    limit: NonNegativeInt | None = None
    bytes: NonNegativeInt | None = Field(default=None, description="weights moved; none: no model was named")


class Placement(Document):
    """A decision on where the experts are."""

    kind: ClassVar[str] = "moeplan.placement"

    model: str = ""
    expert_bytes: tuple[PositiveInt, ...] | None = Field(
        default=None, description="of one expert of each layer as the model stores it, scales included; none: not known"
    )
    num_experts: int = Field(gt=0, le=MAX_EXPERTS)
    devices: tuple[PlacementDevice, ...] = Field(min_length=1, max_length=MAX_DEVICES)
    layers: tuple[PlacementLayer, ...] = Field(
        min_length=1, max_length=MAX_LAYERS, description="one per mixture-of-experts layer"
    )
    objective: Objective
    movement: Movement
    share_rule: Shares = "even"
    groups: PositiveInt = Field(default=1, description="expert groups that must each stay on one host; 1: free")
    balance_cap: PositiveFloat | None = Field(default=None, description="mean over layers that the fit keeps to")
    balance_cap_of: Literal["fit", "samples"] | None = Field(
        default=None,
        description="what keeps to it: the fitted load, or the mean over samples drawn from it",
    )
    solver: PlacementSolver
    scores: dict[str, Scores] = Field(description="of this placement, of linear and of EPLB's greedy placement")
    trace: TraceSource
    moves: Moves | None = None
    notes: tuple[str, ...] = ()
    seed: int = 0

    @model_validator(mode="after")
    def _consistent(self) -> "Placement":
        cells = len(self.layers) * self.num_experts * len(self.devices)
        if cells > MAX_CELLS:
            raise ValueError(f"layers x num_experts x devices are {cells:,}, at most {MAX_CELLS:,} are read")
        everything = set(range(self.num_experts))
        for i, layer in enumerate(self.layers):
            if len(layer.slots) != len(self.devices):
                raise ValueError(f"layers[{i}].slots: {len(layer.slots)} lists for {len(self.devices)} devices")
            held = {expert for experts in layer.slots for expert in experts}
            if held != everything:
                wrong = sorted(held ^ everything)[:5]
                raise ValueError(f"layers[{i}].slots must hold every expert 0..{self.num_experts - 1}; see {wrong}")
            for d, (experts, device) in enumerate(zip(layer.slots, self.devices, strict=True)):
                if len(experts) > device.capacity:
                    raise ValueError(f"layers[{i}].slots[{d}]: {len(experts)} experts in {device.capacity} slots")
        return self

    @property
    def equal_slots(self) -> bool:
        """Whether every device holds the same number of experts in every layer, as serving engines demand."""
        return len({len(experts) for layer in self.layers for experts in layer.slots}) == 1

    @property
    def single_copy(self) -> bool:
        """Whether no expert has a second copy."""
        return all(sum(map(len, layer.slots)) == self.num_experts for layer in self.layers)

    @property
    def hosts(self) -> np.ndarray:
        """[devices] number of each device's host, by sorted name."""
        names = sorted({device.host for device in self.devices})
        return np.array([names.index(device.host) for device in self.devices])

    def scores_frame(self) -> "pandas.DataFrame":
        """The fields of ``Score`` by placement (this, linear, eplb) and by the part scored (fit, held_out)."""
        import pandas as pd  # takes half a second, and few ask for it

        rows = {
            (name, part): score.model_dump()
            for name, both in self.scores.items()
            for part, score in (("fit", both.fit), ("held_out", both.held_out))
            if score is not None
        }
        frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(Score.model_fields)).astype(float)
        return frame.rename_axis(["placement", "scored"])

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan place`"
