"""``TritonKernels``: the operators of ``interface.Kernels`` on a GPU, and the gated FFN made of them.

Forward: two launches (the first projection with its activation, the second with the gate weight) and the sum over k.
Backward, as in HEXA-MoE: one fused kernel a projection with an element-wise product between them; before it the
activation is computed once more, since only the projections are kept, and behind it comes the sum over k.
Triton is imported when an object is made, not with this module.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ....spec import MoeplanError
from ..interface import Gradients
from ..stored import Layout, layout, lying
from .device import interpreting, require_triton

if TYPE_CHECKING:
    from .call import Call


class TritonKernels:
    """Raises MoeplanError if there is no triton, or neither a CUDA device nor Triton's interpreter.

    Sums have one order: the same input gives the same bits. An id out of range counts as not here, and is raised by a
    later call (``reports``): no call waits for the device.
    """

    name = "triton"

    def __init__(self) -> None:
        require_triton()

    def esmm(self, x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor) -> Tensor:
        """See ``interface.Kernels.esmm``."""
        shape = (*ids.shape, weight.shape[1])
        call = self._call("esmm", ids, len(weight), x, weight)
        if call is None:
            return x.new_zeros(shape)
        rows, per_row = _rows(x, call.top_k)
        parts = call.products(rows, weight, _packed(bias), None, per_row, zeroed=True)
        return call.summed(parts, 1, x.dtype).view(shape)

    def ess(self, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        """See ``interface.Kernels.ess``."""
        call = self._call("ess", ids, experts, dy)
        if call is None:
            return dy.new_zeros((experts, dy.shape[-1]))
        dbias = dy.new_empty((experts, dy.shape[-1]))
        call.bias_gradient(_rows(dy, call.top_k)[0], dbias)
        return dbias

    def estmm(self, x: Tensor, dy: Tensor, ids: Tensor, experts: int) -> Tensor:
        """See ``interface.Kernels.estmm``."""
        shape = (experts, dy.shape[-1], x.shape[-1])
        call = self._call("estmm", ids, experts, x, dy)
        if call is None:
            return x.new_zeros(shape)
        rows, per_row = _rows(x, call.top_k)
        dweight = x.new_empty(shape)
        call.gradients(rows, dweight, _rows(dy, call.top_k)[0], None, (per_row, 1), None, dweight, None)
        return dweight

    def esfk(
        self, x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See ``interface.Kernels.esfk``."""
        call = self._call("esfk", ids, len(weight), x, weight, dy)
        if call is None:
            dbias = weight.new_zeros(weight.shape[:2]) if with_bias else None
            return x.new_zeros(x.shape), torch.zeros_like(weight), dbias
        rows, per_row = _rows(x, call.top_k)
        dx = call.row_gradients(x, per_row)
        dweight = torch.empty_like(weight)
        dbias = weight.new_empty(weight.shape[:2]) if with_bias else None
        call.gradients(rows, weight, _rows(dy, call.top_k)[0], None, (per_row, 1), dx, dweight, dbias)
        return call.summed(dx[None], per_row, x.dtype).view(x.shape), dweight, dbias

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
        """See ``interface.Kernels.forward``. Saved rows lie in the order of the choices."""
        experts, matrices, ffn, _ = gate_up.shape
        call = self._call("expert_ffn", ids, experts, x, gate_up, down)
        if call is None:
            return x.new_zeros(x.shape), x.new_zeros((ids.numel() if save else 0, matrices * ffn))
        lies = layout(gate_up, down)
        hidden, saved = call.hidden(x.contiguous(), gate_up, _packed(gate_up_bias), activation, save, lies)
        stored, turned = _lying(down, lies), lies.down_transposed
        zeroed = call.top_k == 1
        parts = call.products(hidden, stored, _packed(down_bias), _flat(weights), 1, zeroed, turned)
        y = call.summed(parts, call.top_k, x.dtype)
        return y, x.new_empty((0, matrices * ffn)) if saved is None else saved

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
        """See ``interface.Kernels.backward``; ``saved`` as ``forward`` gave it."""
        experts, matrices, ffn, _ = gate_up.shape
        call = self._call("expert_ffn", ids, experts, dy, x, gate_up, down)
        x, dy, gates, down_bias = x.contiguous(), dy.contiguous(), _flat(weights), _packed(down_bias)
        make = torch.zeros_like if call is None else torch.empty_like
        lies = layout(gate_up, down)
        ddown, dgate_up = make(down), make(gate_up)
        # As the weight's columns lie.
        dflat_bias = None if gate_up_bias is None else make(gate_up.new_empty((experts, matrices * ffn)))
        dgate_up_bias = None
        if dflat_bias is not None and lies.interleaved:
            dgate_up_bias = dflat_bias.unflatten(1, (ffn, matrices)).transpose(1, 2)
        elif dflat_bias is not None:
            dgate_up_bias = dflat_bias.unflatten(1, (matrices, ffn))
        ddown_bias = None if down_bias is None else make(down_bias)
        if call is None:
            zeros = torch.zeros_like(gates).view(weights.shape)
            return Gradients(torch.zeros_like(x), dgate_up, dgate_up_bias, ddown, ddown_bias, zeros)
        hidden = call.activated(saved, gates, down.shape[2], activation)
        dhidden, stored, dstored = torch.empty_like(hidden), _lying(down, lies), _lying(ddown, lies)
        per_row = 1, call.top_k
        call.gradients(hidden, stored, dy, gates, per_row, dhidden, dstored, ddown_bias, lies.down_transposed)
        given = (dhidden, saved, gates, dy, down_bias, activation, lies.interleaved)
        dprojected, dgates = call.activation_gradients(*given)
        del hidden, dhidden, given
        dx = call.row_gradients(x, call.top_k)
        flat, dflat = lying(gate_up, lies), lying(dgate_up, lies)
        call.gradients(x, flat, dprojected, None, (call.top_k, 1), dx, dflat, dflat_bias, lies.transposed)
        dx = call.summed(dx[None], call.top_k, x.dtype)
        return Gradients(dx, dgate_up, dgate_up_bias, ddown, ddown_bias, dgates.view(weights.shape))

    def _call(self, function: str, ids: Tensor, experts: int, *tensors: Tensor) -> "Call | None":
        """The call over these ids; None where there is nothing to compute. The tensors lie where kernels can run."""
        for tensor in (ids, *tensors):
            if tensor.device.type != ("cpu" if interpreting() else "cuda"):
                raise MoeplanError(f"{function}: device: expected tensors that Triton can reach, got {tensor.device}")
        if not ids.numel():
            return None
        from .call import Call

        call = Call(ids.contiguous(), experts, function)
        return call if experts else None


def _rows(x: Tensor, top_k: int) -> tuple[Tensor, int]:
    """[T, I], of which top_k choices share a row, or [T, K, I] -> rows of I, and how many choices share one."""
    return (x.contiguous(), top_k) if x.ndim == 2 else (x.reshape(-1, x.shape[-1]).contiguous(), 1)


def _lying(down: Tensor, lies: Layout) -> Tensor:
    """down [E, D, H] as it lies: [E, D, H] or [E, H, D]."""
    return down.transpose(1, 2) if lies.down_transposed else down


def _packed(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.contiguous()


def _flat(weights: Tensor) -> Tensor:
    """Gate weights [T, K] -> [P], one behind the other."""
    return weights.contiguous().view(-1)
