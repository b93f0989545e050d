"""Work of one call of each operator: exactly that of the routed tokens, from the ids and the shapes.

Letters as in ``interface``. Floating-point operations are those of the products and sums over rows, a multiply-add as
two; activations and gate weights, a few per row and column, are left out. Bytes are what any implementation must move:
each input read once (of the weights, those of active experts; of x, the rows that some choice names), each result
written once (gradients of idle experts too: zeros). Tile padding is not part of either: ``padding`` has the operations
that an implementation with tiles of ``tile`` rows spends on rows of no token.
"""

from typing import NamedTuple

import torch
from torch import Tensor

IDS, GATE = 8, 4  # bytes of one id, as int64, and of one gate weight


class Work(NamedTuple):
    """Of one call."""

    flops: int
    read: int
    written: int
    padding: int

    @property
    def bytes(self) -> int:
        return self.read + self.written


class Routed(NamedTuple):
    """What the ids say: choices that are here, tokens that have one, experts that have one, rows added by tiles."""

    choices: int
    tokens: int
    active: int
    padding: int


def routed(ids: Tensor, experts: int, tile: int = 1) -> Routed:
    """ids: [T, K], -1 for an expert that is not here."""
    counts = torch.bincount(ids.reshape(-1) + 1, minlength=experts + 1)[1:]
    padding = int((-counts % tile).sum())
    return Routed(int(counts.sum()), int((ids >= 0).any(1).sum()), int((counts > 0).sum()), padding)


def count_esmm(
    ids: Tensor,
    experts: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    own_rows: bool = False,
    tile: int = 1,
) -> Work:
    """``own_rows``: x is [T, K, I] instead of [T, I]."""
    r, size = routed(ids, experts, tile), dtype.itemsize
    rows = r.choices if own_rows else r.tokens
    read = size * (rows * inputs + r.active * outputs * (inputs + bias)) + ids.numel() * IDS
    return Work(2 * r.choices * inputs * outputs, read, size * ids.numel() * outputs, 2 * r.padding * inputs * outputs)


def count_ess(ids: Tensor, experts: int, outputs: int, dtype: torch.dtype) -> Work:
    r, size = routed(ids, experts), dtype.itemsize
    return Work(r.choices * outputs, size * r.choices * outputs + ids.numel() * IDS, size * experts * outputs, 0)


def count_estmm(
    ids: Tensor,
    experts: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    *,
    own_rows: bool = False,
    tile: int = 1,
) -> Work:
    r, size = routed(ids, experts, tile), dtype.itemsize
    rows = r.choices if own_rows else r.tokens
    read = size * (rows * inputs + r.choices * outputs) + ids.numel() * IDS
    each = 2 * inputs * outputs
    return Work(r.choices * each, read, size * experts * inputs * outputs, r.padding * each)


def count_esfk(
    ids: Tensor,
    experts: int,
    inputs: int,
    outputs: int,
    dtype: torch.dtype,
    *,
    bias: bool = False,
    own_rows: bool = False,
    tile: int = 1,
) -> Work:
    r, size = routed(ids, experts, tile), dtype.itemsize
    rows = r.choices if own_rows else r.tokens
    flops = r.choices * outputs * (4 * inputs + bias)
    read = size * (rows * inputs + r.choices * outputs + r.active * inputs * outputs) + ids.numel() * IDS
    all_rows = ids.numel() if own_rows else ids.shape[0]
    written = size * (all_rows * inputs + experts * outputs * (inputs + bias))
    return Work(flops, read, written, 4 * r.padding * inputs * outputs)


def count_expert_ffn(
    ids: Tensor,
    experts: int,
    matrices: int,
    ffn: int,
    model: int,
    dtype: torch.dtype,
    *,
    biases: bool = False,
    save: bool = False,
    tile: int = 1,
) -> Work:
    """The projections between are not moved unless they are saved, and then once, out."""
    r, size = routed(ids, experts, tile), dtype.itemsize
    wide = matrices * ffn
    each = 2 * model * (wide + ffn)
    weights = r.active * (model * (wide + ffn) + biases * (wide + model))
    read = size * (r.tokens * model + weights) + ids.numel() * (IDS + GATE)
    written = size * (ids.shape[0] * model + save * r.choices * wide)
    return Work(r.choices * each, read, written, r.padding * each)


def count_expert_ffn_backward(
    ids: Tensor,
    experts: int,
    matrices: int,
    ffn: int,
    model: int,
    dtype: torch.dtype,
    *,
    biases: bool = False,
    tile: int = 1,
) -> Work:
    """Twice the products of the forward call; with biases a sum for each, and the product of down_bias with dy."""
    r, size = routed(ids, experts, tile), dtype.itemsize
    wide = matrices * ffn
    each = 4 * model * (wide + ffn)
    flops = r.choices * (each + biases * (wide + 3 * model))
    weights = model * (wide + ffn)
    read = size * (2 * r.tokens * model + r.choices * wide + r.active * (weights + biases * model))
    written = size * (ids.shape[0] * model + experts * (weights + biases * (wide + model))) + ids.numel() * GATE
    return Work(flops, read + ids.numel() * (IDS + GATE), written, r.padding * each)
