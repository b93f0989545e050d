"""Sharded experts: all tokens to all devices, each device a slice of the FFN columns of every expert.

T tokens of all devices, D model, K top-k, G devices. The slices may be unequal, also empty (HEXA's model-centric
computing, MoEShard): every device does its share of every expert, so routing skew cannot unbalance them.

In chunks, all of them begin to travel at once; the columns of one are computed while the next ones come, and its
partial rows leave while the next is computed.
"""

from itertools import accumulate

import torch
from torch import Tensor

from ...spec.layout import even
from ...spec.plan import LayerPlan
from ..collectives import all_to_all_start, gather_start
from ..layout import Layout
from .layer import Experts, Lap, LayerContext, Stored, experts_of
from .rows import empty_rows, fields, unpack

__all__ = ["Sharded", "combine", "pack", "unpack"]


def pack(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """x [T, D], ids [T, K], weights [T, K] f32 -> rows [T, row bytes]; the ids are those of all experts."""
    rows = empty_rows(len(x), x, ids.shape[1])
    row_x, row_ids, row_weights = fields(rows, x.shape[1], x.dtype, ids.shape[1])
    row_x.copy_(x)
    row_ids.copy_(ids)
    row_weights.copy_(weights)
    return rows


def combine(partials: Tensor, residual: Tensor) -> Tensor:
    """residual [T, D] plus the devices' partial rows [G, T, D]; summed in f32."""
    return (partials.sum(0, dtype=torch.float32) + residual).to(residual.dtype)


class Sharded:
    """One layer; see ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        c = context
        self._activation, self._chunks, self._group = c.moe.activation, plan.chunks, c.group
        assert plan.split is not None
        ends = list(accumulate(plan.split, initial=0))
        self._columns = plan.split[c.rank]
        self.stored = Stored(experts=tuple(range(c.moe.num_experts)), columns=(ends[c.rank], ends[c.rank + 1]))

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self.hold(experts_of(gate_up, down, self._activation))

    def hold(self, experts: Experts) -> None:
        """What computes this device's columns, in the place of ``prepare``."""
        self._experts = experts

    def start(self) -> bool:
        """Nothing to fetch: the weights stay."""
        return False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        hidden, top_k, devices = x.shape[1], ids.shape[1], len(layout.tokens)
        own = even(len(x), self._chunks)
        held = list(zip(*(even(tokens, self._chunks) for tokens in layout.tokens), strict=True))  # [chunks][G]
        arriving = [
            gather_start(rows, tokens, self._group)
            for rows, tokens in zip(pack(x, ids, weights).split(own), held, strict=True)
        ]
        lap("dispatch")
        leaving = []
        for (rows, pending), mine, tokens in zip(arriving, own, held, strict=True):
            pending.wait()
            everyone = unpack(rows, hidden, x.dtype, top_k)
            lap("dispatch")
            y = self._compute(*everyone)
            lap("expert")
            leaving.append(all_to_all_start(y, tokens, [mine] * devices, self._group))
        sums = []
        for (partials, pending), mine, part in zip(leaving, own, residual.split(own), strict=True):
            pending.wait()
            sums.append(combine(partials.view(devices, mine, hidden), part))
        lap("combine")
        return sums[0] if len(sums) == 1 else torch.cat(sums)

    def _compute(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """Partial output [T, D] of this device's columns for tokens [T, D] of all devices."""
        if not self._columns:
            return torch.zeros_like(x)
        return self._experts(x, ids, weights)
