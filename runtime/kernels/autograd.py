"""Derivatives of the operators of ``operators``, each in terms of the others.

Letters as in ``interface``. ``expert_ffn`` can be differentiated once. ``esmm``, ``ess``, ``estmm`` and ``esfk`` are
(bi)linear, and their derivatives are one another: any order is possible.
"""

from typing import Any

import torch
from torch import Tensor

from ...spec import MoeplanError
from .operators import LIBRARY

ops = torch.ops.moeplan


def _expert_ffn_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, ctx.implementation, save = inputs
    if not save:
        raise MoeplanError("expert_ffn: save: expected True where gradients are wanted, got False")
    ctx.save_for_backward(*tensors, output[1])
    ctx.mark_non_differentiable(output[1])


def _expert_ffn_backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, gate_up, gate_up_bias, down, down_bias, ids, weights, saved = ctx.saved_tensors
    dx, dgate_up, dgate_up_bias, ddown, ddown_bias, dweights = ops.expert_ffn_backward(
        dy, x, gate_up, gate_up_bias, down, down_bias, ids, weights, saved, ctx.activation, ctx.implementation
    )
    biases = (None if bias is None else g for bias, g in ((gate_up_bias, dgate_up_bias), (down_bias, ddown_bias)))
    return dx, dgate_up, next(biases), ddown, next(biases), None, dweights, None, None, None


def _once(ctx: Any, *_: Tensor) -> None:
    raise MoeplanError("expert_ffn: expected one derivative, got a second: compose esmm for those")


def _nothing(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    pass


def _esmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ids, ctx.implementation = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(x, weight, ids)


def _esmm_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, ids = ctx.saved_tensors
    dx = dweight = dbias = None
    if ctx.needs_input_grad[0]:
        dx, dweight, dbias = ops.esfk(x, weight, dy, ids, ctx.with_bias, ctx.implementation)
    else:
        if ctx.needs_input_grad[1]:
            dweight = ops.estmm(x, dy, ids, len(weight), ctx.implementation)
        if ctx.with_bias:
            dbias = ops.ess(dy, ids, len(weight), ctx.implementation)
    return dx, dweight, dbias if ctx.with_bias else None, None, None


def _ess_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, ids, *_ = inputs
    ctx.save_for_backward(ids)


def _ess_backward(ctx: Any, dsum: Tensor) -> tuple[Tensor | None, ...]:
    (ids,) = ctx.saved_tensors
    return _row_of_expert(dsum, ids), None, None, None


def _estmm_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, dy, ids, _, ctx.implementation = inputs
    ctx.save_for_backward(x, dy, ids)


def _estmm_backward(ctx: Any, dproduct: Tensor) -> tuple[Tensor | None, ...]:
    x, dy, ids = ctx.saved_tensors
    dproduct = dproduct.contiguous()
    dx = ddy = None
    if ctx.needs_input_grad[0]:
        dx = ops.esmm(dy, dproduct.transpose(1, 2).contiguous(), None, ids, ctx.implementation)
        dx = dx.sum(1) if x.ndim == 2 else dx
    if ctx.needs_input_grad[1]:
        ddy = ops.esmm(x, dproduct, None, ids, ctx.implementation)
    return dx, ddy, None, None, None


def _esfk_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    x, weight, dy, ids, ctx.with_bias, ctx.implementation = inputs
    ctx.save_for_backward(x, weight, dy, ids)


def _esfk_backward(ctx: Any, ddx: Tensor, ddweight: Tensor, ddbias: Tensor) -> tuple[Tensor | None, ...]:
    """dx is bilinear in dy and weight, dweight in dy and x, dbias linear in dy."""
    x, weight, dy, ids = ctx.saved_tensors
    ddx, ddweight = ddx.contiguous(), ddweight.contiguous()
    gx = gweight = gdy = None
    if ctx.needs_input_grad[0]:
        gx = ops.esmm(dy, ddweight.transpose(1, 2).contiguous(), None, ids, ctx.implementation)
        gx = gx.sum(1) if x.ndim == 2 else gx
    if ctx.needs_input_grad[1]:
        gweight = ops.estmm(ddx, dy, ids, len(weight), ctx.implementation)
    if ctx.needs_input_grad[2]:
        bias = ddbias.contiguous() if ctx.with_bias else None
        gdy = ops.esmm(ddx, weight, None, ids, ctx.implementation)
        gdy = gdy + ops.esmm(x, ddweight, bias, ids, ctx.implementation)
    return gx, gweight, gdy, None, None, None


def _row_of_expert(rows: Tensor, ids: Tensor) -> Tensor:
    """rows [E, O] -> the row of each choice's expert [T, K, O]; -1 finds the last, which is zeros."""
    return torch.cat([rows, rows.new_zeros(1, rows.shape[1])])[ids]


for _name, _backward, _context in (
    ("expert_ffn", _expert_ffn_backward, _expert_ffn_context),
    ("expert_ffn_backward", _once, _nothing),
    ("esmm", _esmm_backward, _esmm_context),
    ("ess", _ess_backward, _ess_context),
    ("estmm", _estmm_backward, _estmm_context),
    ("esfk", _esfk_backward, _esfk_context),
):
    torch.library.register_autograd(f"moeplan::{_name}", _backward, setup_context=_context, lib=LIBRARY)
