"""Which operators a model needs, and their measurement: in which order the time is spent.

First what every curve needs, those first that most of a step's time goes into, so that they reach far; then how far the
others do; then finer grids (see ``sizes``).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from math import ceil, inf, prod
from typing import NamedTuple

import torch

from ..runtime.calls import DECODE_SPARE, operator_call
from ..runtime.pools import COLD_BYTES
from ..spec.cluster import OperatorCurve
from ..spec.errors import MoeplanError
from ..spec.levels import two_levels
from ..spec.model import DTYPE_BYTES, Block, DType, Model
from ..spec.operators import (
    OPERATORS,
    Shape,
    attention_shape,
    batch_shape,
    cache_row_bytes,
    cache_shape,
    dense_shape,
    exchange_shape,
    expert_shape,
    levels_shape,
    route_shape,
    vocabulary_shape,
)
from ..spec.work import work
from ..spec.workload import Workload
from .grids import Coordinates, Grid, Growth, Point, measured, repair
from .measure import Bench, ColdTimer, Timing, measure, timer
from .sizes import COPIED, DECODE, LAST_ROWS, PREFILL, ROWS, TOKENS, expert_grid, reaching, workload_steps

TORCH_DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}

MOST_BETWEEN = 32 * 2**20  # bytes read between two calls: beyond the caches of a core
MOST_COPIES = 8  # of calls to rotate over: each has to be built

EXCHANGES = tuple(
    name
    for name in OPERATORS
    if name.startswith(("ep_", "sharded_", "gathered_", "coherent_")) and name != "coherent_cache"
)
OFFLOAD = tuple(name for name in OPERATORS if name.startswith("offload_"))  # where experts may rest outside memory
HOSTED = ("offload_host",)  # of these, where they rest in the memory of a GPU's host
LEVELS = tuple(name for name in OPERATORS if name.startswith("hierarchical_"))  # where there are two levels
SHARES = {"expert_ffn": 8.0, "attention_prefill": 4.0, "attention_decode": 3.0, "head": 1.5} | dict.fromkeys(
    (*EXCHANGES, *OFFLOAD, *LEVELS, "coherent_cache", "by_batch"), 0.25
)
"""Weights of the operators in dividing the time beyond what they need; others have 1."""
FINER = 0.3  # of the time that is left is kept for noisy points and finer grids


class Task(NamedTuple):
    """One curve to measure: an operator of a block, with the heads divided over ``tensor`` devices."""

    operator: str
    model: Model
    block: Block
    dtype: DType
    devices: int
    tensor: int = 1
    hosts: int = 1

    @property
    def shape(self) -> Shape:
        moe, dense = self.block.moe, self.block.dense
        if self.operator.startswith("attention"):
            return attention_shape(self.block, self.tensor)
        if self.operator == "coherent_cache":
            return cache_shape(self.block, self.devices)
        if self.operator in ("embed", "head"):
            return vocabulary_shape(self.model)
        if self.operator == "route":
            return route_shape(self.block)
        if self.operator in ("expert_ffn", *HOSTED):
            return expert_shape(self.block)
        if self.operator == "by_batch":
            return batch_shape(self.block, self.devices)
        if self.operator == "dense_ffn":
            if dense is not None:
                return dense_shape(self.block, dense.ffn_size, dense.gated)
            assert moe is not None
            return dense_shape(self.block, moe.shared_ffn_size, True)
        if self.operator in LEVELS:
            return levels_shape(self.block, self.devices, self.hosts)
        return exchange_shape(self.block, self.devices)

    @property
    def key(self) -> tuple[object, ...]:
        """Two tasks of one key are one curve."""
        return self.operator, self.dtype, tuple(self.shape.items())

    @property
    def grid(self) -> Grid:
        moe = self.block.moe
        if self.operator == "expert_ffn":
            assert moe is not None
            return expert_grid(moe.ffn_size, moe.num_experts)
        if self.operator in ("attention_decode", "attention_scattered"):
            return DECODE
        return {"attention_prefill": PREFILL, "head": LAST_ROWS, "dense_ffn": ROWS, "by_batch": COPIED}.get(
            self.operator, TOKENS
        )

    def grid_for(self, workloads: Sequence[Workload]) -> Grid:
        """The grid with the sizes of these workloads' steps."""
        found = [workload_steps(self.operator, step, self.block, self.devices, self.tensor) for step in workloads]
        return reaching(self.grid, list(dict.fromkeys(chain.from_iterable(found))))

    def work(self, at: Coordinates) -> float:
        """How much one call has to do."""
        return float(work(self.operator, self.shape, at).sum())

    def weight_bytes(self, at: Coordinates) -> int:
        """Bytes of weights that one call reads."""
        hidden, values = self.block.hidden_size, 0
        if self.operator.startswith("attention"):
            assert self.block.attention is not None
            values = self.block.attention.parameters(hidden) // self.tensor
        elif self.operator == "route":
            values = hidden * int(self.shape["experts"])
        elif self.operator == "expert_ffn":
            values = at["experts"] * at["ffn"] * int(self.shape["matrices"]) * hidden
        elif self.operator in ("dense_ffn", *HOSTED):
            values = int(self.shape["ffn"]) * int(self.shape["matrices"]) * hidden
        elif self.operator in ("embed", "head"):
            values = self.model.vocab_size * hidden
        return values * DTYPE_BYTES[self.dtype]

    def memory_bytes(self, at: Coordinates) -> int:
        """A generous bound on the memory of one call: weights, cache, inputs and intermediate results."""
        rows = prod(value for axis, value in at.items() if axis in ("tokens", "experts", "sequences", "length"))
        width = 4 * self.block.hidden_size
        if self.operator.startswith("attention"):
            assert self.block.attention is not None
            width += 4 * self.block.attention.cache_values() * at.get("context", 1)
        elif self.operator == "coherent_cache":
            width = 2 * DECODE_SPARE * cache_row_bytes(self.block, 1)
        elif self.operator.startswith(("ep", "hierarchical", "sharded", "coherent")):
            width *= self.devices
        elif self.operator == "head":
            width += self.model.vocab_size
        else:
            width += 4 * at.get("ffn", int(self.shape.get("ffn", 0)))
        return 2 * self.weight_bytes(at) + 2 * rows * width * DTYPE_BYTES[self.dtype]

    def between(self, at: Coordinates) -> int:
        """Bytes that a device goes through in a layer, up to MOST_BETWEEN: what its operators stand among.

        The layer's weights, and what its tokens leave behind. ``expert_ffn`` goes through experts of its own.
        """
        block, values = self.block, self.tokens(at) * activations(self.block)
        if block.attention is not None:
            values += block.attention.parameters(block.hidden_size) // self.tensor
        if block.moe is not None and self.operator != "expert_ffn":
            values += block.moe.expert_parameters(block.hidden_size) * block.moe.num_experts // self.devices
        if block.moe is not None:
            values += 3 * block.hidden_size * block.moe.shared_ffn_size
        if block.dense is not None:
            values += (3 if block.dense.gated else 2) * block.hidden_size * block.dense.ffn_size
        return min(values * DTYPE_BYTES[self.dtype], MOST_BETWEEN)

    def tokens(self, at: Coordinates) -> int:
        """Of a device whose step makes such a call."""
        rows = at.get("tokens", 1) * at.get("sequences", 1) * at.get("length", 1) * at.get("experts", 1)
        return rows // self.block.moe.top_k if self.block.moe and "experts" in at else rows

    def copies(self, at: Coordinates) -> int:
        """Calls to rotate over, each with weights of its own: as many as the model has layers, or leave all caches.

        ``expert_ffn`` and ``offload_host`` rotate over their weights by themselves; what has no weights, or is there
        once, does not rotate.
        """
        weights = self.weight_bytes(at)
        if self.operator in ("embed", "head", "expert_ffn", *HOSTED) or not weights:
            return 1
        part = "attention" if self.operator.startswith("attention") else "moe" if self.block.moe else "dense"
        layers = sum(getattr(block, part) == getattr(self.block, part) for block in self.model.layers)
        return max(1, min(layers, MOST_COPIES, ceil(COLD_BYTES / weights)))


