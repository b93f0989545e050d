"""Bytes on every GPU of an engine that serves a model, part by part.

weights      of its layers: attention divided by heads over tensor parallelism, experts over expert and tensor
             parallelism, dense and shared FFNs over tensor parallelism; router and norms whole; embedding on the first
             stage and output projection on the last, divided by rows
cache        keys and values of the requests of its data-parallel group at their longest: of grouped-query attention its
             heads' share (a head is held whole by those that share it), of latent attention all, of a window no more
             than the window's tokens; states of fixed size
activations  the largest of: what one step of ``step_tokens`` tokens holds beside the residual stream in attention, in
             the experts (inputs, both intermediates, outputs, per choice), in a dense FFN; and the logits, which are
             sampled in f32
overhead     context, communication buffers and captured graphs

Letters: L layers, S stages.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ...spec.model import DTYPE_BYTES, Attention, Block, Dense, Model
from ...spec.storage import Shape, stored_bytes

GIB = 2**30
STATE_BYTES = 4
CACHE_BLOCK = 64  # tokens in which engines hand out the cache, the largest of theirs
MXFP4_PADDING = 256  # columns to which engines pad such experts: gpt-oss-120b takes 64.4 GiB (vllm issue 33155)
# Sampling by top-k or top-p sorts: f32 logits, sorted values, their 64-bit indices and probabilities lie side by side.
SAMPLED_BYTES = 4 * 5
# What vLLM's log calls non-torch memory, on one GPU and on several (github.com/vllm-project/vllm/pull/10511).
OVERHEAD_ALONE, OVERHEAD_TOGETHER = int(1.79 * GIB), int(3.58 * GIB)


@dataclass(frozen=True)
class Division:
    """How one stage's layers are divided. tp: tensor parallelism of attention and dense parts; dp: its data-parallel
    groups; moe_tp, moe_ep: of the experts; moe_tp * moe_ep = tp * dp."""

    tp: int
    dp: int
    moe_tp: int
    moe_ep: int

    @property
    def gpus(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class Step:
    """What an engine computes at once at most: tokens of one step, sequences whose next token is sampled."""

    tokens: int
    sequences: int


@dataclass(frozen=True)
class Footprint:
    """Bytes on each GPU of one stage."""

    weights: int
    cache: int
    activations: int
    overhead: int

    @property
    def total(self) -> int:
        return self.weights + self.cache + self.activations + self.overhead

    def parts(self) -> dict[str, int]:
        return {
            "weights": self.weights,
            "cache": self.cache,
            "activations": self.activations,
            "overhead": self.overhead,
        }


class Sizes:
    """Bytes of one model; each division is looked at once."""

    def __init__(self, model: Model, cache_bytes: int = 2) -> None:
        """cache_bytes: of one value of the cache."""
        self.model, self.cache_bytes = model, cache_bytes
        self.element = DTYPE_BYTES[model.dtype]
        self._weights: dict[Division, np.ndarray] = {}
        self._cache: dict[tuple[Division, int], np.ndarray] = {}

    def layer_weights(self, division: Division) -> np.ndarray:
        """[L] bytes of each layer's weights on a GPU."""
        if division not in self._weights:
            self._weights[division] = self._by_layer(lambda block: _block_weights(block, division, self.element))
        return self._weights[division]

    def layer_cache(self, division: Division, tokens: int) -> np.ndarray:
        """[L] bytes of each layer's cache on a GPU for one request of so many tokens."""
        key = division, tokens
        if key not in self._cache:
            self._cache[key] = self._by_layer(lambda block: _block_cache(block, division, tokens, self.cache_bytes))
        return self._cache[key]

    def _by_layer(self, each: Callable[[Block], int]) -> np.ndarray:
        blocks = self.model.blocks
        return np.repeat(np.array([each(block) for block in blocks], np.int64), [block.count for block in blocks])

    def end_weights(self, division: Division, first: bool, last: bool) -> int:
        """Bytes outside the layers: embedding and others (first stage), output projection and norm (last)."""
        model, element = self.model, self.element
        hidden, rows = model.blocks[-1].hidden_size, -(-model.vocab_size // division.tp)
        found = 0
        if first:
            found += (rows * model.blocks[0].hidden_size + model.other_parameters) * element
        if last:
            found += hidden * element
            if not (model.tie_embeddings and first):
                found += stored_bytes({"head": (rows, hidden)}, model.head_storage, element)
        return found

    def activations(self, division: Division, step: Step, last: bool) -> int:
        """Bytes of buffers of one step; last: this stage samples."""
        peak = max(_block_activations(block, division, step) for block in self.model.blocks) * self.element
        return max(peak, step.sequences * self.model.vocab_size * SAMPLED_BYTES if last else 0)

    def held(self, division: Division, stages: int, step: Step) -> np.ndarray:
        """[S] bytes on a GPU of each stage beside its layers."""
        ends = [(s == 0, s == stages - 1) for s in range(stages)]
        rest = OVERHEAD_ALONE if division.gpus * stages == 1 else OVERHEAD_TOGETHER
        return np.array(
            [self.end_weights(division, *end) + self.activations(division, step, end[1]) + rest for end in ends]
        )

    def footprints(
        self, division: Division, layers: Sequence[int], requests: int, tokens: int, step: Step
    ) -> tuple[Footprint, ...]:
        """[S] bytes on a GPU of each stage. layers: [S] of each stage; requests: in flight on the whole engine, each of
        so many ``tokens`` at its end."""
        weights = self.layer_weights(division)
        cache = self.layer_cache(division, tokens) * -(-requests // division.dp)
        rest = OVERHEAD_ALONE if division.gpus * len(layers) == 1 else OVERHEAD_TOGETHER
        found, start = [], 0
        for stage, count in enumerate(layers):
            first, last = stage == 0, stage == len(layers) - 1
            mine = slice(start, start + count)
            own = int(weights[mine].sum()) + self.end_weights(division, first, last)
            buffers = self.activations(division, step, last)
            found.append(Footprint(own, int(cache[mine].sum()), buffers, rest))
            start += count
        return tuple(found)


def _block_activations(block: Block, division: Division, step: Step) -> int:
    """Values alive at once in one layer."""
    stream = 3 * block.hidden_size  # residual, normalised, output
    inner = 0
    if block.attention:
        inner = 3 * _heads(block.attention, division.tp) * block.attention.head_dim
    if block.counted:
        inner = max(inner, block.counted.widths)
    if block.dense:
        inner = max(inner, 3 * -(-block.dense.ffn_size // division.tp))
    peak = step.tokens * (stream + inner)
    if block.moe:
        ffn = -(-block.moe.ffn_size // division.moe_tp)
        # Data-parallel groups bring all their tokens, each rank of expert parallelism takes its part of the choices.
        chosen = max(step.tokens, -(-step.tokens * division.dp * block.moe.top_k // division.moe_ep))
        rows = chosen * (2 * block.hidden_size + (3 if block.moe.gated else 2) * ffn)
        peak = max(peak, step.tokens * stream + rows)
    return peak


def _heads(attention: Attention, tp: int) -> int:
    return -(-attention.heads // tp)


def _block_weights(block: Block, division: Division, element: int) -> int:
    tp = division.tp
    if block.counted:
        rest = -(-block.counted.stored_bytes(element) // tp)
    else:
        whole = block.always_on_bytes(element)
        for part in (_attention(block, element, 1), _ffns(block, element, 1)):
            whole -= part
        rest = whole + _attention(block, element, tp) + _ffns(block, element, tp)
    if block.moe is None:
        return rest
    experts = -(-block.moe.num_experts // division.moe_ep)
    ffn = -(-block.moe.ffn_size // division.moe_tp)
    if block.moe.storage and block.moe.storage.name == "mxfp4":
        ffn = -(-ffn // MXFP4_PADDING) * MXFP4_PADDING
    expert = Dense(ffn_size=ffn, gated=block.moe.gated, bias=block.moe.bias, storage=block.moe.storage)
    return rest + experts * expert.stored_bytes(block.hidden_size, element)


def _attention(block: Block, element: int, tp: int) -> int:
    """Bytes of the projections of one rank of ``tp``."""
    a = block.attention
    if a is None:
        return 0
    heads, shared = _heads(a, tp), -(-a.kv_heads // tp)
    if a.kind == "mla":
        matrices = a.matrices(block.hidden_size)
        mine: dict[str, Shape] = {}
        for name, (rows, columns) in matrices.items():
            if name in ("q", "q_b", "kv_b"):
                mine[name] = rows // a.heads * heads, columns
            elif name == "o":
                mine[name] = rows, columns // a.heads * heads
            else:  # compressions are held whole
                mine[name] = rows, columns
        return stored_bytes(mine, a.storage, element)
    part = a.model_copy(update={"heads": heads, "kv_heads": shared})
    return stored_bytes(part.matrices(block.hidden_size), a.storage, element)


def _ffns(block: Block, element: int, tp: int) -> int:
    """Bytes of the matrices of dense and shared FFNs of one rank of ``tp``."""
    found = 0
    if block.dense:
        part = block.dense.model_copy(update={"ffn_size": -(-block.dense.ffn_size // tp)})
        found += stored_bytes(part.matrices(block.hidden_size), part.storage, element)
    if block.moe and block.moe.shared_ffn_size:
        shared = block.moe.model_copy(update={"shared_ffn_size": -(-block.moe.shared_ffn_size // tp)})
        found += stored_bytes(shared.shared_matrices(block.hidden_size), shared.shared_storage, element)
    return found


def _block_cache(block: Block, division: Division, tokens: int, cache_bytes: int) -> int:
    held = -(-tokens // CACHE_BLOCK) * CACHE_BLOCK
    if block.counted:  # it does not say how its heads divide: all of it
        return block.counted.cache_values * held * cache_bytes + block.counted.state_values * STATE_BYTES
    a = block.attention
    if a is None:
        return 0
    if a.sliding_window:
        held = min(held, -(-a.sliding_window // CACHE_BLOCK) * CACHE_BLOCK)
    if a.kind == "mla":
        return a.cache_values() * held * cache_bytes
    part = a.model_copy(update={"kv_heads": -(-a.kv_heads // division.tp), "heads": -(-a.kv_heads // division.tp)})
    return part.cache_values() * held * cache_bytes
