"""The router: which experts a token uses, and with which weights.

Letters: T tokens, D model, E experts, K top-k.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.model import Gate, Moe
from .gates import GATES, Choice, allowed_experts, expert_choice, logits_of, with_noise
from .norms import rms_norm
from .weights import RouterWeights

Chooser = Callable[[Tensor, Gate, int, Tensor | None], Choice]  # with the arguments of ``choose``


def choose(logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
    """Top-k of router logits [T, E] in float32 or float64, by the gate's scores (``gates.GATES``).

    The correction bias enters the choice only; with groups of experts a token uses those of some (DeepSeek-V3). Where
    experts choose tokens, K is as large as they need (``gates.expert_choice``).
    """
    if gate.score == "expert_choice":
        return expert_choice(logits, gate, top_k)
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
    noise: torch.Generator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise the tokens and choose their experts, highest gate weight first.

    x: [T, D] -> (normalised x [T, D], expert ids [T, K] int64, gate weights [T, K] float32).
    With ``forced`` the choice is computed all the same (its cost is real), then ``forced`` is returned in its place.
    ``kernel`` names an implementation of ``linear``; ``chooser`` replaces the gate's own choice; ``noise`` is drawn
    from in training, by gates that have it.
    """
    normed = rms_norm(x, weights.norm, weights.eps)
    logits = logits_of(moe.gate)(normed, weights, kernel)
    if noise is not None and moe.gate.score == "noisy_topk":
        logits = with_noise(logits, normed, weights, noise)
    ids, gates = chooser(logits, moe.gate, moe.top_k, weights.correction_bias)
    return (normed, *forced) if forced is not None else (normed, ids, gates)
