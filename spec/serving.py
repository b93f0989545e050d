"""ServingPlan: how a model is served on GPUs of measured tables: replicas, their degrees and stages, what they do."""

from typing import ClassVar, Literal

from pydantic import Field

from .cluster.kinds import MAX_CLUSTER_DEVICES
from .document import Document, Part
from .model import MAX_LAYERS
from .serving_load import ServingLoad

ENGINES = ("vllm", "sglang", "tensorrt-llm")


class ServingDegrees(Part):
    """Of one engine; ``moe_tp * moe_ep = tp * dp`` GPUs make a stage."""

    tp: int = Field(ge=1, le=MAX_CLUSTER_DEVICES, description="ranks over which one group divides attention")
    dp: int = Field(ge=1, le=MAX_CLUSTER_DEVICES, description="data-parallel groups of attention")
    moe_tp: int = Field(ge=1, le=MAX_CLUSTER_DEVICES, description="ranks over which an expert is divided")
    moe_ep: int = Field(ge=1, le=MAX_CLUSTER_DEVICES, description="groups that hold different experts")
    pp: int = Field(ge=1, le=MAX_CLUSTER_DEVICES, description="stages")


class StageMemory(Part):
    """Bytes on each GPU of a stage, and what may be used of it."""

    weights: int = Field(ge=0)
    cache: int = Field(ge=0)
    activations: int = Field(ge=0)
    overhead: int = Field(ge=0)
    limit: int = Field(ge=1)

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.overhead


class ServingStage(Part):
    """Consecutive layers on GPUs of one kind."""

    kind: str = Field(description="kind of device, as in the cluster")
    per_host: int = Field(ge=1, description="devices of this kind on its hosts")
    gpus: int = Field(ge=1, le=MAX_CLUSTER_DEVICES)
    layers: int = Field(ge=1, le=MAX_LAYERS)
    memory: StageMemory


class Served(Part):
    """What is predicted of requests."""

    ttft_s: float = Field(ge=0, description="seconds to the first output token")
    tpot_s: float = Field(ge=0, description="seconds between output tokens")
    tokens_per_s: float = Field(ge=0, description="output tokens per second")
    tokens_per_s_per_gpu: float = Field(ge=0, description="of the GPUs that it uses")


class Replicas(Part):
    """Replicas of one form. Of a prefill worker TPOT, of a decode worker TTFT is 0."""

    role: Literal["both", "prefill", "decode"] = "both"
    count: int = Field(ge=1, le=MAX_CLUSTER_DEVICES)
    degrees: ServingDegrees
    stages: tuple[ServingStage, ...] = Field(min_length=1)
    concurrency: int = Field(ge=1, description="requests in flight on each")
    share: float = Field(ge=0, le=1, description="of all requests, on all of these replicas")
    each: Served

    @property
    def gpus(self) -> int:
        """Of one replica."""
        return sum(stage.gpus for stage in self.stages)


class FrontPoint(Part):
    """One form under one number of requests in flight, that no other beats in both TPOT and tokens per GPU."""

    degrees: ServingDegrees
    kinds: tuple[str, ...] = Field(description="of the stages")
    engine: str
    concurrency: int = Field(ge=1)
    each: Served


class Baseline(Part):
    """What a simpler choice is predicted to do with the same cluster, load and limits."""

    name: str
    tokens_per_s: float = Field(ge=0)
    gpus: int = Field(ge=0)


class ServingSolver(Part):
    """How the numbers of replicas were found, and how many forms were looked at."""

    status: str
    objective: float = Field(description="tokens per second, or GPUs")
    bound: float = Field(description="no choice among the forms does better")
    forms: int = Field(ge=0)
    offers: int = Field(ge=0, description="forms under numbers of requests in flight, that fit and meet the limits")
    refused: dict[str, int] = Field({}, description="reason -> forms left out")


class ServingPlan(Document):
    """A choice of replicas for one model, cluster, load and engine, with what it is predicted to do."""

    kind: ClassVar[str] = "moeplan.serving_plan"

    model: str
    asked: str = Field("", description="what the command was given as model")
    engine: Literal["vllm", "sglang", "tensorrt-llm"]
    precision: str
    load: ServingLoad
    ttft_limit_s: float | None = Field(None, gt=0)
    tpot_limit_s: float | None = Field(None, gt=0)
    tables: str = Field("", description="which tables")
    replicas: tuple[Replicas, ...] = Field(min_length=1)
    predicted: Served = Field(description="of all; TTFT and TPOT of the slowest replicas")
    requests_per_s: float = Field(ge=0)
    gpus: int = Field(ge=1, description="used")
    gpus_there: int = Field(ge=1)
    front: tuple[FrontPoint, ...] = ()
    baselines: tuple[Baseline, ...] = ()
    solver: ServingSolver
    notes: tuple[str, ...] = ()
    digests: dict[str, str] = Field({}, description="of model and cluster")

    @classmethod
    def hint(cls) -> str:
        return "; make one with `moeplan solve --workload serve:...`"
