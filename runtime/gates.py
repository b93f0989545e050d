"""The gates by name (``spec.model.Gate.score``): how router logits become an order of experts and their weights.

Letters: T tokens, E experts, K chosen experts.

A gate scores every expert of a token; the highest scores (with a correction bias, within the token's groups) are
chosen, and gate weights are made of the chosen scores.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..spec.model import Gate


class TokenGate(NamedTuple):
    """scores: logits [T, E] -> [T, E]; weights: scores of the chosen experts [T, K] -> gate weights [T, K];
    group_best: so many of a group's best experts together are the group's rank."""

    scores: Callable[[Tensor], Tensor]
    weights: Callable[[Tensor, Gate], Tensor]
    group_best: int


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
    "softmax": TokenGate(softmax_all, shares, 1),  # Mixtral, Qwen3-MoE, OLMoE; with groups DeepSeek-V2
    "softmax_topk": TokenGate(logits_themselves, softmax_chosen, 1),  # gpt-oss
    "sigmoid": TokenGate(torch.sigmoid, shares, 2),  # with correction bias and groups DeepSeek-V3
}


def allowed_experts(ranks: Tensor, gate: Gate) -> Tensor:
    """[T, E] bool: experts of the token's best ``top_groups`` groups. ranks: [T, E]."""
    grouped = ranks.view(len(ranks), gate.groups, ranks.shape[1] // gate.groups)
    best = min(GATES[gate.score].group_best, grouped.shape[2])
    chosen = grouped.topk(best, dim=-1).values.sum(-1).topk(gate.top_groups, dim=-1).indices
    allowed = torch.zeros(grouped.shape[:2], dtype=torch.bool, device=ranks.device).scatter_(1, chosen, True)
    return allowed.unsqueeze(2).expand_as(grouped).flatten(1)
