"""The first projection of an FFN with its activation: gate and up of a tile side by side, joined before the store.

Letters: P choices, D model, H ffn columns, M 2 for a gated FFN (gate, then up) or 1.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..stored import Layout
from .activation import constants, value
from .config import Config, precision
from .device import on
from .index import Index
from .tiles import VARYING, dot, gathered_rows, load_rows, load_weight, place, weight_block


def project(
    x: Tensor,
    gate_up: Tensor,
    bias: Tensor | None,
    index: Index,
    per_row: int,
    hidden: Tensor,
    saved: Tensor | None,
    activation: str,
    lies: Layout,
    config: Config,
) -> None:
    """hidden[choice] = act(gate_up[e] x[choice // per_row] + bias[e]); saved[choice] = what the activation was given.

    x: rows of D; gate_up: [E, M, H, D], which lies as ``lies`` says; bias: [E, M, H] or None; hidden: [P, H]; saved:
    [P, M H] or None. Rows of choices that are not here are left as they are.
    """
    _, matrices, width, depth = gate_up.shape
    blocks = triton.cdiv(width, config.columns)
    if not index.tiles * blocks:
        return
    with on(x.device):
        project_kernel[(index.tiles * blocks,)](
            x, gate_up, bias, hidden, saved, index.order, index.tile_expert, index.tiles, depth, width,
            **constants(activation), MATRICES=matrices, TRANSPOSED=lies.transposed,
            MIXED=lies.interleaved and matrices == 2, PER_ROW=per_row, ROWS=index.height, COLUMNS=config.columns,
            DEPTH=config.depth, EVEN_DEPTH=depth % config.depth == 0, EVEN_COLUMNS=width % config.columns == 0,
            PRECISION=precision(x.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def project_kernel(
    x, gate_up, bias, hidden, saved, order, tile_expert, tiles, depth, width,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, MATRICES: tl.constexpr,
    TRANSPOSED: tl.constexpr, MIXED: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, block = place(tl.program_id(0), tiles, tl.cdiv(width, COLUMNS))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    choice, there = gathered_rows(order, tile, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    k = tl.arange(0, DEPTH)
    left = x + (choice // PER_ROW)[:, None] * depth + k[None, :]
    matrix = expert * MATRICES
    both = MATRICES * width
    # Of the second matrix the first row, or column where they lie TRANSPOSED, among those of both.
    after = (MATRICES - 1) * (1 if MIXED else width)
    step: tl.constexpr = MATRICES if MIXED else 1
    own = gate_up + matrix * width * depth
    first = weight_block(own, column, k, depth, both, TRANSPOSED, step)
    second = weight_block(own + after * (1 if TRANSPOSED else depth), column, k, depth, both, TRANSPOSED, step)
    onward = DEPTH * both if TRANSPOSED else DEPTH
    gate = tl.zeros((ROWS, COLUMNS), tl.float32)
    up = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(0, depth, DEPTH):
        a = load_rows(left, k, depth, EVEN_DEPTH)
        b = load_weight(first, k, column, depth, width, EVEN_DEPTH, EVEN_COLUMNS)
        gate = dot(a, b, gate, PRECISION)
        if MATRICES == 2:
            c = load_weight(second, k, column, depth, width, EVEN_DEPTH, EVEN_COLUMNS)
            up = dot(a, c, up, PRECISION)
            second += onward
        left += DEPTH
        first += onward
        k += DEPTH
    inside = column < width
    mask = there[:, None] & inside[None, :]
    if bias is not None:
        of_gate = bias + matrix * width + column
        gate += tl.load(of_gate, mask=inside, other=0.0).to(tl.float32)[None, :]
        if MATRICES == 2:
            up += tl.load(of_gate + width, mask=inside, other=0.0).to(tl.float32)[None, :]
    if saved is not None:
        kept = saved + choice[:, None] * (MATRICES * width) + column[None, :]
        tl.store(kept, gate.to(saved.dtype.element_ty), mask=mask)
        if MATRICES == 2:
            tl.store(kept + width, up.to(saved.dtype.element_ty), mask=mask)
    joined = value(gate, up, ACTIVATION, MATRICES, SLOPE, LIMIT, SHIFT)
    tl.store(hidden + choice[:, None] * width + column[None, :], joined.to(hidden.dtype.element_ty), mask=mask)
