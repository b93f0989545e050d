"""Activations between the two projections of an FFN, and their derivatives.

``swiglu_clamped`` is that of gpt-oss: gate at most 7, up within -7..7, (up + 1) gate sigmoid(1.702 gate).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec import MoeplanError

CLAMP, SLOPE = 7.0, 1.702
CLAMPED = "swiglu_clamped"

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
}


def check_activation(activation: str, matrices: int) -> None:
    """Raises MoeplanError for an unknown name, or for ``swiglu_clamped`` of an FFN that is not gated."""
    if activation not in ACTIVATIONS and activation != CLAMPED:
        raise MoeplanError(f"activation: expected one of {sorted((*ACTIVATIONS, CLAMPED))}, got {activation!r}")
    if activation == CLAMPED and matrices != 2:
        raise MoeplanError(f"activation: expected gate and up for {CLAMPED!r}, got {matrices} matrix")


def activate(projected: Tensor, matrices: int, activation: str, dim: int = -1) -> Tensor:
    """act(gate) * up where ``projected`` holds both halves along ``dim`` (matrices 2), else act(projected)."""
    check_activation(activation, matrices)
    if matrices == 1:
        return ACTIVATIONS[activation](projected)
    gate, up = projected.chunk(2, dim=dim)
    if activation == CLAMPED:
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        return (up + 1) * gate * torch.sigmoid(SLOPE * gate)
    return ACTIVATIONS[activation](gate) * up


def activate_backward(grad: Tensor, projected: Tensor, matrices: int, activation: str, dim: int = -1) -> Tensor:
    """Gradient of ``projected`` from that of ``activate(projected, …)``; a clamped value has none."""
    check_activation(activation, matrices)
    if matrices == 1:
        return _BACKWARD[activation](grad, projected)
    gate, up = projected.chunk(2, dim=dim)
    if activation == CLAMPED:
        inside = gate <= CLAMP, up.abs() <= CLAMP
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        sigmoid = torch.sigmoid(SLOPE * gate)
        slope = sigmoid * (1 + SLOPE * gate * (1 - sigmoid))
        return torch.cat([grad * (up + 1) * slope * inside[0], grad * gate * sigmoid * inside[1]], dim=dim)
    return torch.cat([_BACKWARD[activation](grad * up, gate), grad * ACTIVATIONS[activation](gate)], dim=dim)
