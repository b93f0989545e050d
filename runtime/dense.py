"""FFNs that every token passes: dense layers and shared experts. Letters: T tokens, D model."""

from torch import Tensor

from .kernels import dense_ffn, linear
from .norms import rms_norm
from .weights import DenseWeights


def dense(x: Tensor, weights: DenseWeights, *, kernel: str | None = None) -> Tensor:
    """Norm (where the weights have one), FFN and sigmoid gate; the caller adds the residual. x: [T, D] -> [T, D].

    ``kernel`` names an implementation of ``linear``.
    """
    if weights.norm is not None:
        x = rms_norm(x, weights.norm, weights.eps)
    y = dense_ffn(x, weights.gate_up, weights.down, activation=weights.activation, implementation=kernel)
    return y if weights.gate is None else linear(x, weights.gate, implementation=kernel).sigmoid() * y
