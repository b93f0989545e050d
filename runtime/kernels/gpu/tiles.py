"""What the kernels share: which tile a program computes, and the product of gathered rows with one expert's weight.

Tiles go along the re-index vector (``index``): a tile is ROWS places of it, all of one expert; a place holds the number
of a choice, t K + k, or -1 behind an expert's last. Offsets into tensors are 64-bit: P times 2 H passes 2^31.

Triton compiles anew for an integer that is a multiple of 16, or is not, or is 1. Sizes of the model are left to that;
what changes with the number of tokens (VARYING) is not, or every batch might wait for a compilation.
"""

import triton
import triton.language as tl

GROUP = tl.constexpr(8)
VARYING = ("tiles", "choices", "weight_programs", "row_programs")


@triton.jit
def place(program, tiles, blocks):
    """Program -> (tile of rows, block of columns). GROUP tiles take one block after the other: weights stay in L2."""
    group = program // (GROUP * blocks)
    first = group * GROUP
    size = tl.minimum(tiles - first, GROUP)
    inside = program % (GROUP * blocks)
    return first + inside % size, inside // size


@triton.jit
def gathered_rows(order, tile, ROWS: tl.constexpr):
    """The tile's choices [ROWS] in 64 bits, and which are there. Padding reads choice 0: loads need no mask."""
    choice = tl.load(order + tile * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    there = choice >= 0
    return tl.where(there, choice, 0), there


@triton.jit
def weight_block(w, column, k, depth, width, TRANSPOSED: tl.constexpr, STEP: tl.constexpr = 1):
    """Pointers [DEPTH, COLUMNS] into w [width, depth], or into w [depth, width] if TRANSPOSED; STEP: of ``column``."""
    if TRANSPOSED:
        pointers = w + k[:, None].to(tl.int64) * width + column[None, :] * STEP
    else:
        pointers = w + column[None, :].to(tl.int64) * STEP * depth + k[:, None]
    return pointers


@triton.jit
def dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b, in float32; see ``config.precision``."""
    if PRECISION == "widened":
        total = tl.dot(a.to(tl.float32), b.to(tl.float32), total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total


@triton.jit
def load_rows(pointers, k, end, EVEN_DEPTH: tl.constexpr):
    """Rows [ROWS, DEPTH], zero outside."""
    return tl.load(pointers) if EVEN_DEPTH else tl.load(pointers, mask=k[None, :] < end, other=0.0)


@triton.jit
def load_weight(pointers, k, column, end, width, EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr):
    """A weight's block [DEPTH, COLUMNS], zero outside; no mask where the sizes are multiples of the block's."""
    if EVEN_DEPTH and EVEN_COLUMNS:
        block = tl.load(pointers)
    elif EVEN_DEPTH:
        block = tl.load(pointers, mask=column[None, :] < width, other=0.0)
    elif EVEN_COLUMNS:
        block = tl.load(pointers, mask=k[:, None] < end, other=0.0)
    else:
        block = tl.load(pointers, mask=(k[:, None] < end) & (column[None, :] < width), other=0.0)
    return block


@triton.jit
def product(
    x, w, row, column, depth, width, begin, end,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, TRANSPOSED: tl.constexpr,
    EVEN_DEPTH: tl.constexpr, EVEN_COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] float32: the sum over k in begin..end of x[row, k] w[column, k]; w[k, column] if TRANSPOSED."""
    k = begin + tl.arange(0, DEPTH)
    left = x + row[:, None] * depth + k[None, :]
    right = weight_block(w, column, k, depth, width, TRANSPOSED)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for _ in range(begin, end, DEPTH):
        a = load_rows(left, k, end, EVEN_DEPTH)
        b = load_weight(right, k, column, end, width, EVEN_DEPTH, EVEN_COLUMNS)
        total = dot(a, b, total, PRECISION)
        left += DEPTH
        right += DEPTH * width if TRANSPOSED else DEPTH
        k += DEPTH
    return total
