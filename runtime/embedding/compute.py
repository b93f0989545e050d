"""What a device's experts compute: by moeplan's kernels where a module's form is theirs, else by its own functions.

T tokens, K top-k, D model, E experts held here, H FFN columns held here, M matrices into the FFN.
"""

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import expert_ffn, weights_of
from ..strategies.layer import Experts
from .activation import activation_of
from .form import Form, tensors_of


def own_experts(module: nn.Module, form: Form) -> Experts:
    """With the tensors that the module has when they are called."""

    def experts(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return experts_from(module, form, list(tensors_of(module, form)))(x, ids, weights)

    return experts


def experts_from(module: nn.Module, form: Form, tensors: Sequence[Tensor]) -> Experts:
    """With these tensors, in the order of ``Form.names``."""
    activation = kernel_activation(module, form)
    if activation is not None:
        return partial(_by_kernel, form, activation, tensors)
    return partial(_by_module, module, form, tensors)


def kernel_activation(module: nn.Module, form: Form) -> str | None:
    """The kernels' text of the activation, where they take experts of this form; None where they do not."""
    return None if form.post_norm else activation_of(module, form)


def _by_kernel(
    form: Form, activation: str, tensors: Sequence[Tensor], x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    wide, down, *biases = tensors
    views = weights_of(
        wide,
        down,
        biases[0] if biases else None,
        gated=form.gated,
        transposed=form.transposed,
        interleaved=not form.concatenated,
    )
    y = expert_ffn(
        x.to(wide.dtype),
        views.gate_up,
        views.down,
        ids,
        weights,
        activation=activation,
        gate_up_bias=views.gate_up_bias,
        down_bias=biases[1] if biases else None,
    )
    return y.to(x.dtype)


def _by_module(
    module: nn.Module, form: Form, tensors: Sequence[Tensor], x: Tensor, ids: Tensor, weights: Tensor
) -> Tensor:
    """One expert after the other, with the module's own gate, activation and norm; summed in f32 (f64 stays)."""
    wide, down, *biases = tensors
    flat, top_k = ids.flatten(), ids.shape[1]
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat + 1, minlength=len(down) + 1).tolist()  # the first: of no expert here
    gates, inner = weights.flatten(), x.to(wide.dtype)
    total = torch.zeros(x.shape, dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    first = counts[0]
    for e, count in enumerate(counts[1:]):
        if not count:
            continue
        choices = order[first : first + count]
        first += count
        rows = choices // top_k
        h = _linear(inner.index_select(0, rows), wide[e], biases[0][e] if biases else None, form.transposed)
        h = module._apply_gate(h) if form.gated else module.act_fn(h)  # type: ignore[operator]
        y = _linear(h.to(down.dtype), down[e], biases[1][e] if biases else None, form.transposed)
        if form.post_norm:
            y = module.post_expert_norm(y)  # type: ignore[operator]
        total.index_add_(0, rows, (y * gates.index_select(0, choices).unsqueeze(1)).to(total.dtype))
    return total.to(x.dtype)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    return F.linear(x, weight.t() if transposed else weight, bias)
