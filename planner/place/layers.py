"""Slots as the document holds them."""

import numpy as np

from ...solvers.slots import Slots
from ...spec.placement import PlacementLayer


def document_layers(slots: Slots) -> tuple[PlacementLayer, ...]:
    """One entry per layer; shares only where the copies of a layer do not take even ones."""
    even = Slots.even(slots.expert_of, slots.capacity).share_of
    found = []
    for (held, taken), mine, usual in zip(slots.to_lists(), slots.share_of, even, strict=True):
        shares = None if np.allclose(mine, usual, atol=1e-9) else tuple(tuple(s) for s in taken)
        found.append(PlacementLayer(slots=tuple(tuple(e) for e in held), shares=shares))
    return tuple(found)
