"""The kernels in their plainest form: the definition that every other implementation is tested against.

Letters as in ``interface``. One expert after the other, every choice's row written out, products and sums in float32
(float64 for float64). Slow and large on purpose.
"""

import torch
from torch import Tensor

from .activation import activate, activate_backward
from .interface import Gradients
from .reindex import check_ids


class ReferenceKernels:
    """See ``interface.Kernels``."""

    name = "reference"

    def esmm(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        check_ids(ids, len(weight), "esmm")
        rows = _rows(x, ids)
        y = rows.new_zeros(*ids.shape, weight.shape[1])
        for e in range(len(weight)):
            mine = ids == e
            y[mine] = rows[mine] @ weight[e].to(rows.dtype).t()
            if bias is not None:
                y[mine] += bias[e].to(rows.dtype)
        return y.to(x.dtype)

    def ess(self, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        check_ids(ids, experts, "ess")
        rows = _rows(dy, ids)
        sums = rows.new_zeros(experts, dy.shape[2])
        for e in range(experts):
            sums[e] = rows[ids == e].sum(0)
        return sums.to(dy.dtype)

    def estmm(self, x: Tensor, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        check_ids(ids, experts, "estmm")
        rows, dy = _rows(x, ids), _rows(dy, ids)
        products = rows.new_zeros(experts, dy.shape[2], rows.shape[2])
        for e in range(experts):
            mine = ids == e
            products[e] = dy[mine].t() @ rows[mine]
        return products.to(x.dtype)

    def esfk(
        self, x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        experts = len(weight)
        check_ids(ids, experts, "esfk")
        wide = _rows(dy, ids)
        dx = wide.new_zeros(*ids.shape, weight.shape[2])
        for e in range(experts):
            mine = ids == e
            dx[mine] = wide[mine] @ weight[e].to(wide.dtype)
        dx = dx.sum(1) if x.ndim == 2 else dx
        return dx.to(x.dtype), self.estmm(x, dy, ids, experts), self.ess(dy, ids, experts) if with_bias else None

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
        check_ids(ids, len(gate_up), "expert_ffn")
        bias = None if gate_up_bias is None else gate_up_bias.flatten(1)
        projected = self.esmm(x, gate_up.flatten(1, 2), bias, ids)
        out = self.esmm(activate(projected, gate_up.shape[1], activation), down, down_bias, ids)
        y = (_rows(out, ids) * weights.unsqueeze(2)).sum(1).to(x.dtype)
        saved = projected.flatten(0, 1)
        return y, saved if save else saved.new_empty(0, saved.shape[1])

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
        matrices = gate_up.shape[1]
        projected = saved.view(*ids.shape, saved.shape[1])
        hidden = activate(projected, matrices, activation)
        out = self.esmm(hidden, down, down_bias, ids)
        each = _rows(dy, ids)
        dweights = (each * out).sum(2).to(weights.dtype)
        dout = (each * weights.unsqueeze(2)).to(x.dtype)
        dhidden, ddown, ddown_bias = self.esfk(hidden, down, dout, ids, down_bias is not None)
        dprojected = activate_backward(dhidden, projected, matrices, activation)
        flat = gate_up.flatten(1, 2)
        dx, dgate_up, dbias = self.esfk(x, flat, dprojected, ids, gate_up_bias is not None)
        dbias = None if gate_up_bias is None or dbias is None else dbias.view(gate_up_bias.shape)
        return Gradients(dx, dgate_up.view(gate_up.shape), dbias, ddown, ddown_bias, dweights)


def _rows(x: Tensor, ids: Tensor) -> Tensor:
    """x [T, I] or [T, K, I] -> the row of every choice [T, K, I], float32 (float64 stays)."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide.unsqueeze(1).expand(-1, ids.shape[1], -1) if x.ndim == 2 else wide
