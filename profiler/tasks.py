"""Which curves a model needs, and what one call of each takes: sizes, memory, bytes that it reads."""

from collections.abc import Iterator, Sequence
from itertools import chain
from math import ceil, prod
from typing import NamedTuple

from ..runtime.calls import DECODE_SPARE
from ..runtime.pools import COLD_BYTES
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
    frame_shape,
    levels_shape,
    mixer_shape,
    route_shape,
    vocabulary_shape,
)
from ..spec.work import work
from ..spec.workload import Workload
from .grids import Coordinates, Grid
from .sizes import COPIED, DECODE, LAST_ROWS, PREFILL, ROWS, TOKENS, expert_grid, reaching, workload_steps

MOST_BETWEEN = 32 * 2**20  # bytes read between two calls: beyond the caches of a core
MOST_COPIES = 8  # of calls to rotate over: each has to be built

EXCHANGES = tuple(
    name
    for name in OPERATORS
    if name.startswith(("ep_", "sharded_", "gathered_", "coherent_")) and name != "coherent_cache"
)
BY_TRANSFORMERS = ("expert_ffn", "by_batch", *(name for name in EXCHANGES if not name.startswith("coherent_")))
"""Of layers with experts that Transformers computes but for these."""
OFFLOAD = tuple(name for name in OPERATORS if name.startswith("offload_"))  # where experts may rest outside memory
HOSTED = ("offload_host",)  # of these, where they rest in the memory of a GPU's host
LEVELS = tuple(name for name in OPERATORS if name.startswith("hierarchical_"))  # where there are two levels


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
        if self.operator.startswith("mixer"):
            return mixer_shape(self.block)
        if self.operator.startswith("frame"):
            return frame_shape(self.model)
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
        if self.operator in ("attention_decode", "attention_scattered", "mixer_decode", "frame_decode"):
            return DECODE
        prefill = dict.fromkeys(("attention_prefill", "mixer_prefill", "frame_prefill"), PREFILL)
        return (prefill | {"head": LAST_ROWS, "dense_ffn": ROWS, "by_batch": COPIED}).get(self.operator, TOKENS)

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
        elif self.operator.startswith("mixer"):
            assert self.block.counted is not None
            values = self.block.counted.parameters
        elif self.operator == "route":
            values = hidden * int(self.shape["experts"])
        elif self.operator == "expert_ffn":
            values = at["experts"] * at["ffn"] * int(self.shape["matrices"]) * hidden
        elif self.operator in ("dense_ffn", *HOSTED):
            values = int(self.shape["ffn"]) * int(self.shape["matrices"]) * hidden
        elif self.operator in ("embed", "head", "frame_prefill", "frame_decode"):
            values = self.model.vocab_size * hidden
        return values * DTYPE_BYTES[self.dtype]

    def memory_bytes(self, at: Coordinates) -> int:
        """A generous bound on the memory of one call: weights, cache, inputs and intermediate results."""
        rows = prod(value for axis, value in at.items() if axis in ("tokens", "experts", "sequences", "length"))
        width = 4 * self.block.hidden_size
        if self.operator.startswith("attention"):
            assert self.block.attention is not None
            width += 4 * self.block.attention.cache_values() * at.get("context", 1)
        elif self.operator.startswith("mixer"):
            assert self.block.counted is not None
            width += 4 * self.block.counted.held_values * at.get("context", 1) + self.block.counted.widths
            # Attention without a fused kernel has a score for every token before, and a head of at least 64 values.
            width += at.get("length", 0) * width // 64
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
        values += block.counted.parameters if block.counted else 0
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
        if self.operator in ("embed", "head", "frame_prefill", "frame_decode", "expert_ffn", *HOSTED) or not weights:
            return 1
        part = "moe" if self.block.moe else "dense"
        if self.operator.startswith(("attention", "mixer")):
            part = "counted" if self.block.counted else "attention"
        layers = sum(getattr(block, part) == getattr(self.block, part) for block in self.model.layers)
        return max(1, min(layers, MOST_COPIES, ceil(COLD_BYTES / weights)))


def activations(block: Block) -> int:
    """Values per token that one layer writes or reads for the first time: attention, experts, norms, residuals."""
    hidden, values = block.hidden_size, block.counted.widths if block.counted else 0
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
        if t > 1 and any(block.counted for block in model.blocks):
            return False  # Transformers' modules are not divided
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
        if block.counted is not None:
            for operator in ("mixer_prefill", "mixer_decode"):
                yield Task(operator, model, block, dtype, world)
        if block.dense is not None:
            yield Task("dense_ffn", model, block, dtype, world)
        if block.moe is not None:
            if block.moe.shared_ffn_size:
                yield Task("dense_ffn", model, block, dtype, world)
            usual = ("route", "expert_ffn", "by_batch", *EXCHANGES, *beyond)
            for operator in BY_TRANSFORMERS if block.counted else usual:
                yield Task(operator, model, block, dtype, world)
            for operator in LEVELS if two_levels(hosts) else ():
                yield Task(operator, model, block, dtype, world, hosts=len(set(hosts)))
    if model.family_config is not None:
        for operator in ("frame_prefill", "frame_decode"):
            yield Task(operator, model, model.layers[0], dtype, world)
    elif model.vocab_size:
        yield Task("embed", model, model.layers[0], dtype, world)
    if model.vocab_size:
        yield Task("head", model, model.layers[-1], dtype, world)
