"""Which order the calls of a ``hierarchical`` layer's chunks have: for every class of layers the one that is predicted
fastest, of all orders in few chunks, of some in more (``spec.chunk_order.orders``).

A layer counts by itself, all devices beginning together. No order is faster than the longest of its chains, which
nothing slows; orders whose chains are longer than what was found need not be simulated.
"""

# C classes, B layers of a batch, O orders, G devices

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..spec.chunk_order import Order, orders
from ..spec.plan import LayerPlan
from .budget import Budget
from .clock import longest_chains, run
from .options import Classes
from .stages import Stage
from .step import Step
from .strategies import hierarchical
from .strategies.layer import Layer, shared

ROUNDING = 1e-9


class _Batch(NamedTuple):
    """Layers that are costed together. of: [B] their classes; before, after: stages that no order changes."""

    of: np.ndarray
    before: list[Stage]
    flight: hierarchical.Flight
    after: list[Stage]

    @classmethod
    def of_layers(cls, layer: Layer, plans: Sequence[LayerPlan], classes: np.ndarray) -> "_Batch":
        before, flight = hierarchical.before(layer, plans[0].chunks), hierarchical.Flight.of(layer, plans)
        return cls(classes, before, flight, shared(layer))

    def stages(self, order: Order) -> list[Stage]:
        return [*self.before, *self.flight.stages(order), *self.after]

    def least(self, order: Order, devices: int) -> np.ndarray:
        """[B] seconds of the longest chains."""
        chains = longest_chains(self.stages(order), len(self.of), devices)
        return chains.ends(np.zeros((len(self.of), devices))).max(1)

    def seconds(self, step: Step, order: Order) -> np.ndarray:
        """[B]"""
        return run(step.costs, self.stages(order), np.zeros((len(self.of), step.layout.devices))).max(1)


class Ordered(NamedTuple):
    """Of each class: seconds of its layers, each by itself, and the order under which they take them."""

    seconds: np.ndarray
    orders: list[Order]


def fastest_orders(
    step: Step, plans: Sequence[LayerPlan], ordinals: Sequence[Sequence[int]], budget: Budget
) -> Ordered:
    """plans: one for each class, ``hierarchical`` in the same number of chunks; ordinals: layers of each class.

    Where time ends, the usual order, or the best until then.
    """
    batches = list(_batches(step, plans, ordinals))
    usual, *others = orders(plans[0].chunks)

    def summed(of_layers: Sequence[np.ndarray]) -> np.ndarray:
        """[C]"""
        classes = np.concatenate([batch.of for batch in batches])
        return np.bincount(classes, np.concatenate(of_layers), len(plans))

    best, chosen = summed([batch.seconds(step, usual) for batch in batches]), [usual] * len(plans)
    least: list[tuple[float, int, np.ndarray]] = []
    for i, order in enumerate(others):
        if budget.over:
            return Ordered(best, chosen)
        bound = summed([batch.least(order, step.layout.devices) for batch in batches])
        least.append((float(bound.sum()), i, bound))
    for _, i, bound in sorted(least, key=lambda entry: entry[:2]):
        if (bound >= best * (1 - ROUNDING)).all():
            continue
        if budget.over:
            break
        seconds = summed([batch.seconds(step, others[i]) for batch in batches])
        for c in np.flatnonzero(seconds < best * (1 - ROUNDING)):
            best[c], chosen[c] = seconds[c], others[i]
    return Ordered(best, chosen)


def _batches(step: Step, plans: Sequence[LayerPlan], ordinals: Sequence[Sequence[int]]) -> list[_Batch]:
    """Layers of one block together, and not too many."""
    of_class = {j: c for c, members in enumerate(ordinals) for j in members}
    found = []
    for alike in step.alike():
        mine = [j for j in alike if j in of_class]
        for first in range(0, len(mine), step.most_together):
            some = mine[first : first + step.most_together]
            layer = step.layer([step.model.moe_layers[j] for j in some])
            classes = np.array([of_class[j] for j in some])
            found.append(_Batch.of_layers(layer, [plans[c] for c in classes], classes))
    return found


def has_orders(plans: Sequence[LayerPlan]) -> bool:
    """Whether there is an order to choose."""
    return plans[0].strategy == "hierarchical" and plans[0].chunks > 1


def in_order(step: Step, classes: Classes, plans: tuple[LayerPlan, ...], budget: Budget) -> tuple[LayerPlan, ...]:
    """The same plans, one for each class, with each class's own order; equal plans stay one object."""
    if not has_orders(plans):
        return plans
    usual = orders(plans[0].chunks)[0]
    known: dict[tuple[LayerPlan, Order], LayerPlan] = {}
    found = []
    for plan, order in zip(plans, fastest_orders(step, plans, classes.members, budget).orders, strict=True):
        changed = plan if order == usual else known.setdefault((plan, order), plan.model_copy(update={"order": order}))
        found.append(changed)
    return tuple(found)
