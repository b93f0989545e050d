"""The router: which experts a token uses, and with which weights.

Letters: T tokens, D model, E experts, K top-k.
"""

import torch
from torch import Tensor

from ..spec.model import Gate, Moe
from .kernels import linear
from .norms import rms_norm
from .weights import RouterWeights

Choice = tuple[Tensor, Tensor]  # expert ids [T, K] int64, gate weights [T, K] float32


def route(
    x: Tensor, weights: RouterWeights, moe: Moe, forced: Choice | None = None, *, kernel: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the tokens and choose their experts, highest gate weight first.

    x: [T, D] -> (normalised x [T, D], expert ids [T, K] int64, gate weights [T, K] float32).
    With ``forced`` the choice is computed all the same (its cost is real), then ``forced`` is returned in its place.
    ``kernel`` names an implementation of ``linear``.
    """
    normed = rms_norm(x, weights.norm, weights.eps)
    logits = linear(normed, weights.weight, weights.bias, implementation=kernel)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids, gates = choose(logits, moe.gate, moe.top_k, weights.correction_bias)
    return (normed, *forced) if forced is not None else (normed, ids, gates)


def choose(logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
    """Top-k of router logits [T, E] in float32 or float64.

    Softmax over all experts (Mixtral, Qwen3-MoE, OLMoE), softmax over the chosen (gpt-oss), or sigmoid with a
    correction bias that enters the choice only and groups of experts of which a token may use some (DeepSeek-V3).
    """
    if gate.score == "softmax_topk":
        top, ids = logits.topk(top_k, dim=-1)
        return ids, top.softmax(-1) * gate.scale
    scores = logits.sigmoid() if gate.score == "sigmoid" else logits.softmax(-1)
    ranks = scores if correction_bias is None else scores + correction_bias
    if gate.groups > 1:
        ranks = _limit_groups(ranks, gate)
    top, ids = ranks.topk(top_k, dim=-1)
    gates = scores.gather(1, ids) if ranks is not scores else top
    if gate.normalize:
        gates = gates / (gates.sum(-1, keepdim=True) + 1e-20)
    return ids, gates * gate.scale if gate.scale != 1.0 else gates


def _limit_groups(ranks: Tensor, gate: Gate) -> Tensor:
    """Rule out experts outside the token's best ``top_groups`` groups.

    A group's rank is its best expert (softmax: DeepSeek-V2) or the sum of its best two (sigmoid: DeepSeek-V3).
    """
    grouped = ranks.view(len(ranks), gate.groups, -1)
    best = min(2 if gate.score == "sigmoid" else 1, grouped.shape[2])
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(gate.top_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, chosen, True)
    return grouped.masked_fill(~allowed[:, :, None], float("-inf")).flatten(1)
