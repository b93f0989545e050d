"""Slots of the solvers as documents hold them: layers of a placement, and of a plan."""

import numpy as np

from ...solvers.slots import Slots
from ...spec.placement import PlacementLayer
from ...spec.plan import LayerPlan, Strategy


def document_layers(slots: Slots) -> tuple[PlacementLayer, ...]:
    """One entry per layer; shares only where the copies of a layer do not take even ones."""
    even = Slots.even(slots.expert_of, slots.capacity).share_of
    found = []
    for (held, taken), mine, usual in zip(slots.to_lists(), slots.share_of, even, strict=True):
        shares = None if np.allclose(mine, usual, atol=1e-9) else tuple(tuple(s) for s in taken)
        found.append(PlacementLayer(slots=tuple(tuple(e) for e in held), shares=shares))
    return tuple(found)


def layer_plan(layer: PlacementLayer) -> LayerPlan:
    """The ``ep`` layer that keeps exactly to a placement's slots and shares.

    A placement without shares divides an expert's tokens evenly between its copies, a plan without shares sends them to
    the nearest copy: even shares are therefore written out.
    """
    copies: dict[int, int] = {}
    for held in layer.slots:
        for expert in held:
            copies[expert] = copies.get(expert, 0) + 1
    shares = layer.shares
    if shares is None and max(copies.values()) > 1:
        shares = tuple(tuple(1 / copies[expert] for expert in held) for held in layer.slots)
    return LayerPlan(strategy="ep", slots=layer.slots, shares=shares)


def plan_layers(slots: Slots, groups: int = 1, *, near: bool = False, strategy: Strategy = "ep") -> list[LayerPlan]:
    """One plan per layer. groups: of consecutive devices that all hold the same, of which ``slots`` are one.

    near: copies without shares, whose tokens go to the nearest.
    """
    found = []
    for held, taken in slots.to_lists():
        lists = tuple(tuple(experts) for experts in held) * groups
        copied = sum(map(len, held)) > slots.num_experts
        shares = tuple(tuple(share) for share in taken) if copied and not near else None
        # ``Slots`` has checked them, and of many devices another check takes longer than the search.
        found.append(LayerPlan.model_construct(strategy=strategy, slots=lists, shares=shares, split=None, repeats=1))
    return found
