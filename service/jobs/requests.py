"""What can be asked, with the names of the library's arguments: documents by digest, models also by catalogue name.

No path and no URL is taken: what a job reads was sent to the service before.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ...spec.cluster import MAX_DEVICES
from ...spec.errors import MoeplanError
from ...spec.model import DType
from ...spec.placement import Movement, Objective, Shares

Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$", description="SHA-256 of a document that was sent before")]
ModelName = Annotated[
    str, Field(min_length=1, max_length=200, description="catalogue name, or digest of a model that was sent before")
]
Text = Annotated[str, Field(max_length=200)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
MAX_TIME = 3600.0
TimeLimit = Annotated[float, Field(ge=1, le=MAX_TIME, description="ceiling in seconds")]
Slots = Annotated[int, Field(ge=1, le=2**16)]
Whole = Annotated[int, Field(ge=1, le=2**62)]
_DIGEST = re.compile("[0-9a-f]{64}")
_TRACE, _CLUSTER, _PLACEMENT = "3f" * 32, "9c" * 32, "51" * 32  # of examples


class Asked(BaseModel):
    """A question."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def documents(self) -> dict[str, str]:
        """Digest of every document that it names, by field."""
        return {
            name: value
            for name in DOCUMENTS
            if isinstance(value := getattr(self, name, None), str) and (name != "model" or is_digest(value))
        }


class PlaceRequest(Asked):
    """`moeplan place`: from recorded routing to an expert placement."""

    kind: Literal["place"] = "place"
    trace: Digest
    devices: Annotated[int, Field(ge=1, le=MAX_DEVICES)] | None = None
    hosts: Annotated[int, Field(ge=1, le=MAX_DEVICES)] | None = None
    slots: Slots | None = None
    slots_per_device: Annotated[list[Slots], Field(min_length=1, max_length=MAX_DEVICES)] | None = None
    equal_slots: bool = False
    cluster: Digest | None = None
    model: ModelName | None = None
    workload: Text | None = None
    dtype: DType | None = None
    fit: tuple[float, float] = (0.0, 1.0)
    objective: Objective = "latency"
    movement: Movement = "coherent"
    shares: Shares = "even"
    groups: Annotated[int, Field(ge=1, le=2**16)] = 1
    balance_cap: Annotated[float, Field(gt=0)] | None = None
    previous: Digest | None = None
    max_moves: Annotated[int, Field(ge=0, le=2**62)] | None = None
    steps: Whole | None = None
    seed: Seed = 0
    time_limit: TimeLimit = 20.0

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"kind": "place", "trace": _TRACE, "devices": 8, "hosts": 2}]}
    )


class SolveRequest(Asked):
    """`moeplan solve`: how a model should run on a cluster."""

    kind: Literal["solve"] = "solve"
    model: ModelName
    cluster: Digest
    workload: Text = "decode:16@512"
    trace: Digest | None = None
    strategy: Text | None = None
    placement: Digest | None = None
    even: bool = False
    by_batch: bool = False
    dtype: DType | None = None
    memory_bytes: Whole | None = None
    seed: Seed = 0
    time_limit: TimeLimit = 60.0

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"kind": "solve", "model": "mixtral", "cluster": _CLUSTER, "workload": "prefill:2048"}]
        }
    )


class ExplainRequest(Asked):
    """`moeplan explain`: why a placement is what it is. Without a trace the one that it was fitted on is looked for."""

    kind: Literal["explain"] = "explain"
    placement: Digest
    trace: Digest | None = None
    seed: Seed = 0

    model_config = ConfigDict(json_schema_extra={"examples": [{"kind": "explain", "placement": _PLACEMENT}]})


class ExportRequest(Asked):
    """`moeplan export`: a placement as an engine's files."""

    kind: Literal["export"] = "export"
    placement: Digest
    to: Text
    model: ModelName
    trace: Digest | None = None
    paths: Annotated[
        dict[Text, Annotated[str, Field(max_length=4096)]],
        Field(max_length=16, description="at which the engine will find its files, by name; nothing is read there"),
    ] = {}

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"kind": "export", "placement": _PLACEMENT, "to": "sglang", "model": "deepseek-v3"}]
        }
    )


Request = Annotated[PlaceRequest | SolveRequest | ExplainRequest | ExportRequest, Field(discriminator="kind")]
DOCUMENTS = {name: name for name in ("trace", "cluster", "placement", "model")} | {"previous": "placement"}
"""Fields that name documents, and what they must be."""
RESULTS = {"place": "placement", "solve": "plan", "explain": "explanation", "export": "export"}
"""Kind of document of the answer."""
KINDS = tuple(RESULTS)


def is_digest(text: str) -> bool:
    return _DIGEST.fullmatch(text) is not None


def check_model(name: str) -> None:
    """A name must be one of the catalogue: a path would be one of the server. Raises MoeplanError with the nearest."""
    from difflib import get_close_matches

    from ...spec.catalogue import catalogue
    from ...spec.document import show

    known = name.strip().lower()
    if is_digest(name) or known in catalogue():
        return
    near = get_close_matches(known, catalogue(), n=3, cutoff=0.5)
    nearest = f"nearest: {', '.join(near)}; " if near else ""
    raise MoeplanError(f"model {show(name)}: not in the catalogue; {nearest}send its config.json to /v1/models first")


def time_limit_of(request: dict[str, Any]) -> float:
    """Seconds that a question may take by itself."""
    return float(request.get("time_limit", MAX_TIME / 6))
