"""Random weights that do not depend on how devices divide them.

Every tensor (for experts: every expert's tensor) has a stream of its own, seeded by (seed, layer, name, number). A
device that holds some experts, FFN columns or heads draws whole tensors and keeps its part, so it holds the very values
that a single process holding the full model has. Values are odd integers in -255..255 times a power of two: exact in
bf16, f16 and f32 alike, so runs in different types have the same weights.
"""

import math
import zlib
from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from ..spec import Model, MoeplanError
from .weights import AttentionWeights, DenseWeights, LayerWeights, Range, RouterWeights, check_supported, kv_range

_SPREAD = math.sqrt((256**2 - 1) / 3)  # standard deviation of odd integers drawn evenly from -255..255
TEMPERATURE = 0.125  # of cosine gates: exact in every type, and cosines become logits of several nats
BIAS = 100  # the fan-in that gives biases of about a tenth
_OUTSIDE = 2**32 - 1  # the "layer" of embedding, final norm and head


def random_tensor(out: Tensor, seed: int, layer: int, name: str, number: int = 0, *, fan_in: int) -> Tensor:
    """Fill ``out`` (any shape and device) in place with values of standard deviation about 1/sqrt(fan_in)."""
    return _scale(out, _draw_bytes(out.shape, seed, layer, name, number), fan_in)


