"""ESFK: the backward of one projection in one launch, and its parts ESTMM (weight) and ESS (bias) by themselves.

The programs of a launch fall into three ranges: tiles of the weights' gradients first, which take longest, then tiles
of the rows' gradients, then blocks of the biases'. Each writes its own tile once: no atomics, the same bits every time.
Letters: P choices, E experts, I and O inputs and outputs.
"""

import triton
import triton.language as tl
from torch import Tensor

from .config import Config, precision
from .device import on
from .index import Index
from .tiles import VARYING, dot, gathered_rows, place, product

# Of a bias's gradient: rows and columns of a block.
BIAS_ROWS, BIAS_COLUMNS = 16, 256


def esfk(
    x: Tensor | None,
    weight: Tensor | None,
    dy: Tensor,
    gates: Tensor | None,
    index: Index,
    x_per_row: int,
    dy_per_row: int,
    dx: Tensor | None,
    dweight: Tensor | None,
    dbias: Tensor | None,
    config: Config,
    transposed: bool = False,
) -> None:
    """Gradients of y = weight[e] x + bias[e] over the choices; each is computed if given, and not if it is None.

    x: rows of I, of which ``x_per_row`` choices share one; dy: rows of O, ``dy_per_row`` likewise; weight: [E, O, I];
    gates: [P] float32 or None; dx: [P, I], weight[e]^T dy; dweight: [E, O, I], the sum of dy^T x over the expert's
    choices; dbias: [E, O], the sum of gate dy. weight and dweight are [E, I, O] where ``transposed``. The gates do not
    enter dx and dweight: put them in x for the latter.
    """
    experts, outputs, inputs = index.experts, dy.shape[-1], 0 if x is None else x.shape[-1]
    if dx is not None:
        inputs = dx.shape[-1]
    column_blocks = triton.cdiv(inputs, config.columns)
    weights = experts * triton.cdiv(outputs, config.rows) * column_blocks if dweight is not None else 0
    rows = index.tiles * column_blocks if dx is not None else 0
    biases = experts * triton.cdiv(outputs, BIAS_COLUMNS) if dbias is not None else 0
    if not weights + rows + biases:
        return
    with on(dy.device):
        esfk_kernel[(weights + rows + biases,)](
            x, weight, dy, gates, dx, dweight, dbias, index.order, index.tile_expert, index.start, index.count,
            index.tiles, inputs, outputs, weights, rows,
            TRANSPOSED=transposed, X_PER_ROW=x_per_row, DY_PER_ROW=dy_per_row, HEIGHT=index.height, ROWS=config.rows,
            COLUMNS=config.columns, DEPTH=config.depth, BIAS_ROWS=BIAS_ROWS, BIAS_COLUMNS=BIAS_COLUMNS,
            EVEN_DEPTH=outputs % config.depth == 0, EVEN_ROWS=outputs % config.rows == 0,
            EVEN_COLUMNS=inputs % config.columns == 0, PRECISION=precision(dy.dtype),
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def esfk_kernel(
    x, weight, dy, gates, dx, dweight, dbias, order, tile_expert, start, count, tiles, inputs, outputs,
    weight_programs, row_programs, TRANSPOSED: tl.constexpr,
    X_PER_ROW: tl.constexpr, DY_PER_ROW: tl.constexpr, HEIGHT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLUMNS: tl.constexpr, EVEN_DEPTH: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < weight_programs:
        if dweight is not None:
            _weight_tile(
                program, x, dy, dweight, order, start, count, inputs, outputs,
                TRANSPOSED, X_PER_ROW, DY_PER_ROW, ROWS, COLUMNS, DEPTH, EVEN_ROWS, EVEN_COLUMNS, PRECISION,
            )  # fmt: skip
    elif program < weight_programs + row_programs:
        if dx is not None:
            _row_tile(
                program - weight_programs, weight, dy, dx, order, tile_expert, tiles, inputs, outputs,
                TRANSPOSED, DY_PER_ROW, HEIGHT, COLUMNS, DEPTH, EVEN_DEPTH, EVEN_COLUMNS, PRECISION,
            )  # fmt: skip
    else:
        if dbias is not None:
            _bias_block(
                program - weight_programs - row_programs, dy, gates, dbias, order, start, count, outputs,
                DY_PER_ROW, BIAS_ROWS, BIAS_COLUMNS,
            )  # fmt: skip


@triton.jit
def _weight_tile(
    program, x, dy, dweight, order, start, count, inputs, outputs, TRANSPOSED: tl.constexpr,
    X_PER_ROW: tl.constexpr, DY_PER_ROW: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN_ROWS: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dweight[e, rows, columns]: a product over the expert's choices, which it takes DEPTH at a time."""
    column_blocks = tl.cdiv(inputs, COLUMNS)
    blocks = tl.cdiv(outputs, ROWS) * column_blocks
    expert = program // blocks
    output = program % blocks // column_blocks * ROWS + tl.arange(0, ROWS)
    input = program % column_blocks * COLUMNS + tl.arange(0, COLUMNS)
    places = order + tl.load(start + expert)
    choices = tl.load(count + expert)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    k = tl.arange(0, DEPTH)
    # One step ahead: loads whose address is itself loaded in the same step are not overlapped with the products.
    ahead = tl.load(places + k, mask=k < choices, other=0)
    for _ in range(0, choices, DEPTH):
        there = k < choices
        choice = ahead.to(tl.int64)
        k += DEPTH
        ahead = tl.load(places + k, mask=k < choices, other=0)
        left_mask = there[None, :] if EVEN_ROWS else there[None, :] & (output < outputs)[:, None]
        right_mask = there[:, None] if EVEN_COLUMNS else there[:, None] & (input < inputs)[None, :]
        # Rows of no choice are zero on both sides: zero times what lies in memory might be NaN.
        a = tl.load(dy + (choice // DY_PER_ROW)[None, :] * outputs + output[:, None], mask=left_mask, other=0.0)
        b = tl.load(x + (choice // X_PER_ROW)[:, None] * inputs + input[None, :], mask=right_mask, other=0.0)
        total = dot(a, b, total, PRECISION)
    to = dweight + expert.to(tl.int64) * outputs * inputs
    if TRANSPOSED:
        to += input[None, :].to(tl.int64) * outputs + output[:, None]
    else:
        to += output[:, None].to(tl.int64) * inputs + input[None, :]
    mask = (output < outputs)[:, None] & (input < inputs)[None, :]
    tl.store(to, total.to(dweight.dtype.element_ty), mask=mask)


@triton.jit
def _row_tile(
    program, weight, dy, dx, order, tile_expert, tiles, inputs, outputs, TRANSPOSED: tl.constexpr,
    DY_PER_ROW: tl.constexpr, HEIGHT: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dx of a tile of choices: ESMM with the weight as it lies, [O, I] or [I, O], summed over O."""
    tile, block = place(program, tiles, tl.cdiv(inputs, COLUMNS))
    expert = tl.load(tile_expert + tile).to(tl.int64)
    if expert >= 0:
        choice, there = gathered_rows(order, tile, HEIGHT)
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        total = product(
            dy, weight + expert * outputs * inputs, choice // DY_PER_ROW, column, outputs, inputs, 0, outputs,
            HEIGHT, COLUMNS, DEPTH, not TRANSPOSED, EVEN_DEPTH, EVEN_COLUMNS, PRECISION,
        )  # fmt: skip
        mask = there[:, None] & (column < inputs)[None, :]
        tl.store(dx + choice[:, None] * inputs + column[None, :], total.to(dx.dtype.element_ty), mask=mask)


@triton.jit
def _bias_block(
    program, dy, gates, dbias, order, start, count, outputs,
    DY_PER_ROW: tl.constexpr, BIAS_ROWS: tl.constexpr, BIAS_COLUMNS: tl.constexpr,
):  # fmt: skip
    """dbias[e, columns]: the sum of the expert's rows."""
    blocks = tl.cdiv(outputs, BIAS_COLUMNS)
    expert = program // blocks
    column = program % blocks * BIAS_COLUMNS + tl.arange(0, BIAS_COLUMNS)
    inside = column < outputs
    places = order + tl.load(start + expert)
    choices = tl.load(count + expert)
    total = tl.zeros((BIAS_ROWS, BIAS_COLUMNS), tl.float32)
    for begin in range(0, choices, BIAS_ROWS):
        k = begin + tl.arange(0, BIAS_ROWS)
        there = k < choices
        choice = tl.load(places + k, mask=there, other=0).to(tl.int64)
        rows = dy + (choice // DY_PER_ROW)[:, None] * outputs + column[None, :]
        block = tl.load(rows, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if gates is not None:
            block *= tl.load(gates + choice)[:, None]
        total += block
    to = dbias + expert.to(tl.int64) * outputs + column
    tl.store(to, tl.sum(total, 0).to(dbias.dtype.element_ty), mask=inside)
