"""Dense feed-forward network: every token, one set of weights."""

from torch import Tensor

from .activation import activate
from .product import linear


def dense_ffn(x: Tensor, gate_up: Tensor, down: Tensor, *, activation: str) -> Tensor:
    """x: [T, D]; gate_up: [M, H, D], [0] gate and [1] up with M = 2; down: [D, H] -> [T, D]."""
    return linear(activate(linear(x, gate_up.flatten(0, 1)), gate_up.shape[0], activation), down)