def _draw_bytes(shape: Sequence[int], seed: int, layer: int, name: str, number: int) -> Tensor:
    """A whole tensor's integers -128..127, int8."""
    count = math.prod(shape)
    stream = np.random.SFC64([seed, layer, zlib.crc32(name.encode()), number])
    return torch.from_numpy(stream.random_raw(-(-count // 8)).view(np.int8)[:count]).view(*shape)


def _scale(out: Tensor, drawn: Tensor, fan_in: int) -> Tensor:
    """Integers k to (2 k + 1) * unit; every step is exact in the target type."""
    unit = 2.0 ** round(math.log2(1 / (_SPREAD * math.sqrt(fan_in))))
    return out.copy_(drawn).mul_(2 * unit).add_(unit)


class RandomWeights:
    """A WeightSource of random values.

    With ``stored_layers`` S below the number of layers, layer i is layer i % S: the same values and, while the
    LayerWeights of that layer is alive and the same part is asked for, the same storage.
    Raises MoeplanError where layers that would share storage differ in shape.
    """

    def __init__(
        self,
        model: Model,
        dtype: torch.dtype,
        seed: int = 0,
        device: torch.device | str = "cpu",
        stored_layers: int | None = None,
    ) -> None:
        check_supported(model)
        self.model, self.dtype, self.seed, self.device = model, dtype, seed, torch.device(device)
        self.stored_layers = stored_layers or len(model.layers)
        layers = [block.dequantised() for block in model.layers]
        for i, block in enumerate(layers):
            if block != layers[i % self.stored_layers]:
                raise MoeplanError(
                    f"stored_layers: {self.stored_layers} makes layer {i} share storage with layer "
                    f"{i % self.stored_layers}, which has another shape"
                )
        self._alive: WeakValueDictionary[tuple, LayerWeights] = WeakValueDictionary()

    def _draw(self, layer: int, name: str, shape: Sequence[int], fan_in: int, number: int = 0) -> Tensor:
        out = torch.empty(tuple(shape), dtype=self.dtype, device=self.device)
        return random_tensor(out, self.seed, layer, name, number, fan_in=fan_in)

    def _norm(self, layer: int, name: str, size: int) -> Tensor:
        # Around one, so that a misplaced norm weight changes the result.
        return self._draw(layer, name, (size,), fan_in=64).add_(1)

    def layer(
        self,
        index: int,
        *,
        experts: Sequence[int] | None = None,
        columns: Range | None = None,
        heads: Range | None = None,
    ) -> LayerWeights:
        stored = index % self.stored_layers
        key = (stored, None if experts is None else tuple(experts), columns, heads)
        layer = self._alive.get(key)
        if layer is None:
            layer = self._alive[key] = self._make(stored, experts, columns, heads)
        return layer

    def _make(self, i: int, experts: Sequence[int] | None, columns: Range | None, heads: Range | None) -> LayerWeights:
        moe = self.model.layers[i].moe
        gate_up = down = None
        if moe is not None:
            chosen = range(moe.num_experts) if experts is None else experts
            gate_up, down = self.experts(i, chosen, columns or (0, moe.ffn_size))
        return LayerWeights(self.attention(i, heads), self.router(i), gate_up, down, self.shared(i), self.dense(i))

    def router(self, i: int) -> RouterWeights | None:
        moe, hidden = self.model.layers[i].moe, self.model.layers[i].hidden_size
        if moe is None:
            return None
        gate, count = moe.gate, (moe.router_outputs,)
        compared = gate.rank or hidden
        weights = RouterWeights(
            self.model.norm_eps,
            self._norm(i, "ffn_norm", hidden),
            self._draw(i, "router", (*count, compared), compared),
            self._draw(i, "router_bias", count, BIAS) if gate.bias else None,
            self._draw(i, "correction_bias", count, BIAS) if gate.correction_bias else None,
        )
        if gate.score == "noisy_topk":
            weights = replace(weights, noise=self._draw(i, "router_noise", (*count, hidden), hidden))
        if gate.rank is not None:
            projection = self._draw(i, "router_projection", (gate.rank, hidden), hidden)
            temperature = torch.full((1,), TEMPERATURE, dtype=self.dtype, device=self.device)
            weights = replace(weights, projection=projection, temperature=temperature)
        return weights

    def shared(self, i: int) -> DenseWeights | None:
        moe, hidden = self.model.layers[i].moe, self.model.layers[i].hidden_size
        if moe is None or not moe.shared_ffn_size:
            return None
        weights = self._ffn(i, "shared", moe.shared_ffn_size, 2, moe.activation)
        return replace(weights, gate=self._draw(i, "shared.gate", (1, hidden), hidden)) if moe.shared_gate else weights

    def dense(self, i: int) -> DenseWeights | None:
        ffn, hidden = self.model.layers[i].dense, self.model.layers[i].hidden_size
        if ffn is None:
            return None
        weights = self._ffn(i, "dense", ffn.ffn_size, 2 if ffn.gated else 1, ffn.activation)
        return replace(weights, norm=self._norm(i, "ffn_norm", hidden))

    def _ffn(self, i: int, name: str, width: int, matrices: int, activation: str) -> DenseWeights:
        hidden = self.model.layers[i].hidden_size
        gate_up = self._draw(i, f"{name}.gate_up", (matrices, width, hidden), hidden)
        down = self._draw(i, f"{name}.down", (hidden, width), width)
        return DenseWeights(activation, self.model.norm_eps, None, gate_up, down, None)

    def experts(self, i: int, experts: Sequence[int], columns: Range) -> tuple[Tensor, Tensor]:
        """gate_up [E, M, H, D] and down [E, D, H] of these experts and columns."""
        block = self.model.layers[i]
        moe, hidden = block.moe, block.hidden_size
        assert moe is not None
        matrices, width = 2 if moe.gated else 1, columns[1] - columns[0]
        gate_up = torch.empty((len(experts), matrices, width, hidden), dtype=self.dtype, device=self.device)
        down = torch.empty((len(experts), hidden, width), dtype=self.dtype, device=self.device)
        parts = (
            ("gate_up", gate_up, (matrices, moe.ffn_size, hidden), hidden),
            ("down", down, (hidden, moe.ffn_size), moe.ffn_size),
        )
        for local, e in enumerate(experts if width else ()):
            for name, target, shape, fan_in in parts:
                drawn = _draw_bytes(shape, self.seed, i, name, e)
                _scale(target[local], drawn[:, columns[0] : columns[1]], fan_in)
        return gate_up, down

    def attention(self, i: int, heads: Range | None) -> AttentionWeights | None:
        block = self.model.layers[i]
        a, hidden = block.attention, block.hidden_size
        if a is None:
            return None
        heads = heads or (0, a.heads)
        kv = kv_range(a, heads)
        q_rows, kv_rows = (slice(first * a.head_dim, last * a.head_dim) for first, last in (heads, kv))

        def held(name: str, rows: slice, total: int, *rest: int) -> Tensor:
            return self._draw(i, name, (total * a.head_dim, *rest), rest[0] if rest else BIAS)[rows]

        parts = (("q", q_rows, a.heads), ("k", kv_rows, a.kv_heads), ("v", kv_rows, a.kv_heads))
        q_norm = k_norm = None
        if a.qk_norm != "none":
            full = a.qk_norm == "full"
            q_norm = self._norm(i, "q_norm", a.heads * a.head_dim if full else a.head_dim)[
                q_rows if full else slice(None)
            ]
            k_norm = self._norm(i, "k_norm", a.kv_heads * a.head_dim if full else a.head_dim)[
                kv_rows if full else slice(None)
            ]
        size = a.heads * a.head_dim
        return AttentionWeights(
            spec=a,
            eps=self.model.norm_eps,
            heads=heads,
            norm=self._norm(i, "attention_norm", hidden),
            qkv=torch.cat([held(n, rows, total, hidden) for n, rows, total in parts]),
            qkv_bias=torch.cat([held(f"{n}_bias", rows, total) for n, rows, total in parts]) if a.bias else None,
            q_norm=q_norm,
            k_norm=k_norm,
            out=self._draw(i, "out", (hidden, size), size)[:, q_rows].contiguous(),
            out_bias=self._draw(i, "out_bias", (hidden,), BIAS) if a.bias and a.output_bias and heads[0] == 0 else None,
        )

    def embedding(self) -> Tensor:
        hidden = self.model.layers[0].hidden_size
        self._check_vocabulary()
        return self._draw(_OUTSIDE, "embedding", (self.model.vocab_size, hidden), 1)

    def head(self) -> Tensor:
        if self.model.tie_embeddings:
            return self.embedding()
        hidden = self.model.layers[-1].hidden_size
        self._check_vocabulary()
        return self._draw(_OUTSIDE, "head", (self.model.vocab_size, hidden), hidden)

    def final_norm(self) -> Tensor:
        return self._norm(_OUTSIDE, "final_norm", self.model.layers[-1].hidden_size)

    def _check_vocabulary(self) -> None:
        if self.model.vocab_size == 0:
            raise MoeplanError(f"{self.model.name} has no token embedding (vocab_size 0)")
