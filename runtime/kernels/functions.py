"""The kernels as functions: what the runtime and users call. Each chooses an implementation (``registry``).

Letters as in ``interface``, which says what every operator computes. All work under ``torch.compile``.
"""

import torch
from torch import Tensor

from . import autograd as _derivatives  # noqa: F401 registers them
from .registry import choose

ops = torch.ops.moeplan


def expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    activation: str,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Gate-weighted sum of the chosen experts' FFNs: y[t] = sum over k of weights[t, k] * FFN_{ids[t, k]}(x[t]).

    x: [T, D]; gate_up: [E, M, H, D]; down: [E, D, H]; ids: [T, K] int32 or int64, local expert numbers, -1 for an
    expert that is not here; weights: [T, K] float32; gate_up_bias: [E, M, H]; down_bias: [E, D] -> [T, D] in x.dtype,
    accumulated in float32 (float64 stays). gate_up and down are contiguous, or views that ``weights_of`` gives.
    activation: silu, gelu, gelu_tanh, relu or relu2, of the gate where there is one, gpt-oss's swiglu_clamped, or
    swiglu_clamped(slope, limit, shift) with numbers (see ``activation``). Dropless: every id counts. Differentiable
    once in all but ids.
    Raises MoeplanError naming the argument, what was expected and what came.
    """
    name = choose(implementation, x.device.type, x.dtype)
    given = (x, gate_up, gate_up_bias, down, down_bias, weights)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    y, _ = ops.expert_ffn.default(x, gate_up, gate_up_bias, down, down_bias, ids, weights, activation, name, save)
    return y


def esmm(
    x: Tensor, weight: Tensor, ids: Tensor, *, bias: Tensor | None = None, implementation: str | None = None
) -> Tensor:
    """y[t, k] = weight[e] x_row + bias[e] with e = ids[t, k]; zeros where it is -1.

    x: [T, I] or [T, K, I]; weight: [E, O, I]; bias: [E, O] -> [T, K, O]. Raises as ``expert_ffn``.
    """
    return ops.esmm.default(x, weight, bias, ids, choose(implementation, x.device.type, x.dtype))


def ess(dy: Tensor, ids: Tensor, experts: int, *, implementation: str | None = None) -> Tensor:
    """Sum of each expert's rows: dy [T, K, O], ids [T, K] -> [E, O]. Raises as ``expert_ffn``."""
    return ops.ess.default(dy, ids, experts, choose(implementation, dy.device.type, dy.dtype))


def estmm(x: Tensor, dy: Tensor, ids: Tensor, experts: int, *, implementation: str | None = None) -> Tensor:
    """Each expert's sum of dy_row^T x_row: x [T, I] or [T, K, I], dy [T, K, O] -> [E, O, I]. Raises as they do."""
    return ops.estmm.default(x, dy, ids, experts, choose(implementation, x.device.type, x.dtype))


def esfk(
    x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, *, with_bias: bool = False, implementation: str | None = None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Backward of ``esmm`` in one: gradients of x, weight and, ``with_bias``, of the bias. Raises as ``expert_ffn``."""
    name = choose(implementation, x.device.type, x.dtype)
    dx, dweight, dbias = ops.esfk.default(x, weight, dy, ids, with_bias, name)
    return dx, dweight, dbias if with_bias else None
