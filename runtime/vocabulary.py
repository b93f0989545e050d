"""What stands outside the layers: token embedding and output projection."""

import torch.nn.functional as F
from torch import Tensor

from .kernels import linear
from .norms import rms_norm


def embed(tokens: Tensor, embedding: Tensor) -> Tensor:
    """tokens: [T] integers; embedding: [V, D] -> [T, D]."""
    return F.embedding(tokens, embedding)


def head(x: Tensor, norm: Tensor, eps: float, weight: Tensor, *, kernel: str | None = None) -> Tensor:
    """Final norm and output projection. x: [T, D]; norm: [D]; weight: [V, D] -> logits [T, V].

    ``kernel`` names an implementation of ``linear``.
    """
    return linear(rms_norm(x, norm, eps), weight, implementation=kernel)
