"""Activations between the two projections of an FFN."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ...spec import MoeplanError

ACTIVATIONS: dict[str, Callable[..., Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def activate(projected: Tensor, matrices: int, activation: str, dim: int = -1) -> Tensor:
    """act(gate) * up where ``projected`` holds both halves along ``dim`` (matrices 2), else act(projected)."""
    try:
        function = ACTIVATIONS[activation]
    except KeyError:
        raise MoeplanError(f"activation: expected one of {sorted(ACTIVATIONS)}, got {activation!r}") from None
    if matrices == 1:
        return function(projected)
    gate, up = projected.chunk(2, dim=dim)
    return function(gate) * up
