"""What a prediction of a served model is asked with, and what it answers."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from ...spec.errors import MoeplanError


@dataclass(frozen=True)
class Degrees:
    """How a model is spread over GPUs.

    ``tp`` ranks share each attention head group and ``dp`` copies of the attention serve different requests; experts
    are cut ``moe_tp`` ways and dealt out ``moe_ep`` ways. Both halves of a layer use the same GPUs: tp * dp ==
    moe_tp * moe_ep.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    moe_tp: int = 1
    moe_ep: int = 1

    def __post_init__(self) -> None:
        for name in ("tp", "pp", "dp", "moe_tp", "moe_ep"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise MoeplanError(f"degree {name}: {value!r} is not a whole number from 1 up")
        if self.tp * self.dp != self.moe_tp * self.moe_ep:
            raise MoeplanError(
                f"degrees: tp({self.tp}) * dp({self.dp}) != moe_tp({self.moe_tp}) * moe_ep({self.moe_ep}); "
                "attention and experts must use the same GPUs"
            )

    @property
    def gpus(self) -> int:
        return self.tp * self.dp * self.pp


@dataclass(frozen=True)
class Load:
    """A closed loop: ``concurrency`` clients, each of which sends its next request when the last is answered.

    ``isl`` and ``osl``: tokens of the longest prompt and answer. Lengths are spread evenly from ``shortest`` times
    that up to it. ``rounds``: requests of each client; the first ones all arrive at once.
    """

    isl: int
    osl: int
    concurrency: int
    shortest: float = 1.0
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, least, most in (("isl", 1, 2**24), ("osl", 2, 2**24), ("concurrency", 1, 2**20), ("rounds", 1, 1000)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
                raise MoeplanError(f"load: {name} must be a whole number from {least} to {most}, not {value!r}")
        if not 0 < self.shortest <= 1:
            raise MoeplanError(f"load: shortest must be above 0 and at most 1, not {self.shortest!r}")


@dataclass(frozen=True)
class Settings:
    """What an engine is started with, as far as it changes times. ``settings.defaults`` has those of each engine.

    ``policy``: what shares a step with decodes. ``mixed`` (vLLM): prompts, cut to what is left of ``chunk`` tokens;
    ``whole`` (TensorRT-LLM): prompts that fit into ``chunk`` tokens whole; ``prefill_first`` (SGLang): nothing, a step
    either prefills up to ``chunk`` tokens or decodes.
    """

    policy: str
    chunk: int
    kv_cache: str = "bfloat16"
    recv_interval: int = 1
    """Steps that decode between two looks at the queue of new requests; what comes to an idle queue waits them all."""
    moe: str | None = None
    """Format of the experts' table, where the engine is told another than the weights' own."""
    overlaps: bool = True
    """The next step is scheduled while one runs, so that a new request joins the one after it."""
    memory_share: float = 0.9
    """Of a GPU's memory, what weights and caches together may take."""
    frontend: float = 0.0
    """Seconds of one request outside the model: HTTP, tokens from text, text from tokens."""
    frontend_token: float = 0.0
    """The same per token of its prompt."""
    max_requests: int = 2**20
    fused: bool = True
    """All-reduces also do the residual and norm after them, and shared experts run beside routed ones."""
    graph_tokens: int = 0
    """Steps with prompts of up to so many tokens are launched from CUDA graphs."""
    calls: int = 10
    """Launches of the host per layer where they are not: operators, each with its small kernels."""


@dataclass(frozen=True)
class Step:
    """Seconds of one pass through the model, by part."""

    parts: Mapping[str, float]

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Served:
    """A prediction: means over all requests of the load."""

    ttft_s: float
    tpot_s: float
    tokens_per_s_per_gpu: float
    """Output tokens."""
    parts: Mapping[str, float]
    """Seconds of one decode step at the mean batch and context, by part."""
    origins: tuple[str, ...]
    """The tables that were used."""
    notes: tuple[str, ...] = ()
    """What was extrapolated or replaced."""
    ttft_median_s: float = 0.0
    tpot_median_s: float = 0.0
    settings: Settings | None = field(default=None)
