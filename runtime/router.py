"""The router: which experts a token uses, and with which weights.

A model may have identity experts (LongCat-Flash): router outputs behind those of its experts, whose output is the
normalised token itself. They are on every device: their part is added where the token is, and nothing is sent for them.

Letters: T tokens, D model, E experts, Z identity experts, K top-k.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.model import Gate, Moe
from .gates import GATES, Choice, allowed_experts, expert_choice, logits_of, with_noise
from .norms import rms_norm
from .weights import RouterWeights

Chooser = Callable[[Tensor, Gate, int, Tensor | None], Choice]  # with the arguments of ``choose``


def choose(logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
    """Top-k of router logits [T, E + Z] in float32 or float64, by the gate's scores (``gates.GATES``).

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

    x: [T, D] -> (normalised x [T, D], expert ids [T, K] int64, gate weights [T, K] float32). Identity experts have the
    ids from E on, or -1 where the choice is ``forced``.
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


class Routed(NamedTuple):
    """Tokens and their experts, as strategies take them.

    normed: [T, D]; ids: [T, K] int64, -1 for identity experts; weights: [T, K] float32, 0 for these; identity: [T]
    float32 sums of their weights, None where the model has none.
    """

    normed: Tensor
    ids: Tensor
    weights: Tensor
    identity: Tensor | None

    def onto(self, residual: Tensor) -> Tensor:
        """residual [T, D] plus the identity experts' output; summed in f32."""
        return add_identity(residual, self.normed, self.identity)


def add_identity(residual: Tensor, normed: Tensor, identity: Tensor | None) -> Tensor:
    """residual [T, D] plus normed [T, D] by the weights ``identity`` [T] float32; summed in f32."""
    if identity is None:
        return residual
    return (residual + identity.unsqueeze(1) * normed).to(residual.dtype)


def routed(
    x: Tensor, weights: RouterWeights, moe: Moe, forced: Choice | None = None, *, chooser: Chooser = choose
) -> Routed:
    """``route``, with the choices of identity experts told apart."""
    normed, ids, gates = route(x, weights, moe, forced, chooser=chooser)
    if not moe.zero_experts:
        return Routed(normed, ids, gates, None)
    identity = (ids < 0) | (ids >= moe.num_experts)
    gates, sums = gates.masked_fill(identity, 0.0), gates.masked_fill(~identity, 0.0).sum(1)
    return Routed(normed, ids.masked_fill(identity, -1), gates, sums)
