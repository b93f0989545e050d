"""Copies inside ``solve``: hot experts in spare memory, with the shares that they take.

Searched for balance (``solvers.replication``); what copies do to the exchange is left to the prediction.
"""

# C classes of layers, E experts, G devices

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ...solvers.bounds.replication import hottest_bound
from ...solvers.replication.replicate import replicate
from ...solvers.result import Solution, Status
from ...solvers.slots import Slots
from ..budget import Budget
from .question import WORTH, Placed, Proof, Question, fits_tables, said

STEPS = 5_000  # of the search, per class
HOTTEST = "hottest device of a layer over the ideal"


def replicated(question: Question, best: Slots, seed: int, budget: Budget) -> dict[str, Placed]:
    """Copies with shares for balance. Each makes its device read the expert's weights again, so that few may be better.

    ``few``: the single copies ``best``, and a slot more on the coolest quarter of the devices. Else as many slots more
    as there are devices, all of them divided by speed; and the same copies for tokens that go to the nearest.
    """
    fleet, experts, devices = question.fleet, question.experts, len(question.fleet.speed)
    useful, found = np.minimum(fleet.capacity, experts), dict[str, Placed]()
    if not fits_tables(devices, experts):
        return {}
    singles = [Slots.from_lists([held], None, [len(mine) for mine in held]) for held, _ in best.to_lists()]
    few, late = [], False
    for c, single in enumerate(singles):
        capacity = _more_slots(question, c, single, useful, max(1, devices // 4))
        limit = budget.part(0.5 / (len(singles) - c)).left
        one = _copied(question, slice(c, c + 1), capacity, seed, limit, single)
        late |= one.status == "time_limit"
        few.append(_worth(question, c, single, one.assignment))
    found["replicated, few"] = _together(question, few, "time_limit" if late else "feasible")
    if useful.sum() >= experts + devices:
        capacity = _by_speed(useful, fleet.speed, experts + devices)
        many = _copied(question, slice(None), capacity, seed, budget.left)
        layers = [_worth(question, c, single, _layer(many.assignment, c)) for c, single in enumerate(singles)]
        found["replicated"] = _together(question, layers, many.status)
        if fits_tables(devices * devices, experts):  # which is nearest depends on the token's own device
            solver = said("annealed copies, nearest serves", many.status)
            found["replicated, nearest"] = replace(found["replicated"], solver=solver, near=True)
    return {name: placed for name, placed in found.items() if not placed.single}


def _more_slots(question: Question, c: int, single: Slots, useful: np.ndarray, spare: int) -> np.ndarray:
    """[G] the slots that are taken, and one more on each of the ``spare`` coolest devices that may have it."""
    fleet = question.fleet
    capacity = single.capacity.copy()
    coolest = np.argsort(single.finish(question.load[c : c + 1], fleet.speed)[0], kind="stable")
    capacity[[g for g in coolest if capacity[g] < useful[g]][:spare]] += 1
    return capacity


def _by_speed(useful: np.ndarray, speed: np.ndarray, slots: int) -> np.ndarray:
    """[G] so many slots in all, in proportion to speed as far as the devices can use them."""
    capacity = np.zeros_like(useful)
    for _ in range(slots):
        capacity[np.where(capacity < useful, (capacity + 1) / speed, np.inf).argmin()] += 1
    return capacity


def _copied(
    question: Question, classes: slice, capacity: np.ndarray, seed: int, time_limit: float, start: Slots | None = None
) -> Solution[Slots]:
    """Some classes with copies and shares for balance in ``capacity`` [G] slots."""
    fleet = question.fleet
    options: dict[str, Any] = {"seed": seed, "steps": STEPS, "time_limit": time_limit, "start": start}
    return replicate(question.load[classes], fleet.speed, capacity, fleet.hosts, shares="optimal", **options)


def _layer(slots: Slots, c: int) -> Slots:
    return Slots(slots.expert_of[c : c + 1], slots.share_of[c : c + 1], slots.capacity)


def _worth(question: Question, c: int, single: Slots, copied: Slots) -> Slots:
    """Copies where they cool the hottest device of class ``c`` enough; else the single copies, an option already."""
    load, speed = question.load[c : c + 1], question.fleet.speed
    gain = float(single.hottest(load, speed)[0] - copied.hottest(load, speed)[0])
    return copied if gain * speed.sum() > WORTH * load.sum() else single


def _together(question: Question, layers: list[Slots], status: Status) -> Placed:
    """One layer of each class, of different capacities."""
    lists, capacity = [layer.to_lists()[0] for layer in layers], np.max([layer.capacity for layer in layers], axis=0)
    slots = Slots.from_lists([held for held, _ in lists], [taken for _, taken in lists], capacity)
    proof = _balanced(question, slots, [layer.capacity for layer in layers])
    return Placed(slots, said("annealed copies, exact shares", status), HOTTEST, proof)


def _balanced(question: Question, slots: Slots, capacities: Sequence[np.ndarray]) -> Proof:
    """The balance of copies, and the least of any in so many slots; capacities: [C, G]."""

    def proof() -> tuple[np.ndarray, np.ndarray]:
        fleet = question.fleet
        ideal = np.maximum(question.load.sum(1), 1e-300) / fleet.speed.sum()
        least = [
            hottest_bound(load[None], fleet.speed, capacity, fleet.hosts, 1, "optimal", False)[0]
            for load, capacity in zip(question.load, capacities, strict=True)
        ]
        return slots.hottest(question.load, fleet.speed) / ideal, np.array(least) / ideal

    return proof
