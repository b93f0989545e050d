"""Which sizes an operator is measured at, in what order, and which a workload adds.

Axis values are ordered by what a prediction gains from them (see ``grids``). What is needed spans an axis with few
sizes, as far as steps usually reach or else as there is time: between sizes a reading is a straight line, beyond them
it is a guess, and below the first it is that value. What moves tokens is a line anyway: two sizes have to do, because
there are many such operators.
"""

from collections.abc import Iterator, Sequence
from math import ceil

from ..spec.model import Block
from ..spec.workload import Workload
from .grids import Grid, Step, steps

TOKENS = Grid({"tokens": 1}, steps("tokens", 2048, 64, 512, 16, 256, 128, 4, 1024, 32, 4096), needed=1)
ROWS = Grid(
    {"tokens": 1},
    steps("tokens", 64, 512, 2048, 16, 256, 128, 4, 1024, 32),
    needed=1,
    early=2,
)
LAST_ROWS = Grid({"tokens": 1}, steps("tokens", 64, 16, 256, 4, 512, 128, 1024, 32), needed=1)
COPIED = Grid({"copied": 1}, steps("copied", 32, 8, 128), needed=1)
PREFILL = Grid(
    {"sequences": 1, "length": 32},
    (
        *steps("sequences", 4),
        *steps("length", 128, 512, 2048),
        *steps("sequences", 8),
        *steps("length", 256, 1024),
        *steps("sequences", 16, 2),
        *steps("length", 64, 4096),
    ),
    needed=2,
    early=3,
)
DECODE = Grid(
    {"sequences": 1, "context": 1},
    (
        *steps("sequences", 8),
        *steps("context", 2048),
        *steps("sequences", 64),
        *steps("context", 128),
        *steps("sequences", 16, 4, 32),
        *steps("context", 512, 1024, 4096),
        *steps("sequences", 2),
    ),
    needed=2,
    early=1,
)
MORE = 2  # times an even share of a step that one device may have, where devices differ
HOTTER = 4  # times the mean expert's rows that a hot expert may have


def expert_grid(ffn_size: int, num_experts: int) -> Grid:
    """Fractions of the FFN's columns x active experts x tokens for each.

    ``expert_ffn`` is linear in its active experts by construction, so a few values are enough there.
    """
    ffn = [max(1, ffn_size * eighths // 8) for eighths in (1, 4, 2, 6)]
    experts = [min(4, num_experts), min(16, num_experts), min(8, num_experts)]
    return Grid(
        {"ffn": ffn_size, "experts": 1, "tokens": 1},
        (
            *steps("tokens", 16, 128),
            *steps("experts", experts[0]),
            *steps("ffn", ffn[0]),
            *steps("tokens", 1024),
            *steps("tokens", 256, 64, 4),
            *steps("ffn", ffn[1]),
            *steps("experts", experts[1]),
            *steps("tokens", 32, 8, 512),
            *steps("ffn", *ffn[2:]),
            *steps("tokens", 2),
            *steps("experts", experts[2]),
            *steps("tokens", 2048),
        ),
        needed=4,
        linear=("experts",),
        early=1,
    )


def reaching(grid: Grid, more: Sequence[Step]) -> Grid:
    """The grid with these sizes, which are needed; those below its first values become the first."""
    start = {axis: min([value, *(s.value for s in more if s.axis == axis)]) for axis, value in grid.start.items()}
    first = [Step(axis, value) for axis, value in grid.start.items() if value > start[axis]]
    needed = (*first, *grid.steps[: grid.needed], *more)
    return grid._replace(
        start=start, steps=(*needed, *grid.steps[grid.needed :]), needed=len(needed), asked=tuple(more)
    )


def workload_steps(operator: str, workload: Workload, block: Block, devices: int, tensor: int = 1) -> list[Step]:
    """The sizes at which a step of this workload calls an operator, up to where devices and experts differ much:
    ``MORE`` times an even share, ``HOTTER`` times the mean expert's rows."""
    return list(dict.fromkeys(_workload_steps(operator, workload, block, devices, tensor)))


def _workload_steps(operator: str, workload: Workload, block: Block, devices: int, tensor: int) -> Iterator[Step]:
    groups, tokens = max(1, devices // tensor), workload.tokens
    share = ceil(workload.sequences / groups)
    sequences = min(MORE * share, workload.sequences)
    if operator.startswith(("attention", "mixer", "frame")):
        if operator.endswith("_prefill") == (workload.phase == "prefill"):
            axis, value = ("length", workload.length) if workload.phase == "prefill" else ("context", workload.context)
            yield Step(axis, max(value, 1))
            yield from steps("sequences", share, sequences)
    elif operator == "head":
        yield Step("tokens", sequences)
    elif operator in ("embed", "route", "dense_ffn") or operator.endswith("_pack"):
        yield Step("tokens", sequences * workload.length)
    elif operator in ("sharded_unpack", "coherent_cache"):  # all devices' tokens
        yield Step("tokens", tokens)
    elif operator == "expert_ffn" and block.moe is not None:
        mean = ceil(tokens * block.moe.top_k / block.moe.router_outputs)
        yield from steps("tokens", mean, min(HOTTER * mean, tokens))
    elif operator != "by_batch" and block.moe is not None:  # tokens that come from elsewhere
        yield Step("tokens", min(tokens, MORE * ceil(tokens * min(block.moe.top_k, devices) / devices)))


def message_bytes(workload: Workload, devices: int, row_bytes: int) -> int:
    """The largest message that a device sends another in a step of this workload: all its tokens."""
    share = ceil(workload.sequences / devices)
    return min(MORE * share, workload.sequences) * workload.length * row_bytes
