"""What a plan says of itself: degrees, prediction, proof, who placed its experts, what else was looked at."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from .document import Part
from .offload import Reads


class Degrees(Part):
    """Parallel degrees over ``tensor * data`` devices.

    The devices form ``data`` groups of ``tensor`` consecutive devices. A group owns whole sequences; its devices
    divide the attention heads and the tokens. ``expert`` devices together hold all experts; with fewer than all
    devices, experts are replicated.
    """

    tensor: PositiveInt = 1
    data: PositiveInt = 1
    expert: PositiveInt = 1


class LayerPrediction(Part):
    """Predicted seconds of one layer by part (mean over devices, waiting included)."""

    layer: int = Field(description="index among all layers; -1 for what stands outside the layers")
    parts: dict[str, float]


class DeviceMemory(Part):
    """Predicted bytes on one device."""

    weights: int
    gathered: int = Field(description="the shared region for gathered weights, or places for those read from a disk")
    cache: int = Field(description="keys and values")
    activations: int
    limit: int

    @property
    def total(self) -> int:
        return self.weights + self.gathered + self.cache + self.activations


class LinkTraffic(Part):
    """Predicted bytes over one ordered pair of devices in a step.

    Of more than 256 devices, pairs of hosts (within one: source and target are the same); of more than 64 hosts, pairs
    of 64 runs of consecutive hosts.
    """

    source: int
    target: int
    bytes: int


class Prediction(Part):
    """What one step will cost."""

    step_seconds: PositiveFloat
    layers: tuple[LayerPrediction, ...]
    memory: tuple[DeviceMemory, ...]
    traffic: tuple[LinkTraffic, ...]
    reads: Reads | None = Field(None, description="of offload plans under which experts rest outside memory")


class SolverRecord(Part):
    """How sure we are: over the searched space, no plan is predicted faster than ``bound``."""

    status: Literal["optimal", "feasible", "time_limit"]
    objective: float = Field(description="predicted step seconds of the chosen plan")
    bound: float = Field(description="proven lower bound on it over the space named in ``space``")
    gap: float = Field(ge=0, description="(objective - bound) / objective")
    space: str = Field(description="what was searched, as text")


class PlacementRecord(Part):
    """Who found where the experts of some ``ep`` or ``coherent`` layers are, and how sure that is.

    No placement of the kind that ``minimised`` names has an objective below ``bound`` there; both are means over the
    layers.
    """

    layers: tuple[int, ...] = Field(description="ordinals in the plan's layers")
    method: str = Field(description="name of the placement: given, linear, greedy, weighted, local, replicated")
    solver: str = Field(description="what found it, as text")
    minimised: str = Field(description="what the objective is, as text")
    objective: float
    bound: float
    gap: float = Field(ge=0, description="(objective - bound) / objective")


class Candidate(Part):
    """One searched alternative, for the table."""

    name: str
    degrees: Degrees
    strategies: dict[str, int] = Field(description="layers by strategy")
    tokens: tuple[int, ...]
    step_seconds: PositiveFloat | None = Field(description="none: does not fit")
    reason: str = ""


class RoutingSource(Part):
    """Where the routing came from."""

    kind: Literal["trace", "assumed"]
    path: str = ""
    digest: str = ""
    assumption: str = ""
    seed: int = 0


class ProbePoint(Part):
    """A measured point that this prediction rests on, to be timed again beside the steps."""

    kind: Literal["compute", "memory", "exchange"] = Field(description="what limits it")
    operator: str = Field(description="an operator, or a collective over all devices")
    at: dict[str, int] = Field(description="where on the axes of its curve")
    seconds: tuple[float, ...] = Field(description="as profiled, on each device")
