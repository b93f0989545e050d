"""Activations between the two projections of an FFN, and their derivatives.

An activation is a text: ``silu``, ``gelu``, ``gelu_tanh`` (the approximation), ``relu``, ``relu2`` (its square), of the
gate where there is one, or the clamped SwiGLU with its three numbers, ``swiglu_clamped(slope, limit, shift)``: gate at
most limit, up within -limit..limit, (up + shift) gate sigmoid(slope gate). ``swiglu_clamped`` alone is gpt-oss's,
(1.702, 7.0, 1.0); DeepSeek-V4's is (1.0, 10.0, 0.0).
"""

import math
import re
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...spec import MoeplanError

CLAMPED = "swiglu_clamped"


class Activation(NamedTuple):
    """kind: the name before the numbers; these count for ``swiglu_clamped`` only."""

    kind: str
    slope: float = 1.702
    limit: float = 7.0
    shift: float = 1.0


def _relu2_backward(grad: Tensor, x: Tensor) -> Tensor:
    return grad * 2 * F.relu(x)


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu2": lambda x: F.relu(x).square(),
}
_BACKWARD: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": torch.ops.aten.silu_backward,
    "gelu": torch.ops.aten.gelu_backward,
    "gelu_tanh": partial(torch.ops.aten.gelu_backward, approximate="tanh"),
    "relu": lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0),
    "relu2": _relu2_backward,
}
_NUMBERS = re.compile(rf"{CLAMPED}\(([^,()]+),([^,()]+),([^,()]+)\)")


def clamped(slope: float, limit: float, shift: float) -> str:
    """The clamped SwiGLU with these numbers, as every ``activation`` argument takes it."""
    return f"{CLAMPED}({float(slope)!r}, {float(limit)!r}, {float(shift)!r})"


@cache
def parse_activation(activation: str) -> Activation:
    """Kind and numbers; MoeplanError for a text that is no activation."""
    if activation in ACTIVATIONS or activation == CLAMPED:
        return Activation(activation)
    if found := _NUMBERS.fullmatch(activation):
        try:
            slope, limit, shift = (float(number) for number in found.groups())
        except ValueError:
            pass
        else:
            # Infinite limits are none; the kernels hold the numbers in float32.
            if all(abs(n) < 1e30 for n in (slope, shift)) and 0 < limit <= math.inf:
                return Activation(CLAMPED, slope, min(limit, 1e30), shift)
    names = [*sorted(ACTIVATIONS), CLAMPED, f"{CLAMPED}(slope, limit, shift)"]
    raise MoeplanError(f"activation: expected one of {names}, got {activation!r}")


def check_activation(activation: str, matrices: int) -> None:
    """Raises MoeplanError for an unknown text, or for ``swiglu_clamped`` of an FFN that is not gated."""
    if parse_activation(activation).kind == CLAMPED and matrices != 2:
        raise MoeplanError(f"activation: expected gate and up for {activation!r}, got {matrices} matrix")


def activate(projected: Tensor, matrices: int, activation: str, dim: int = -1) -> Tensor:
    """act(gate) * up where ``projected`` holds both halves along ``dim`` (matrices 2), else act(projected)."""
    check_activation(activation, matrices)
    kind, slope, limit, shift = parse_activation(activation)
    if matrices == 1:
        return ACTIVATIONS[kind](projected)
    gate, up = projected.chunk(2, dim=dim)
    if kind == CLAMPED:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        return (up + shift) * gate * torch.sigmoid(slope * gate)
    return ACTIVATIONS[kind](gate) * up


def activate_backward(grad: Tensor, projected: Tensor, matrices: int, activation: str, dim: int = -1) -> Tensor:
    """Gradient of ``projected`` from that of ``activate(projected, …)``; a clamped value has none."""
    check_activation(activation, matrices)
    kind, slope, limit, shift = parse_activation(activation)
    if matrices == 1:
        return _BACKWARD[kind](grad, projected)
    gate, up = projected.chunk(2, dim=dim)
    if kind == CLAMPED:
        inside = gate <= limit, up.abs() <= limit
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        sigmoid = torch.sigmoid(slope * gate)
        rise = sigmoid * (1 + slope * gate * (1 - sigmoid))
        return torch.cat([grad * (up + shift) * rise * inside[0], grad * gate * sigmoid * inside[1]], dim=dim)
    return torch.cat([_BACKWARD[kind](grad * up, gate), grad * ACTIVATIONS[kind](gate)], dim=dim)
