"""Re-planning: from an old placement to a new one within a number of moves."""

# L layers, E experts, G devices, R slots

from collections.abc import Sequence

import numpy as np

from ...solvers.slots import EMPTY, Slots
from ...spec.placement import Placement, PlacementLayer


def copies_to_load(old: Placement, layers: Sequence[PlacementLayer]) -> int:
    """Copies that a device must load because it does not hold that expert of that layer yet."""
    return sum(copies_by_layer(old, layers))


def copies_by_layer(old: Placement, layers: Sequence[PlacementLayer]) -> list[int]:
    """[L] the same of each layer."""
    return [
        sum(len(set(now) - set(before)) for before, now in zip(was.slots, layer.slots, strict=True))
        for was, layer in zip(old.layers, layers, strict=True)
    ]


def within_moves(old: Placement, new: Slots, load: np.ndarray, speed: np.ndarray, max_moves: int | None) -> Slots:
    """The layers of ``new`` that gain most in balance for at most ``max_moves`` loaded copies; the others stay.

    Layers are independent: which to take is a knapsack, solved exactly. gain: mean over windows of the hottest
    device's load over speed, kept [L, E] of load [W, L, E]. Without a limit every layer that gains is taken.
    """
    was = Slots.from_lists([layer.slots for layer in old.layers], [layer.shares for layer in old.layers], new.capacity)
    gain = np.mean([was.hottest(w, speed) - new.hottest(w, speed) for w in load], axis=0)
    devices = new.device_of_slot
    cost = np.array([_loaded(a, b, devices) for a, b in zip(was.expert_of, new.expert_of, strict=True)])
    taken = gain > 0
    if max_moves is not None:
        taken = knapsack(np.where(taken, gain, 0.0), cost, max_moves)
    pick = taken[:, None]
    return Slots(np.where(pick, new.expert_of, was.expert_of), np.where(pick, new.share_of, was.share_of), new.capacity)


def _loaded(before: np.ndarray, after: np.ndarray, device: np.ndarray) -> int:
    held = {(int(d), int(e)) for d, e in zip(device, before, strict=True) if e != EMPTY}
    return sum((int(d), int(e)) not in held for d, e in zip(device, after, strict=True) if e != EMPTY)


def knapsack(gain: np.ndarray, cost: np.ndarray, budget: int) -> np.ndarray:
    """[N] bool: the items of largest total gain whose whole costs stay within budget; items without gain are left."""
    budget = min(budget, int(cost.sum()))
    best = np.zeros((len(gain) + 1, budget + 1))
    for i, (value, weight) in enumerate(zip(gain, cost, strict=True)):
        best[i + 1] = best[i]
        if value > 0 and weight <= budget:
            best[i + 1, weight:] = np.maximum(best[i, weight:], best[i, : budget + 1 - weight] + value)
    taken, left = np.zeros(len(gain), bool), budget
    for i in reversed(range(len(gain))):
        if best[i + 1, left] > best[i, left]:
            taken[i] = True
            left -= int(cost[i])
    return taken
