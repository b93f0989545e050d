"""Root-mean-square normalisation (Zhang and Sennrich 2019)."""

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalise the last dimension in float32 (float64 stays), then scale in the type of ``x``, as Transformers does.

    x: [..., D]; weight: [D] -> [..., D] in x.dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * scaled.to(x.dtype)
