"""Kernels of vendor products, one or two for every active expert: what runs where no compiler is, and in float64.

Letters as in ``interface``; n rows of one expert. The choices are sorted by expert once; no row is padded, and only the
rows of the expert at work are copied. In ``forward`` activations are columns ([M H, n]): see ``product.multiply``.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from . import memory
from .activation import activate, activate_backward
from .interface import Gradients
from .product import multiply, multiply_back, multiply_rows
from .reindex import by_expert
from .stored import Layout, layout, like_weights, lying


class GroupedKernels:
    """See ``interface.Kernels``."""

    name = "grouped"

    def esmm(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        order, counts = by_expert(ids, len(weight), "esmm")
        y = x.new_zeros(ids.numel(), weight.shape[1])
        for e, mine in _active(order, counts):
            y[mine] = multiply(weight[e], _rows(x, ids, mine).t(), None if bias is None else bias[e]).t()
        return y.view(*ids.shape, weight.shape[1])

    def ess(self, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        order, counts = by_expert(ids, experts, "ess")
        sums = dy.new_zeros(experts, dy.shape[2])
        for e, mine in _active(order, counts):
            sums[e] = _sum(_rows(dy, ids, mine))
        return sums

    def estmm(self, x: Tensor, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        order, counts = by_expert(ids, experts, "estmm")
        products = memory.gradient((experts, dy.shape[2], x.shape[-1]), x.dtype, x.device, _busy(counts)).tensor
        for e, mine in _active(order, counts):
            multiply_rows(_rows(dy, ids, mine), _rows(x, ids, mine), products[e])
        return products

    def esfk(
        self, x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        experts, shared = len(weight), x.ndim == 2
        order, counts = by_expert(ids, experts, "esfk")
        dx = torch.zeros(len(x) if shared else ids.numel(), x.shape[-1], dtype=_wide(x), device=x.device)
        dweight = memory.gradient(weight.shape, x.dtype, x.device, _busy(counts)).tensor
        dbias = dy.new_zeros(experts, dy.shape[2]) if with_bias else None
        for e, mine in _active(order, counts):
            back = _rows(dy, ids, mine)
            dx.index_add_(0, mine // ids.shape[1] if shared else mine, multiply_back(back, weight[e]))
            multiply_rows(back, _rows(x, ids, mine), dweight[e])
            if dbias is not None:
                dbias[e] = _sum(back)
        return dx.to(x.dtype).view_as(x), dweight, dbias

    def forward(
        self,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        activation: str,
        save: bool,
    ) -> tuple[Tensor, Tensor]:
        order, counts = by_expert(ids, len(gate_up), "expert_ffn")
        matrices, (projections, lies) = gate_up.shape[1], _projections(gate_up, down)
        y = torch.zeros(x.shape, dtype=_wide(x), device=x.device)
        saved, first = memory.empty((ids.numel() if save else 0, projections.shape[1]), x.dtype, x.device), 0
        for e, mine in _active(order, counts):
            token = mine // ids.shape[1]
            bias = None if gate_up_bias is None else gate_up_bias[e].flatten()
            projected = multiply(projections[e], x.index_select(0, token).t(), None if lies.interleaved else bias)
            if lies.interleaved:
                projected = projected.unflatten(0, (-1, matrices)).transpose(0, 1).flatten(0, 1)
                projected = projected if bias is None else projected + bias.unsqueeze(1)
            if save:
                saved[first : first + len(mine)] = projected.t()
                first += len(mine)
            hidden = activate(projected, matrices, activation, dim=0)
            out = multiply(down[e], hidden, None if down_bias is None else down_bias[e])
            # Row-major before the sum: adding strided rows takes several times as long.
            y.index_add_(0, token, out.t().contiguous() * _gates(weights, mine, y.dtype))
        return y.to(x.dtype), saved

    def backward(
        self,
        dy: Tensor,
        x: Tensor,
        gate_up: Tensor,
        gate_up_bias: Tensor | None,
        down: Tensor,
        down_bias: Tensor | None,
        ids: Tensor,
        weights: Tensor,
        saved: Tensor,
        activation: str,
    ) -> Gradients:
        order, counts = by_expert(ids, len(gate_up), "expert_ffn")
        matrices, (projections, lies) = gate_up.shape[1], _projections(gate_up, down)
        dx = torch.zeros(x.shape, dtype=_wide(x), device=x.device)
        busy = _busy(counts)
        # As the weights lie, whose views they become below.
        shapes = lying(gate_up, lies).shape, (down.transpose(1, 2) if lies.down_transposed else down).shape
        dgate_up, ddown = (memory.gradient(shape, x.dtype, x.device, busy).tensor for shape in shapes)
        dgate_up_bias, ddown_bias = (None if b is None else torch.zeros_like(b) for b in (gate_up_bias, down_bias))
        dweights = torch.zeros(ids.numel(), dtype=dx.dtype, device=x.device)
        first = 0
        for e, mine in _active(order, counts):
            token, gate = mine // ids.shape[1], _gates(weights, mine, dx.dtype)
            projected = saved[first : first + len(mine)]
            first += len(mine)
            hidden, back = activate(projected, matrices, activation), dy.index_select(0, token)
            # One product gives both: the weight's gradient is the hidden row times it, and it times the weight goes on.
            dhidden = multiply_back(back, down[e])
            dweights[mine] = (dhidden * hidden).sum(1)
            if down_bias is not None:
                dweights[mine] += (back * down_bias[e].to(dx.dtype)).sum(1)
            weighted = (back * gate).to(x.dtype)
            _outer(weighted, hidden, ddown[e], lies.down_transposed)
            dprojected = activate_backward((dhidden * gate).to(x.dtype), projected, matrices, activation)
            if dgate_up_bias is not None:
                dgate_up_bias[e] = _sum(dprojected).view(dgate_up_bias[e].shape)
            if lies.interleaved:
                dprojected = dprojected.unflatten(1, (matrices, -1)).transpose(1, 2).flatten(1)
            _outer(dprojected, x.index_select(0, token), dgate_up[e], lies.transposed)
            dx.index_add_(0, token, multiply_back(dprojected, projections[e]))
            if ddown_bias is not None:
                ddown_bias[e] = _sum(weighted)
        up, _, back = like_weights(dgate_up, None, ddown, matrices, lies)
        return Gradients(
            dx.to(x.dtype),
            up,
            dgate_up_bias,
            back,
            ddown_bias,
            dweights.view_as(weights).to(weights.dtype),
        )


def _projections(gate_up: Tensor, down: Tensor) -> tuple[Tensor, Layout]:
    """gate_up [E, M, H, D] as rows [E, M H, D] in the order in which they lie, a view; and the layout."""
    lies = layout(gate_up, down)
    flat = lying(gate_up, lies)
    return flat.transpose(1, 2) if lies.transposed else flat, lies


def _outer(left: Tensor, right: Tensor, out: Tensor, transposed: bool) -> None:
    """left [n, O]^T times right [n, I] into out [O, I], or [I, O] where it lies transposed."""
    multiply_rows(*((right, left) if transposed else (left, right)), out)


def _busy(counts: list[int]) -> list[int]:
    """Experts that have choices."""
    return [e for e, count in enumerate(counts) if count]


def _active(order: Tensor, counts: list[int]) -> Iterator[tuple[int, Tensor]]:
    """Each expert that has choices, and these."""
    for e, mine in enumerate(order.split(counts)):
        if len(mine):
            yield e, mine


def _rows(x: Tensor, ids: Tensor, choices: Tensor) -> Tensor:
    """The rows [n, I] of some choices, out of x [T, I] or [T, K, I]."""
    return x.index_select(0, choices // ids.shape[1]) if x.ndim == 2 else x.flatten(0, 1).index_select(0, choices)


def _gates(weights: Tensor, choices: Tensor, dtype: torch.dtype) -> Tensor:
    """[n, 1]."""
    return weights.reshape(-1).index_select(0, choices).to(dtype).unsqueeze(1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _sum(rows: Tensor) -> Tensor:
    """Sum of rows [n, O], accumulated in float32."""
    return rows.sum(0, dtype=_wide(rows)).to(rows.dtype)
