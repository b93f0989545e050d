"""A first answer at once: the best of what needs no search, for budgets that end before one could begin."""

# L layers, E experts, G devices, X hosts

from itertools import pairwise

import numpy as np

from ...solvers.placement.affinity import least_by_slots
from ...solvers.slots import EMPTY, Slots
from ...spec.errors import InfeasibleError
from ...spec.placement import Objective, Scores
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .answer import EPLB, GREEDY, PREVIOUS, Answer, record
from .fleet import Fleet
from .layers import document_layers
from .movement import fan_out
from .request import Request
from .sample import windows
from .score import reached_balance, score
from .single import Single

COUNTED = "as counted on the fitted part"


def first_answer(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    objective: Objective,
    usual: dict[str, Slots],
    known: dict[str, Scores],
    budget: Budget,
) -> Answer:
    """The previous placement where there is one, else EPLB's or a greedy one, with a bound that needs no search.

    usual, known: what is compared, by name, and its scores. Raises ``InfeasibleError`` where it is hotter than the cap
    that was asked for.
    """
    load = fitted.expert_counts
    slots, by = _placed(request, fleet, load, usual.get("eplb"))
    if request.balance_cap is not None:
        reached = float(reached_balance(slots, load[None], fleet.speed).mean())
        if reached > request.balance_cap * (1 + 1e-9):
            raise InfeasibleError(
                f"found no placement with a balance of {request.balance_cap:.6g} or less in time: "
                f"raise --time-limit, or allow {reached:.6g}"
            )
    if request.timing is not None:
        value = request.timing.seconds(document_layers(slots), fitted)
        least, minimised = request.timing.bound(fitted), request.timing.minimised
        return Answer(slots, record(value, {"all devices busy at their best rate": least}, minimised, by))
    single = Single(fleet, request.movement, request.groups)
    if objective == "balance" or request.slots > fitted.num_experts:
        value = float(reached_balance(slots, windows(fitted), fleet.speed).mean())
        minimised = "mean over layers and windows of the hottest device's time over the ideal"
        return Answer(slots, record(value, {"balance": 1.0}, minimised, by))
    if single.movement == "coherent" and fitted.layers > 1:
        inside, between = single.weights
        same = slots is usual.get("eplb")
        found = known["eplb"].fit if same else score(document_layers(slots), request.devices, fitted)
        assert found.boundary_cross_device is not None
        assert found.boundary_cross_host is not None
        value = inside * found.boundary_cross_device + (between - inside) * found.boundary_cross_host
        minimised = f"{inside:g} x boundary_cross_device + {between - inside:g} x boundary_cross_host, {COUNTED}"
        least = inside * _leaving(fitted, fleet.capacity, budget) + (between - inside) * _leaving(
            fitted, np.bincount(fleet.hosts, fleet.capacity), budget
        )
        return Answer(slots, record(value, {"slots": least}, minimised, by))
    held = np.zeros(load.shape, np.int64)
    np.put_along_axis(held, np.maximum(slots.expert_of, 0), slots.device_of_slot[None], axis=1)
    moved = fan_out(fitted, single, held)
    return Answer(slots, record(moved.value, moved.bounds, moved.minimised, by))


def _leaving(trace: Trace, capacity: np.ndarray, budget: Budget) -> float:
    """Share of the tokens that change places at a boundary at least; capacity: slots of each place.

    Boundary by boundary: a sum over those that there was time for is a bound as well.
    """
    first, experts, total = trace.expert_ids[:, :, 0].astype(np.int64), trace.num_experts, 0.0
    for before, after in pairwise(first.T):
        counts = np.bincount(before * experts + after, minlength=experts**2).reshape(1, experts, experts)
        total += float(least_by_slots(counts.astype(float), int(capacity.max()))[0][0])
        if budget.late:
            break
    return total / (trace.tokens * (trace.layers - 1))


def _placed(request: Request, fleet: Fleet, load: np.ndarray, eplb: Slots | None) -> tuple[Slots, str]:
    """The previous placement; else EPLB's where that is what was asked for, or a greedy one; and which of them."""
    if request.previous is not None:
        old = request.previous.layers
        return Slots.from_lists([x.slots for x in old], [x.shares for x in old], fleet.capacity), PREVIOUS
    if eplb is not None and fleet.alike and not (request.equal_slots and (eplb.expert_of == EMPTY).any()):
        return eplb, EPLB
    device_of = baselines.grouped_greedy(load, fleet, request.groups)
    slots = Slots.from_device_of(device_of, fleet.capacity)
    more = request.slots > load.shape[1]
    return with_copies(slots, load, fleet, request.groups) if more else slots, GREEDY


def with_copies(slots: Slots, load: np.ndarray, fleet: Fleet, groups: int) -> Slots:
    """Every spare slot filled: a copy of whichever expert carries most per copy, of those the device may still hold."""
    expert_of, device, experts = slots.expert_of.copy(), slots.device_of_slot, load.shape[1]
    group = np.arange(experts) * groups // experts
    for row, loads in zip(expert_of, load, strict=True):
        copies = np.bincount(row[row != EMPTY], minlength=experts)
        host_of = np.zeros(groups, np.int64)
        held = row != EMPTY
        host_of[group[row[held]]] = fleet.hosts[device[held]] if groups > 1 else 0
        carried = np.bincount(device[held], loads[row[held]], len(fleet.speed)) / fleet.speed
        for slot in sorted(np.flatnonzero(~held).tolist(), key=lambda s: carried[device[s]]):
            here = row[device == device[slot]]
            allowed = np.ones(experts, bool) if groups == 1 else host_of[group] == fleet.hosts[device[slot]]
            allowed[here[here != EMPTY]] = False
            if allowed.any():
                chosen = int(np.where(allowed, loads / copies, -1.0).argmax())
                row[slot] = chosen
                copies[chosen] += 1
    return Slots.even(expert_of, slots.capacity)