def activations(block: Block) -> int:
    """Values per token that one layer writes or reads for the first time: attention, experts, norms, residuals."""
    hidden, values = block.hidden_size, 0
    if block.attention is not None:
        a = block.attention
        values += 4 * hidden + 2 * (a.heads + 2 * a.kv_heads) * a.head_dim  # as projected, and as attended to
    if block.moe is not None:
        matrices = 3 if block.moe.gated else 2
        values += 6 * hidden + block.moe.top_k * (matrices * block.moe.ffn_size + hidden)
    if block.dense is not None:
        values += 3 * hidden + (3 if block.dense.gated else 2) * block.dense.ffn_size
    return values


def tensor_degrees(model: Model, hosts: Sequence[str]) -> list[int]:
    """Degrees of tensor parallelism to measure: 1, 2 and a whole host, where heads divide and groups share a host."""
    world = len(hosts)
    per_host = min(hosts.count(name) for name in hosts)

    def possible(t: int) -> bool:
        within = all(len(set(hosts[i : i + t])) == 1 for i in range(0, world, t))
        attentions = [b.attention for b in model.blocks if b.attention]
        return world % t == 0 and within and all(a.heads % t == 0 and a.kv_heads % t == 0 for a in attentions)

    return [t for t in sorted({1, 2, per_host}) if possible(t)]


