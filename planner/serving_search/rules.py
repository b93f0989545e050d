"""What an engine accepts: hard constraints on degrees, each with its reason.

Terms as the engines have them: tp, ranks over which one group divides attention; dp, such groups (attention data
parallelism); the experts of a layer lie over all tp * dp ranks of a stage, as moe_ep groups of experts that are each
divided by moe_tp; pp, stages of the pipeline. Versions are those of ``planner.export``; what newer ones allow is left
out until it is read in their sources.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from ...spec.model import Model
from ..export.degrees import fits
from .footprint import Division


class Shape(NamedTuple):
    """Degrees of one engine: the division of every stage, and how many stages."""

    division: Division
    pp: int


@dataclass(frozen=True)
class Rule:
    """``holds(model, shape)``; ``reason``: why, as text for whoever asks what was left out."""

    reason: str
    holds: Callable[[Model, Shape], bool]


def _heads(model: Model, s: Shape) -> bool:
    return fits(model, s.division.tp, matrices=False)


def _matrices(model: Model, s: Shape) -> bool:
    return fits(model, s.division.tp, matrices=True)


def _experts(model: Model, s: Shape) -> bool:
    return all(b.moe.num_experts % s.division.moe_ep == 0 for b in model.blocks if b.moe)


def _expert_columns(model: Model, s: Shape) -> bool:
    """Scales are of blocks of columns, and a rank holds whole blocks."""
    for block in model.blocks:
        if block.moe is None:
            continue
        widths = [per.columns or 1 for per in block.moe.storage.beside] if block.moe.storage else []
        rows = [per.rows or 1 for per in block.moe.storage.beside] if block.moe.storage else []
        unit = max([1, *(w for w in (*widths, *rows) if w <= block.moe.ffn_size)])
        if s.division.moe_tp > 1 and block.moe.ffn_size % (s.division.moe_tp * unit):
            return False
    return True


def _layers(model: Model, s: Shape) -> bool:
    return s.pp <= len(model.layers)


def _either(model: Model, s: Shape) -> bool:
    return s.division.moe_tp == 1 or s.division.moe_ep == 1


def _one_group(model: Model, s: Shape) -> bool:
    return s.division.dp == 1 or s.pp == 1


def _dp_with_experts(model: Model, s: Shape) -> bool:
    return s.division.dp == 1 or s.division.moe_tp == 1


def _all_or_none(model: Model, s: Shape) -> bool:
    return s.division.dp == 1 or s.division.tp == 1


COMMON = (
    Rule("tp does not divide the heads, or neither divides nor is divided by the key-value heads", _heads),
    Rule("moe_ep does not divide the experts", _experts),
    Rule("moe_tp does not divide an expert's columns into whole blocks of its weight format", _expert_columns),
    Rule("more stages than layers", _layers),
    Rule("attention data parallelism is planned without pipeline stages only", _one_group),
)
RULES: dict[str, tuple[Rule, ...]] = {
    "vllm": (
        *COMMON,
        Rule("vLLM divides dense and shared FFNs and the vocabulary by tp too", _matrices),
        Rule("vLLM runs experts whole (--enable-expert-parallel) or all divided, nothing between", _either),
        Rule("with data parallelism vLLM is planned with expert parallelism only", _dp_with_experts),
    ),
    "sglang": (
        *COMMON,
        Rule("with attention data parallelism SGLang is planned with whole experts only", _dp_with_experts),
    ),
    "tensorrt-llm": (
        *COMMON,
        Rule("TensorRT-LLM's attention data parallelism has one group per rank, or none", _all_or_none),
        Rule("with attention data parallelism TensorRT-LLM is planned with whole experts only", _dp_with_experts),
    ),
}
"""Per engine; what is planned narrower than the engine allows says so."""


def broken(engine: str, model: Model, shape: Shape) -> str | None:
    """The reason of the first rule that a shape breaks; None where the engine takes it."""
    return next((rule.reason for rule in RULES[engine] if not rule.holds(model, shape)), None)


def shapes(sizes: tuple[int, ...], most_stages: int) -> Iterator[Shape]:
    """All degrees of engines whose stages have so many GPUs, before any rule. sizes: of one stage, rising."""
    for size in sizes:
        for tp in (t for t in sizes if size % t == 0):
            for moe_ep in (e for e in sizes if size % e == 0):
                for pp in (p for p in range(1, most_stages + 1) if p & (p - 1) == 0):
                    yield Shape(Division(tp, size // tp, size // moe_ep, moe_ep), pp)
