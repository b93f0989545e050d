"""Expert FFN in its plainest form: the definition that every other kernel is tested against."""

import torch
from torch import Tensor

from ...spec import MoeplanError
from .dense import dense_ffn


def reference_expert_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, activation: str
) -> Tensor:
    """See ``registry.expert_ffn``. One expert after the other, out of place."""
    experts = len(gate_up)
    if ids.numel() and int(ids.max()) >= experts:
        raise MoeplanError(f"expert_ffn: ids: expected -1..{experts - 1}, got {int(ids.max())}")
    wide = torch.promote_types(x.dtype, torch.float32)
    y = torch.zeros(x.shape, dtype=wide, device=x.device)
    for e in range(experts):
        token, choice = torch.where(ids == e)
        if len(token):
            out = dense_ffn(x[token], gate_up[e], down[e], activation=activation)
            y = y.index_add(0, token, out.to(wide) * weights[token, choice, None])
    return y.to(x.dtype)