def tasks(
    models: Sequence[Model],
    dtypes: Sequence[DType],
    hosts: Sequence[str],
    offload: bool = False,
    hosted: bool = False,
) -> list[Task]:
    """Every distinct curve that the models need, the cheapest first: the time that these spare goes to the others.

    offload: whether experts may rest outside memory; hosted: whether they may be computed there.

    Dtypes follow one another, so that the runtime's pool of weights is filled once for each.
    """
    found: dict[tuple[object, ...], Task] = {}
    beyond = [name for name in OFFLOAD if offload and (hosted or name not in HOSTED)]
    for model, dtype in zip(models, dtypes, strict=True):
        for task in _tasks(model, dtype, hosts, beyond):
            found.setdefault(task.key, task)
    sizes = {task: task.weight_bytes(task.grid.start) for task in found.values()}
    largest = {dtype: max(size for task, size in sizes.items() if task.dtype == dtype) for dtype in set(dtypes)}
    return sorted(sizes, key=lambda task: (largest[task.dtype], task.dtype, sizes[task]))


def _tasks(model: Model, dtype: DType, hosts: Sequence[str], beyond: Sequence[str]) -> Iterator[Task]:
    world = len(hosts)
    for block in dict.fromkeys(model.layers):
        if block.attention is not None:
            for t in tensor_degrees(model, hosts):
                yield Task("attention_prefill", model, block, dtype, world, t)
                yield Task("attention_decode", model, block, dtype, world, t)
            yield Task("attention_scattered", model, block, dtype, world)
            yield Task("coherent_cache", model, block, dtype, world)
        if block.dense is not None:
            yield Task("dense_ffn", model, block, dtype, world)
        if block.moe is not None:
            if block.moe.shared_ffn_size:
                yield Task("dense_ffn", model, block, dtype, world)
            for operator in ("route", "expert_ffn", "by_batch", *EXCHANGES, *beyond):
                yield Task(operator, model, block, dtype, world)
            for operator in LEVELS if two_levels(hosts) else ():
                yield Task(operator, model, block, dtype, world, hosts=len(set(hosts)))
    if model.vocab_size:
        yield Task("embed", model, model.layers[0], dtype, world)
        yield Task("head", model, model.layers[-1], dtype, world)


def growth(task: Task, bench: Bench, workloads: Sequence[Workload] = ()) -> Growth:
    """The task's grid, ready to be measured. Raises MoeplanError where not even its first point fits into memory."""

    def call(at: Coordinates) -> Callable[[], None]:
        return operator_call(
            task.operator,
            task.model,
            task.block,
            TORCH_DTYPES[task.dtype],
            bench.device,
            devices=task.devices,
            tensor=task.tensor,
            hosts=task.hosts,
            **at,
        )

    def timed(calls: Sequence[Callable[[], None]], between: int) -> Timing:
        if bench.device.type == "cuda":
            return measure(timer(calls, bench.device, bench.clock), bench.agree, bench.pace)
        run = ColdTimer(calls, between, bench.clock)
        run(1)
        return measure(run, bench.agree, bench.pace, other=bench.agree(run.outside))

    def visit(at: Coordinates) -> Point:
        begin = time.perf_counter()
        calls = [call(at) for _ in range(task.copies(at))]
        begin += compiled(calls[0], bench.device)
        timing = timed(calls, task.between(at))
        return measured(timing, time.perf_counter() - begin, bench)

    def fits(at: Coordinates) -> bool:
        return task.memory_bytes(at) * task.copies(at) < bench.available // 2

    grid = task.grid_for(workloads)
    need = task.memory_bytes(grid.start) * task.copies(grid.start)
    if not fits(grid.start):
        raise MoeplanError(
            f"measuring {task.operator} of {task.model.name} ({task.dtype}) takes about {need >> 20} MiB on each "
            f"device, {bench.available >> 21} MiB may be used: profile with fewer ranks per host"
        )
    return Growth(grid, visit, bench.pace, fits, task.work)


