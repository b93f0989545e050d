"""How a mixture-of-experts layer runs on many devices: one file per strategy, of the plan's name for it."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ...spec.plan import LayerPlan
from ..layout import Layout
from .ep import ExpertParallel
from .gathered import Gathered
from .hierarchical import Hierarchical
from .layer import Lap, LayerContext, Region, Stored
from .offload import Offload
from .sharded import Sharded

__all__ = ["STRATEGIES", "Lap", "LayerContext", "Region", "Stored", "Strategy", "strategy_of"]


class Strategy(Protocol):
    """One mixture-of-experts layer on one device.

    ``stored`` says which experts and columns the device must be given; ``prepare`` takes them: gate_up
    [experts, M, columns, D] and down [experts, D, columns]. In a step ``start`` is called when the layer begins, before
    attention, and ``forward`` after routing.
    """

    stored: Stored

    def prepare(self, gate_up: Tensor, down: Tensor) -> None: ...

    def start(self) -> bool:
        """Begin what can run beside attention; False if there is nothing."""
        ...

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, residual: Tensor, layout: Layout, lap: Lap) -> Tensor:
        """Residual plus the experts' output for this device's tokens.

        x: normed [T, D]; ids: [T, K] int64 experts, -1 for none; weights: [T, K] float32; residual: [T, D]. ``lap``
        ends a part.
        """
        ...


STRATEGIES: dict[str, Callable[[LayerPlan, LayerContext], Strategy]] = {
    "ep": ExpertParallel,
    "hierarchical": Hierarchical,
    "sharded": Sharded,
    "gathered": Gathered,
    "offload": Offload,
}


def strategy_of(plan: LayerPlan, context: LayerContext) -> Strategy:
    return STRATEGIES[plan.strategy](plan, context)
