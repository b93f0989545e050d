"""Sums of rows in a fixed order: a token's choices, and the parts of a split sum. The same input, the same bits."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import on
from .tiles import VARYING

BLOCK = 1024


def reduce(parts: Tensor, ids: Tensor, experts: int, dtype: torch.dtype) -> Tensor:
    """parts: [S, T K, O]; ids: [T, K] -> [T, O] of ``dtype``: the sum over S and K in float32.

    Rows of choices that are not here count as zeros and are not read.
    """
    splits, _, width = parts.shape
    tokens, top_k = ids.shape
    y = parts.new_empty((tokens, width), dtype=dtype)
    if y.numel():
        with on(y.device):
            reduce_kernel[(tokens, triton.cdiv(width, BLOCK))](
                parts, ids, y, tokens * top_k, experts, width, TOP_K=top_k, SPLITS=splits, BLOCK=BLOCK
            )
    return y


@triton.jit(do_not_specialize=VARYING)
def reduce_kernel(
    parts, ids, y, choices, experts, width, TOP_K: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(TOP_K):
        choice = token * TOP_K + k
        id = tl.load(ids + choice)
        here = (id >= 0) & (id < experts)
        for split in range(SPLITS):
            rows = parts + (split * choices + choice).to(tl.int64) * width
            total += tl.load(rows + column, mask=inside & here, other=0.0).to(tl.float32)
    tl.store(y + token * width + column, total.to(y.dtype.element_ty), mask=inside)
