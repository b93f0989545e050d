"""ESMM: every choice's row times its expert's weight; tiles of the re-index vector, blocks of columns, parts of a sum.

Letters: P choices, I and O inputs and outputs, S parts of a split sum.
"""

import triton
import triton.language as tl
from torch import Tensor

from .config import Config, precision
from .device import on
from .index import Index
from .tiles import VARYING, gathered_rows, place, product


def esmm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gates: Tensor | None,
    index: Index,
    per_row: int,
    out: Tensor,
    config: Config,
    transposed: bool = False,
) -> None:
    """out[s, choice] = gate[choice] (weight[e] x[choice // per_row] + bias[e]), with S parts s that add up to it.

    x: rows of I, of which ``per_row`` choices share one; weight: [E, O, I], or [E, I, O] transposed; bias: [E, O] or
    None; gates: [P] float32 or None; out: [S, P, O], S = config.split. Rows of choices that are not here are left as
    they are.
    """
    width, depth = weight.shape[:0:-1] if transposed else weight.shape[1:]
    blocks = triton.cdiv(width, config.columns)
    if not index.tiles * blocks:
        return
    part = triton.cdiv(triton.cdiv(depth, config.depth), config.split) * config.depth
    with on(x.device):
        esmm_kernel[(index.tiles * blocks, config.split)](
            x, weight, bias, gates, out, index.order, index.tile_expert, index.tiles, out.shape[1], depth, width, part,
            TRANSPOSED=transposed, PER_ROW=per_row, ROWS=index.height, COLUMNS=config.columns, DEPTH=config.depth,
            EVEN_DEPTH=depth % config.depth == 0, EVEN_COLUMNS=width % config.columns == 0,
            PRECISION=precision(x.dtype), num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def esmm_kernel(
    x, weight, bias, gates, out, order, tile_expert, tiles, choices, depth, width, part,
    TRANSPOSED: tl.constexpr, PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    tile, block = place(tl.program_id(0), tiles, tl.cdiv(width, COLUMNS))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert < 0:
        return
    choice, there = gathered_rows(order, tile, ROWS)
    column = block * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.program_id(1) * part
    end = tl.minimum(begin + part, depth)
    total = product(
        x, weight + expert * depth * width, choice // PER_ROW, column, depth, width, begin, end,
        ROWS, COLUMNS, DEPTH, TRANSPOSED, EVEN_DEPTH, EVEN_COLUMNS, PRECISION,
    )  # fmt: skip
    inside = column < width
    # The first part alone adds the bias; gates scale every part, as the sum is linear.
    if bias is not None and begin == 0:
        total += tl.load(bias + expert * width + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    if gates is not None:
        total *= tl.load(gates + choice)[:, None]
    rows = tl.program_id(1).to(tl.int64) * choices + choice
    tl.store(
        out + rows[:, None] * width + column[None, :],
        total.to(out.dtype.element_ty),
        mask=there[:, None] & inside[None, :],
    )
