"""What one option costs in every mixture-of-experts layer of a step, for all layers at once."""

# L mixture-of-experts layers, C classes of layers with one plan, G devices

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..spec.plan import LayerPlan, Strategy
from . import memory
from .clock import Chains
from .options import Classes
from .step import LayerCost, Step


@dataclass(frozen=True)
class Column:
    """One plan for each class.

    seconds, arrival: [L] of each layer by itself, and of ``Chains.slowest``.
    weights: [C, G] bytes that each class takes for itself; regions: [C, 2, G] bytes that it needs of what layers share,
    the gathered weights and the activations.
    """

    plans: tuple[LayerPlan, ...]
    seconds: np.ndarray
    weights: np.ndarray
    regions: np.ndarray
    _costs: list[LayerCost]
    _place: np.ndarray  # [L, 2] which of ``_costs``, and which layer of its batch

    @classmethod
    def of(cls, step: Step, classes: Classes, plans: Sequence[LayerPlan]) -> "Column":
        model, element, devices = step.model, step.costs.element_bytes, step.layout.devices
        outside = memory.outside_activations(step.blocks, model.vocab_size, step.layout, element)
        weights = np.zeros((len(plans), devices), np.int64)
        regions = np.zeros((len(plans), 2, devices), np.int64)
        regions[:, 1] = outside
        for c, members in enumerate(classes.members):
            block = step.blocks[model.moe_layers[members[0]]]
            if c and plans[c] is plans[c - 1] and block is step.blocks[model.moe_layers[classes.members[c - 1][0]]]:
                weights[c], regions[c, 0] = weights[c - 1], regions[c - 1, 0]
                continue
            weights[c] = memory.expert_weights(block, plans[c], element)
            regions[c, 0] = memory.gathered_region(block, plans[c], element)
        seconds, place = np.zeros(len(model.moe_layers)), np.zeros((len(model.moe_layers), 2), int)
        costs: list[LayerCost] = []
        of_class = classes.of_ordinal
        for ordinals in _batches(step, [plans[c] for c in of_class]):
            layer = step.layer([model.moe_layers[j] for j in ordinals])
            own = [plans[of_class[j]] for j in ordinals]
            cost = step.cost(layer, own)
            seconds[ordinals] = cost.seconds
            place[ordinals] = np.stack([np.full(len(ordinals), len(costs)), np.arange(len(ordinals))], axis=1)
            costs.append(cost)
            np.maximum.at(regions[:, 1], of_class[ordinals], memory.layer_activations(layer, own))
        return cls(tuple(plans), seconds, weights, regions, costs, place)

    @property
    def strategy(self) -> Strategy:
        return self.plans[0].strategy

    @cached_property
    def copied(self) -> tuple[bool, ...]:
        """[C] whether the plan holds any expert more than once."""
        held = [[expert for experts in plan.slots for expert in experts] for plan in self.plans]
        return tuple(len(set(experts)) < len(experts) for experts in held)

    @cached_property
    def arrival(self) -> np.ndarray:
        slowest = [cost.chains.slowest() for cost in self._costs]
        return np.array([slowest[batch][index] for batch, index in self._place])

    def chains(self, ordinal: int) -> Chains:
        """Longest chains through one layer."""
        batch, index = self._place[ordinal]
        return self._costs[batch].chains.one(index)

    def after(self, step: Step, ordinal: int, begin: np.ndarray) -> np.ndarray:
        """[1, G] when the devices end a layer that they begin at ``begin`` [1, G]."""
        batch, index = self._place[ordinal]
        return self._costs[batch].after(step.costs, begin, index)


def _batches(step: Step, plans: Sequence[LayerPlan]) -> list[np.ndarray]:
    """Ordinals of layers that are costed together: of one block and form of plan, and not too many."""
    batches = [
        [j for j in ordinals if plans[j].form == form]
        for ordinals in step.alike()
        for form in dict.fromkeys(plan.form for plan in plans)
    ]
    most = step.most_together
    return [np.array(js[first : first + most]) for js in batches for first in range(0, len(js), most)]
