"""The router: which experts a token uses, and with which weights.

Letters: T tokens, D model, E experts, K top-k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.model import Gate, Moe
from .gates import GATES, allowed_experts
from .kernels import linear
from .norms import rms_norm
from .weights import RouterWeights

Choice = tuple[Tensor, Tensor]  # expert ids [T, K] int64, gate weights [T, K] float32
Chooser = Callable[[Tensor, Gate, int, Tensor | None], Choice]  # with the arguments of ``choose``


def choose(logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
    """Top-k of router logits [T, E] in float32 or float64, by the gate's scores (``gates.GATES``).

    The correction bias enters the choice only; with groups of experts a token uses those of some (DeepSeek-V3).
    """
    named = GATES[gate.score]
    scores = named.scores(logits)
    ranks = scores if correction_bias is None else scores + correction_bias
    if gate.groups > 1:
        ranks = ranks.masked_fill(~allowed_experts(ranks, gate), float("-inf"))
    top, ids = ranks.topk(top_k, dim=-1)
    return ids, named.weights(top if ranks is scores else scores.gather(1, ids), gate)


def route(
    x: Tensor,
    weights: RouterWeights,
    moe: Moe,
    forced: Choice | None = None,
    *,
    kernel: str | None = None,
    chooser: Chooser = choose,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the tokens and choose their experts, highest gate weight first.

    x: [T, D] -> (normalised x [T, D], expert ids [T, K] int64, gate weights [T, K] float32).
    With ``forced`` the choice is computed all the same (its cost is real), then ``forced`` is returned in its place.
    ``kernel`` names an implementation of ``linear``; ``chooser`` replaces the gate's own choice.
    """
    normed = rms_norm(x, weights.norm, weights.eps)
    logits = linear(normed, weights.weight, weights.bias, implementation=kernel)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    ids, gates = chooser(logits, moe.gate, moe.top_k, weights.correction_bias)
    return (normed, *forced) if forced is not None else (normed, ids, gates)
