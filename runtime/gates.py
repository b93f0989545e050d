"""The gates by name (``spec.model.Gate.score``): from a token's state to experts and their weights.

Letters: T tokens, D model, R rank, E experts (identity experts included), K top-k, C tokens that an expert takes.

- A token gate gives every expert a logit and a score; a token's highest scores (with a correction bias, within its
  groups) are chosen, and gate weights are made of the chosen scores. ``GATES`` has them all.
- Expert choice turns it round: every expert chooses tokens.

SoftMoE is left out: every expert computes weighted means of all tokens, and every token gets one of all experts. No
token goes to an expert, so that there is nothing to place, to dispatch or to record.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spec.model import Gate
from .kernels import linear
from .weights import RouterWeights

Choice = tuple[Tensor, Tensor]  # expert ids [T, K] int64, gate weights [T, K] float32


class TokenGate(NamedTuple):
    """logits: normalised tokens [T, D] -> [T, E] in float32 or float64, with the kernel of ``linear`` or None.

    scores: logits [T, E] -> [T, E]; weights: scores of the chosen experts [T, K] -> gate weights [T, K]; group_best: so
    many of a group's best experts together are the group's rank.
    """

    logits: Callable[[Tensor, RouterWeights, str | None], Tensor]
    scores: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, Gate], Tensor]
    group_best: int


def wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def linear_logits(x: Tensor, weights: RouterWeights, kernel: str | None) -> Tensor:
    return wide(linear(x, weights.weight, weights.bias, implementation=kernel))


def cosine_logits(x: Tensor, weights: RouterWeights, kernel: str | None) -> Tensor:
    """Cosines of the projected token and the experts' embeddings, over a learned temperature."""
    assert weights.projection is not None
    assert weights.temperature is not None
    token = wide(linear(x, weights.projection, implementation=kernel))
    expert = wide(weights.weight)
    return F.normalize(token, dim=-1) @ F.normalize(expert, dim=-1).t() / wide(weights.temperature)


def with_noise(logits: Tensor, x: Tensor, weights: RouterWeights, generator: torch.Generator) -> Tensor:
    """Training logits of a noisy gate: normal noise, whose size a token and an expert have learned. x: [T, D]."""
    assert weights.noise is not None
    size = F.softplus(wide(linear(x, weights.noise)))
    drawn = torch.randn(logits.shape, generator=generator, dtype=logits.dtype, device=logits.device)
    return logits + drawn * size


def softmax_all(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


def logits_themselves(logits: Tensor) -> Tensor:
    return logits


def softmax_chosen(scores: Tensor, gate: Gate) -> Tensor:
    return scores.softmax(-1) * gate.scale


def shares(scores: Tensor, gate: Gate) -> Tensor:
    """The scores, divided by their sum where the gate normalises."""
    if gate.normalize:
        scores = scores / (scores.sum(-1, keepdim=True) + 1e-20)
    return scores * gate.scale if gate.scale != 1.0 else scores


GATES: dict[str, TokenGate] = {
    # Mixtral, Qwen3-MoE, OLMoE; with groups DeepSeek-V2
    "softmax": TokenGate(linear_logits, softmax_all, shares, 1),
    # gpt-oss
    "softmax_topk": TokenGate(linear_logits, logits_themselves, softmax_chosen, 1),
    # with correction bias and groups DeepSeek-V3
    "sigmoid": TokenGate(linear_logits, torch.sigmoid, shares, 2),
    # GShard; noise in training only (``with_noise``)
    "noisy_topk": TokenGate(linear_logits, logits_themselves, softmax_chosen, 1),
    # X-MoE
    "cosine": TokenGate(cosine_logits, softmax_all, shares, 1),
}


def logits_of(gate: Gate) -> Callable[[Tensor, RouterWeights, str | None], Tensor]:
    """See ``TokenGate.logits``; where experts choose tokens they are linear too."""
    return linear_logits if gate.score == "expert_choice" else GATES[gate.score].logits


def allowed_experts(ranks: Tensor, gate: Gate) -> Tensor:
    """[T, E] bool: experts of the token's best ``top_groups`` groups. ranks: [T, E]."""
    grouped = ranks.view(len(ranks), gate.groups, ranks.shape[1] // gate.groups)
    best = min(GATES[gate.score].group_best, grouped.shape[2])
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(gate.top_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, chosen, True)
    return allowed.unsqueeze(2).expand_as(grouped).flatten(1)


def expert_choice(logits: Tensor, gate: Gate, top_k: int) -> Choice:
    """Every expert takes the C tokens that score highest for it by softmax over experts, ties by number.

    C = T * K / E, rounded up, so that a token has K experts on average: some have more, some none. Ids and weights have
    the width of the token with most experts, one at least; empty places have id -1 and weight 0.
    """
    tokens, experts = logits.shape
    scores = logits.softmax(-1)
    count = min(tokens, -(-tokens * top_k // experts))
    taken = scores.argsort(dim=0, descending=True, stable=True)[:count]  # [C, E]
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter_(0, taken, True)
    width = max(1, int(chosen.sum(1).max())) if tokens else 1
    best, ids = scores.masked_fill(~chosen, -1.0).topk(width, dim=-1)
    empty = best < 0
    return ids.masked_fill(empty, -1), shares(best.masked_fill(empty, 0.0), gate)
