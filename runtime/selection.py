"""Batch-aware selection: fewer distinct experts in a decoding step, whose time grows with them (Lynx, piggyback).

Letters: T tokens here, E experts, K top-k, C columns of votes.

The batch is all tokens of the step on all devices. Each device counts votes for every expert, whole numbers that are
summed over devices, so that the result does not depend on who holds which token. All devices then know the batch's
active experts, and each token takes its experts from them, in its own order:

- Its order: experts by the gate's score with the correction bias, ties by number; experts outside the token's groups
  come after all others. Its first K are its own choices.
- It uses the first K active experts of its order; fewer only where fewer are active.

``lynx:M`` (after Lynx, arXiv 2411.08982, which does not publish its thresholds; this rule is ours). A token votes for
its own choices. A choice whose logit is g nats below that of the token's first counts in bin floor(g / WIDTH), at most
BINS - 1. A token is confident if its second choice's logit is CONFIDENT nats or more below its first's, or it has no
second. Experts are ordered by how many confident tokens have them first, then by their votes in bin 0, then in bin 1,
and so on, ties by number; the first M are active. The gate then weighs as if the others did not exist (a softmax over
all experts is one over the active). At M of all chosen experts or more the output is the exact one.

``piggyback:N`` (after OEA, arXiv 2511.02237). The first N choices of every token are active. Gate weights are made of
the scores as they are. At N = K the output is the exact one.

Shared experts are no part of the choice and always stay.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from ..spec.model import Gate
from ..spec.selection import Selection
from .gates import GATES, Choice, allowed_experts

WIDTH, BINS = 1.0, 4  # nats of a bin; bins
CONFIDENT = 1.0  # nats

AddUp = Callable[[Tensor], Tensor]


class Selector:
    """A ``router.Chooser`` of one rule; ``add_up`` sums votes [E, C] over devices: without it the tokens are all there
    are."""

    def __init__(self, selection: Selection, add_up: AddUp = lambda votes: votes) -> None:
        self.selection, self._add_up = selection, add_up

    def __call__(self, logits: Tensor, gate: Gate, top_k: int, correction_bias: Tensor | None = None) -> Choice:
        """As ``router.choose``, on all devices at the same time, also those without tokens."""
        order = preference(logits, gate, correction_bias)
        count = lynx_votes if self.selection.rule == "lynx" else piggyback_votes
        votes = self._add_up(count(logits, order[:, :top_k], self.selection.keep))
        activate = lynx_active if self.selection.rule == "lynx" else piggyback_active
        active = activate(votes, self.selection.keep)
        if self.selection.rule == "lynx":
            logits = logits.masked_fill(~active, float("-inf"))
        ids = first_active(order, active, top_k)
        named = GATES[gate.score]
        return ids, named.weights(named.scores(logits).gather(1, ids), gate)


def preference(logits: Tensor, gate: Gate, correction_bias: Tensor | None = None) -> Tensor:
    """Every token's order of all experts [T, E] int64."""
    scores = GATES[gate.score].scores(logits)
    ranks = scores if correction_bias is None else scores + correction_bias
    order = ranks.argsort(dim=-1, descending=True, stable=True)
    if gate.groups == 1:
        return order
    outside = ~allowed_experts(ranks, gate)
    return order.gather(1, outside.gather(1, order).byte().argsort(dim=-1, stable=True))


def lynx_votes(logits: Tensor, own: Tensor, keep: int) -> Tensor:
    """[E, 1 + BINS] int64: confident tokens that have the expert first, and votes by bin. own: [T, K] choices."""
    experts = logits.shape[1]
    chosen = logits.gather(1, own)
    gap = chosen[:, :1] - chosen  # [T, K]; with a correction bias it may be negative
    bins = (gap / WIDTH).floor().clamp(0, BINS - 1).long()
    columns = 1 + BINS
    votes = torch.bincount((own * columns + 1 + bins).flatten(), minlength=experts * columns).view(experts, columns)
    sure = own[:, 0] if own.shape[1] == 1 else own[gap[:, 1] >= CONFIDENT, 0]
    votes[:, 0] = torch.bincount(sure, minlength=experts)
    return votes


def lynx_active(votes: Tensor, keep: int) -> Tensor:
    """[E] bool: the first ``keep`` experts by their votes [E, C], column after column."""
    order = torch.arange(len(votes), device=votes.device)
    for column in votes.t().flip(0):
        order = order[column[order].argsort(descending=True, stable=True)]
    return torch.zeros(len(votes), dtype=torch.bool, device=votes.device).index_fill_(0, order[:keep], True)


def piggyback_votes(logits: Tensor, own: Tensor, keep: int) -> Tensor:
    """[E, 1] int64: tokens that have the expert among their first ``keep``."""
    return torch.bincount(own[:, :keep].flatten(), minlength=logits.shape[1])[:, None]


def piggyback_active(votes: Tensor, keep: int) -> Tensor:
    """[E] bool: experts with votes."""
    return votes[:, 0] > 0


def first_active(order: Tensor, active: Tensor, top_k: int) -> Tensor:
    """[T, min(K, active experts)] int64: each token's first active experts. order: [T, E]; active: [E] bool."""
    count = min(top_k, int(active.sum()))
    here = active[order]
    return order[here & (here.cumsum(1) <= count)].view(len(order), count)
