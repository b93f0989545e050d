"""Gathered experts: the weights travel to the tokens, which stay where they are.

T tokens of this device, D model, E experts, H FFN columns, M matrices into the FFN (2 gated, 1 plain).

Each expert rests on one device. When a layer begins, every device starts to bring all of the layer's experts into the
one region that all layers share; attention runs meanwhile; the experts wait for what is still missing (HEXA's
data-centric computing with its shared cache). Devices may hold unequal numbers of experts and of tokens.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from ...spec.plan import LayerPlan
from ..collectives import Pending, all_gather_start
from ..layout import Layout
from .layer import Experts, Lap, LayerContext, Stored, experts_of

__all__ = ["Gathered", "combine"]


def combine(y: Tensor, residual: Tensor) -> Tensor:
    """Both [T, D]."""
    return residual + y


def _by_kernels(activation: str, weights: Sequence[Tensor]) -> Experts:
    gate_up, down = weights
    return experts_of(gate_up, down, activation)


class Gathered:
    """One layer; see ``strategies.Strategy``."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        c = self._context = context
        owned = plan.resting()
        self._counts = [len(experts) for experts in owned]
        self.stored = Stored(experts=tuple(owned[c.rank]), columns=(0, c.moe.ffn_size))
        order = torch.tensor([e for experts in owned for e in experts])
        # [E + 1] where an expert lies in the region; the last is that of expert -1, which is none
        self._position = torch.cat([torch.argsort(order), torch.tensor([-1])]).to(c.device)
        matrices, experts = 2 if c.moe.gated else 1, c.moe.num_experts
        self._of: Callable[[Sequence[Tensor]], Experts] = partial(_by_kernels, c.moe.activation)
        self._shapes: list[tuple[int, ...]] = [
            (experts, matrices, c.moe.ffn_size, c.hidden),
            (experts, c.hidden, c.moe.ffn_size),
        ]
        c.region.reserve(*self._shapes)

    def prepare(self, gate_up: Tensor, down: Tensor) -> None:
        self._own: Sequence[Tensor] = (gate_up, down)

    def hold(self, own: Sequence[Tensor], experts: Callable[[Sequence[Tensor]], Experts]) -> None:
        """In the place of ``prepare``: this device's rows of each of the layer's tensors [its experts, ...], and what
        computes with all rows. Called for every layer before any layer runs."""
        self._own, self._of = own, experts
        self._shapes = [(len(self._position) - 1, *tensor.shape[1:]) for tensor in own]
        self._context.region.reserve(*self._shapes)

    def start(self) -> bool:
        """Begin to bring the layer's experts here."""
        self._weights = self._context.region.views(*self._shapes)
        self._pending: list[Pending] = [
            all_gather_start(own, whole.split(self._counts), self._context.group)
            for own, whole in zip(self._own, self._weights, strict=True)
        ]
        return True

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        for pending in self._pending:
            pending.wait()
        lap("gather")
        y = self._of(self._weights)(x, self._position[ids], weights)
        lap("expert")
        y = combine(y, residual)
        lap("combine")
        return y
