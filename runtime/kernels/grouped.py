"""Expert FFN on contiguous segments: sort the choices by expert once, then two products per active expert.

Letters: T tokens, D model, E experts, K top-k, H ffn columns, M 2 for a gated FFN or 1, n rows of one expert.

No row is padded, and only the rows of the expert at work are copied. Between the products activations are columns
([M H, n]): see ``product.multiply``.
"""

import torch
from torch import Tensor

from ...spec import MoeplanError
from .activation import activate
from .product import multiply


def grouped_expert_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """See ``registry.expert_ffn``."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    experts, matrices = gate_up.shape[:2]
    flat = ids.reshape(-1)
    elsewhere, *counts = torch.bincount(flat + 1, minlength=experts + 1).tolist()
    if len(counts) > experts:
        raise MoeplanError(f"expert_ffn: ids: expected -1..{experts - 1}, got {len(counts) - 1}")
    # Choices that are elsewhere (-1) come first and are left out.
    order = flat.argsort(stable=True)[elsewhere:]
    tokens = (order // max(ids.shape[1], 1)).split(counts)
    gates = weights.reshape(-1)[order].to(wide).unsqueeze(1).split(counts)
    for n, token, gate, up, back in zip(counts, tokens, gates, gate_up.flatten(1, 2), down, strict=True):
        if n:
            hidden = multiply(up, x.index_select(0, token).t())
            out = multiply(back, activate(hidden, matrices, activation, dim=0)).t()
            # Row-major before the sum: adding strided rows takes several times as long.
            y.index_add_(0, token, out.contiguous() * gate)
    return y.to(x.dtype)
