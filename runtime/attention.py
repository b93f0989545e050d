"""Causal self-attention with grouped key/value heads, rotary embedding and a cache.

Letters: S sequences, L new tokens of each, T = S * L tokens, D model.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec import MoeplanError
from .cache import LayerCache
from .kernels import linear
from .norms import rms_norm
from .weights import AttentionWeights, kv_range

# Keys and values of one sequence that are copied rather than attended to by a call of their own. On a processor a call
# took as long as a copy of 256 to 512 KiB; on a GPU (not measured) a launch takes as long as some 16 MiB.
COPIED_BYTES = {"cpu": 1 << 18, "cuda": 1 << 24}


@dataclass(frozen=True)
class Batch:
    """``length`` new tokens of each of ``sequences`` sequences that each have ``context`` tokens in the cache."""

    sequences: int
    length: int
    context: int = 0

    @property
    def tokens(self) -> int:
        return self.sequences * self.length


class RotaryEmbedding:
    """Rotary position embedding (Su et al. 2021) in the rotate-half form of Transformers.

    Tables are made for the positions of a batch and kept until other positions are asked for.
    """

    def __init__(self, theta: float) -> None:
        self.theta = theta
        self._key: tuple = ()
        self._tables: tuple[Tensor, Tensor]

    def tables(self, batch: Batch, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin: [L, head_dim / 2] of positions context .. context + length."""
        key = (batch.context, batch.length, head_dim, like.dtype, like.device)
        if key != self._key:
            wide = torch.promote_types(like.dtype, torch.float32)
            exponent = torch.arange(0, head_dim, 2, dtype=wide, device=like.device) / head_dim
            positions = torch.arange(batch.context, batch.context + batch.length, dtype=wide, device=like.device)
            angles = positions[:, None] * (1.0 / self.theta**exponent)
            self._key, self._tables = key, (angles.cos().to(like.dtype), angles.sin().to(like.dtype))
        return self._tables

    def __call__(self, x: Tensor, batch: Batch) -> Tensor:
        """x: [S, heads, L, head_dim] -> rotated."""
        cos, sin = self.tables(batch, x.shape[-1], x)
        a, b = x.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention(
    x: Tensor,
    weights: AttentionWeights,
    cache: LayerCache | None,
    rope: RotaryEmbedding | None,
    batch: Batch,
    *,
    rows: Tensor | None = None,
    sum_over_group: Callable[[Tensor], Tensor] | None = None,
    kernel: str | None = None,
) -> Tensor:
    """Norm, projections, rotary embedding, attention and output projection; the caller adds the residual.

    x: [T, D], sequence-major -> [T, D], partial where ``weights`` hold only some heads. New keys and values are written
    to ``cache`` at positions context .. context + length; without a cache the context must be 0.
    ``rows`` [S] int64, rising: which of the cache's sequences the batch's are; by default all of them.
    ``sum_over_group`` adds a small tensor up over the devices that hold the other heads; needed where queries and keys
    are normalised over all heads (OLMoE). Raises MoeplanError when it is missing there. ``kernel`` names an
    implementation of ``linear``.
    """
    a, (first, last) = weights.spec, weights.heads
    if len(x) != batch.tokens:
        raise MoeplanError(f"attention: x: expected {batch.tokens} tokens, got {len(x)}")
    if batch.tokens == 0:
        return torch.zeros_like(x)
    heads, kv_heads = last - first, kv_range(a, weights.heads)[1] - kv_range(a, weights.heads)[0]
    normed = rms_norm(x, weights.norm, weights.eps)
    qkv = linear(normed, weights.qkv, weights.qkv_bias, implementation=kernel)
    q, k, v = qkv.split([heads * a.head_dim, kv_heads * a.head_dim, kv_heads * a.head_dim], dim=-1)
    if a.qk_norm == "full":
        q, k = _norm_over_heads(q, k, weights, sum_over_group)
    q, k, v = (t.view(batch.sequences, batch.length, -1, a.head_dim).transpose(1, 2) for t in (q, k, v))
    if a.qk_norm == "head":
        assert weights.q_norm is not None
        assert weights.k_norm is not None
        q, k = rms_norm(q, weights.q_norm, weights.eps), rms_norm(k, weights.k_norm, weights.eps)
    if a.clip_qkv is not None:
        q, k, v = (t.clamp(-a.clip_qkv, a.clip_qkv) for t in (q, k, v))
    if rope is not None:
        q, k = rope(q, batch), rope(k, batch)
    if cache is None:
        if batch.context:
            raise MoeplanError(f"attention: cache: expected one for {batch.context} tokens of context, got none")
        mixed = _attend(q, k, v, a.sliding_window)
    elif rows is None:
        mixed = _attend(q, *_remembered(k, v, cache, batch), a.sliding_window)
    else:
        mixed = _attend_apart(q, k, v, cache, batch, rows, a.sliding_window)
    outputs = mixed.transpose(1, 2).reshape(batch.tokens, -1)
    return linear(outputs, weights.out, weights.out_bias, implementation=kernel)


