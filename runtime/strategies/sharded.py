"""Sharded experts: all tokens to all devices, each device a slice of the FFN columns of every expert.

T tokens of all devices, D model, K top-k, G devices. The slices may be unequal, also empty (HEXA's model-centric
computing, MoEShard): every device does its share of every expert, so routing skew cannot unbalance them.
"""

from itertools import accumulate

import torch
from torch import Tensor

from ...spec.plan import LayerPlan
from ..collectives import all_gather, all_to_all
from ..kernels import expert_ffn
from ..layout import Layout
from .layer import Lap, LayerContext, Stored
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
        self._activation = c.moe.activation
        assert plan.split is not None
        ends = list(accumulate(plan.split, initial=0))
        self.stored = Stored(experts=tuple(range(c.moe.num_experts)), columns=(ends[c.rank], ends[c.rank + 1]))

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self._gate_up, self._down = gate_up, down

    def start(self) -> bool:
        """Nothing to fetch: the weights stay."""
        return False

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        tokens, mine, devices = layout.tokens, len(x), len(layout.tokens)
        rows = all_gather(pack(x, ids, weights), tokens)
        everyone = unpack(rows, x.shape[1], x.dtype, ids.shape[1])
        lap("dispatch")
        if self._down.shape[2]:
            y = expert_ffn(everyone[0], self._gate_up, self._down, *everyone[1:], activation=self._activation)
        else:
            y = torch.zeros_like(everyone[0])
        lap("expert")
        partials = all_to_all(y, tokens, [mine] * devices).view(devices, mine, x.shape[1])
        y = combine(partials, residual)
        lap("combine")
        return y