def compiled(call: Callable[[], None], device: torch.device) -> float:
    """Seconds of a first call on a GPU, whose kernels are compiled and tuned then: no timing, and not those of the
    points to come. 0.0 on a processor, where nothing is called."""
    if device.type != "cuda":
        return 0.0
    begin = time.perf_counter()
    call()
    torch.cuda.synchronize(device)
    return time.perf_counter() - begin


class MeasuredOperators(NamedTuple):
    """``lacking``: sizes of workloads that were too large, as text."""

    curves: list[OperatorCurve]
    lacking: list[str]


def measure_operators(
    work: Sequence[Task],
    bench: Bench,
    left: Callable[[], float],
    show: Callable[[str], None],
    others: Sequence[Growth] = (),
    late: float = 0.0,
    workloads: Sequence[Workload] = (),
    most: float = inf,
) -> MeasuredOperators:
    """All curves: first what each one and the ``workloads`` need, but for theirs that take more than ``most`` seconds;
    then, in the seconds that are ``left`` (agreed), what comes early, and finer grids.

    In between and at the end, there up to ``late`` seconds more, the noisy points are measured again, those of
    ``others`` (the collectives') among them.
    """
    growths = [growth(task, bench, workloads) for task in work]
    order = first_those_that_matter(work)
    for i, index in enumerate(order):
        task = work[index]
        show(f"{task.model.name} {task.dtype} {task.operator}")
        growths[index].start(left() * part([work[other].operator for other in order[i:]]), most)
    show("longer prompts, more tokens")
    reach(work, growths, left)
    every = [*others, *growths]
    half = left() / 2
    repair(every, lambda: left() < half, bench.patience.wait)
    for i, (task, grid) in enumerate(zip(work, growths, strict=True)):
        show(f"{task.model.name} {task.dtype} {task.operator}, finer")
        grid.refine(left() * part([t.operator for t in work[i:]]))
    repair(every, lambda: left() < -late, bench.patience.wait)
    curves = [
        OperatorCurve(operator=task.operator, shape=task.shape, dtype=task.dtype, curve=grid.curve())
        for task, grid in zip(work, growths, strict=True)
    ]
    lacking = [
        f"{task.operator} of {task.model.name} at {step.axis} {step.value:,}"
        for task, grid in zip(work, growths, strict=True)
        for step in grid.lacking
    ]
    return MeasuredOperators(curves, lacking)


def first_those_that_matter(work: Sequence[Task]) -> list[int]:
    """Positions by weight, the largest first; dtypes stay together, as in ``work``."""
    dtypes = list(dict.fromkeys(task.dtype for task in work))
    return sorted(range(len(work)), key=lambda i: (dtypes.index(work[i].dtype), -SHARES.get(work[i].operator, 1.0)))


def reach(work: Sequence[Task], growths: Sequence[Growth], left: Callable[[], float]) -> None:
    """Take early steps while any fits into its operator's part of the time, but for ``FINER`` of what is left."""
    kept = FINER * left()
    while True:
        among = [(task.operator, grid) for task, grid in zip(work, growths, strict=True) if grid.early]
        taken = 0
        for i, (_, grid) in enumerate(among):
            taken += grid.refine((left() - kept) * part([name for name, _ in among[i:]]), early=True)
        if not taken:
            return


def part(operators: Sequence[str]) -> float:
    """Of the time for all of these the first one's."""
    weights = [SHARES.get(name, 1.0) for name in operators]
    return weights[0] / sum(weights)