def _remembered(k: Tensor, v: Tensor, cache: LayerCache, batch: Batch) -> tuple[Tensor, Tensor]:
    """Keys and values from the first position on, the new ones [S, kv_heads, L, head_dim] written to the cache."""
    end = batch.context + batch.length
    cache.keys[:, :, batch.context : end] = k
    cache.values[:, :, batch.context : end] = v
    return (cache.keys[:, :, :end], cache.values[:, :, :end]) if batch.context else (k, v)


def _attend_apart(
    q: Tensor, k: Tensor, v: Tensor, cache: LayerCache, batch: Batch, rows: Tensor, window: int | None
) -> Tensor:
    """The same for some sequences of the cache: stretch by stretch, or, where these are many and short, on a copy."""
    stretches = _stretches(rows.tolist())
    each = (batch.context + batch.length) * 2 * cache.keys[0, :, 0].nbytes
    if len(stretches) > 1 and batch.context and each <= COPIED_BYTES[q.device.type]:
        end = batch.context + batch.length
        cache.keys[rows, :, batch.context : end] = k
        cache.values[rows, :, batch.context : end] = v
        k, v = (whole[:, :, :end].index_select(0, rows) for whole in (cache.keys, cache.values))
        return _attend(q, k, v, window)
    found, first = [], 0
    for stretch in stretches:
        own = slice(first, first := first + len(stretch))
        part = LayerCache(*(whole[stretch.start : stretch.stop] for whole in (cache.keys, cache.values)))
        found.append(_attend(q[own], *_remembered(k[own], v[own], part, batch), window))
    return torch.cat(found)


def _stretches(rows: list[int]) -> list[range]:
    """Consecutive numbers, together."""
    starts = [i for i, row in enumerate(rows) if i == 0 or row != rows[i - 1] + 1]
    return [range(rows[i], rows[j - 1] + 1) for i, j in pairwise([*starts, len(rows)])]


def _norm_over_heads(
    q: Tensor, k: Tensor, weights: AttentionWeights, sum_over_group: Callable[[Tensor], Tensor] | None
) -> tuple[Tensor, Tensor]:
    """RMS norm of queries and keys over all heads, of which this device may hold some."""
    a = weights.spec
    assert weights.q_norm is not None
    assert weights.k_norm is not None
    if weights.heads == (0, a.heads):
        return rms_norm(q, weights.q_norm, weights.eps), rms_norm(k, weights.k_norm, weights.eps)
    if sum_over_group is None:
        raise MoeplanError("attention: sum_over_group: needed where heads are divided and qk_norm is 'full', got none")
    wide = torch.promote_types(q.dtype, torch.float32)
    squares = sum_over_group(torch.stack([t.to(wide).square().sum(-1) for t in (q, k)]))
    size = torch.tensor([a.heads * a.head_dim, a.kv_heads * a.head_dim], dtype=wide, device=q.device)
    scale = torch.rsqrt(squares / size[:, None] + weights.eps)
    q = weights.q_norm * (q.to(wide) * scale[0, :, None]).to(q.dtype)
    k = weights.k_norm * (k.to(wide) * scale[1, :, None]).to(k.dtype)
    return q, k


def _attend(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention of the last L positions. q: [S, heads, L, head_dim]; k, v: [S, kv_heads, N, head_dim].

    With one new token, the query heads of a group are its queries: nothing is masked and no key is repeated.
    """
    sequences, heads, length, head_dim = q.shape
    kv_heads, total = k.shape[1], k.shape[2]
    if length == 1:
        if window is not None:
            k, v = k[:, :, -window:], v[:, :, -window:]
        grouped = q.reshape(sequences, kv_heads, heads // kv_heads, head_dim)
        return F.scaled_dot_product_attention(grouped, k, v).view(q.shape)
    masked = total > length or (window is not None and window < total)
    mask = None
    if masked:
        query = torch.arange(total - length, total, device=q.device)[:, None]
        key = torch.arange(total, device=q.device)
        mask = key <= query if window is None else (key <= query) & (key > query - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not masked, enable_gqa=heads != kv_heads)
