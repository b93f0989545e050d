"""Between the projections: the activation of projections that lie in memory, and its backward.

Letters: P choices, H ffn columns, M 2 for a gated FFN or 1, S parts of a split sum, T tokens, D model.
"""

import triton
import triton.language as tl
from torch import Tensor

from .activation import constants, derivatives, value
from .device import on
from .tiles import VARYING

BLOCK = 1024


def activate(
    projected: Tensor,
    gates: Tensor | None,
    ids: Tensor,
    experts: int,
    hidden: Tensor,
    saved: Tensor | None,
    activation: str,
    mixed: bool = False,
) -> None:
    """hidden[choice] = gate[choice] act(the sum over S of projected[s, choice]), which goes to ``saved`` if given.

    projected: [S, P, M H], all of gate first unless ``mixed``: gate 0, up 0, gate 1, ...; gates: [P] float32 or None;
    ids: [T, K]; hidden: [P, H]; saved: [P, M H] or None, all of gate first.
    """
    splits, choices, both = projected.shape
    width = hidden.shape[1]
    if hidden.numel():
        with on(hidden.device):
            activate_kernel[(choices, triton.cdiv(width, BLOCK))](
                projected, gates, ids, hidden, saved, choices, experts, width,
                **constants(activation), MATRICES=both // width, MIXED=mixed and both > width, SPLITS=splits,
                BLOCK=BLOCK,
            )  # fmt: skip


@triton.jit(do_not_specialize=VARYING)
def activate_kernel(
    projected, gates, ids, hidden, saved, choices, experts, width,
    ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr, MATRICES: tl.constexpr,
    MIXED: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + choice)
    if (id < 0) | (id >= experts):
        return
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < width
    gate = tl.zeros((BLOCK,), tl.float32)
    up = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLITS):
        row = projected + (split * choices + choice).to(tl.int64) * (MATRICES * width)
        row += column * (2 if MIXED else 1)
        gate += tl.load(row, mask=inside, other=0.0).to(tl.float32)
        if MATRICES == 2:
            up += tl.load(row + (1 if MIXED else width), mask=inside, other=0.0).to(tl.float32)
    if saved is not None:
        kept = saved + choice * (MATRICES * width) + column
        tl.store(kept, gate.to(saved.dtype.element_ty), mask=inside)
        if MATRICES == 2:
            tl.store(kept + width, up.to(saved.dtype.element_ty), mask=inside)
    joined = value(gate, up, ACTIVATION, MATRICES, SLOPE, LIMIT, SHIFT)
    if gates is not None:
        joined *= tl.load(gates + choice)
    tl.store(hidden + choice * width + column, joined.to(hidden.dtype.element_ty), mask=inside)


def activate_backward(
    dhidden: Tensor,
    saved: Tensor,
    gates: Tensor,
    dy: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    experts: int,
    dprojected: Tensor,
    dgates: Tensor,
    activation: str,
    mixed: bool = False,
) -> None:
    """The element-wise product of the backward: dprojected[choice] = gate dhidden act'(saved), and the gates' gradient.

    dhidden: [P, H], down[e]^T dy of each choice, without its gate; saved: [P, M H]; gates: [P] float32; dy: [T, D];
    down_bias: [E, D] or None; ids: [T, K]; dprojected: [P, M H], of whose columns those of gate and up are in turn
    where ``mixed``; dgates: [P] float32, of which the choice's is
    dhidden . act(saved) + dy[t] . down_bias[e], and 0 where the choice is not here.
    """
    if dgates.numel():
        with on(dgates.device):
            activate_backward_kernel[(dgates.numel(),)](
                dhidden, saved, gates, dy, down_bias, ids, dprojected, dgates,
                experts, dhidden.shape[1], dy.shape[1], TOP_K=ids.shape[1], **constants(activation),
                MATRICES=saved.shape[1] // max(dhidden.shape[1], 1),
                MIXED=mixed and saved.shape[1] > dhidden.shape[1], BLOCK=BLOCK,
            )  # fmt: skip


@triton.jit
def activate_backward_kernel(
    dhidden, saved, gates, dy, down_bias, ids, dprojected, dgates, experts, width, model,
    TOP_K: tl.constexpr, ACTIVATION: tl.constexpr, SLOPE: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
    MATRICES: tl.constexpr, MIXED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    choice = tl.program_id(0).to(tl.int64)
    id = tl.load(ids + choice).to(tl.int64)
    if (id < 0) | (id >= experts):
        tl.store(dgates + choice, 0.0)
        return
    weight = tl.load(gates + choice)
    total = tl.zeros((BLOCK,), tl.float32)
    for begin in range(0, width, BLOCK):
        column = begin + tl.arange(0, BLOCK)
        inside = column < width
        dh = tl.load(dhidden + choice * width + column, mask=inside, other=0.0).to(tl.float32)
        kept = saved + choice * (MATRICES * width) + column
        gate = tl.load(kept, mask=inside, other=0.0).to(tl.float32)
        up = gate
        if MATRICES == 2:
            up = tl.load(kept + width, mask=inside, other=0.0).to(tl.float32)
        joined, by_gate, by_up = derivatives(gate, up, ACTIVATION, MATRICES, SLOPE, LIMIT, SHIFT)
        total += dh * joined
        to = dprojected + choice * (MATRICES * width) + column * (2 if MIXED else 1)
        tl.store(to, (weight * dh * by_gate).to(dprojected.dtype.element_ty), mask=inside)
        if MATRICES == 2:
            tl.store(to + (1 if MIXED else width), (weight * dh * by_up).to(dprojected.dtype.element_ty), mask=inside)
    if down_bias is not None:
        for begin in range(0, model, BLOCK):
            column = begin + tl.arange(0, BLOCK)
            inside = column < model
            bias = tl.load(down_bias + id * model + column, mask=inside, other=0.0).to(tl.float32)
            total += bias * tl.load(dy + choice // TOP_K * model + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(dgates + choice, tl.sum(total))
