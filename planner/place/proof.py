"""Copies proven: what the search found, layer by layer against the exact program, where that is small enough."""

# W windows, L layers, E experts, G devices, R slots

from typing import NamedTuple, TypedDict

import numpy as np

from ...solvers.balance import over_ideal
from ...solvers.bounds.replication import hottest_bound
from ...solvers.exact.replication import replicate_exactly
from ...solvers.result import SolverError
from ...solvers.slots import Slots
from ...spec.errors import InfeasibleError
from ...spec.placement import Shares
from ..budget import Budget
from .answer import EXACT_PROGRAM
from .request import Request
from .score import reached_balance
from .single import Single

# Sizes that the program answers within seconds: whether it is asked depends on them alone, not on the clock.
MOST_PLACES = {"even": 128, "optimal": 64}  # experts x devices that belong together, where one load is to be balanced
MOST_SINGLE = 128  # the same, where every expert has one copy, also with windows of load
MOST_VARIABLES = 60  # of the program over copies and devices
ROUNDING = 1e-9  # relative
LEAST_TIME = 0.05  # for a layer, in seconds


class Rules(TypedDict):
    """What copies must keep to besides slots and groups."""

    shares: Shares
    full: bool


class Proof(NamedTuple):
    """slots: those found, or better ones; value: their mean balance; bounds: by name, no placement has less.

    late: the time ended before all that was small enough was proven. improved: layers that the exact program found.
    """

    slots: Slots
    value: float
    bounds: dict[str, float]
    late: bool
    improved: int = 0


def prove(
    slots: Slots,
    single: Single,
    load: np.ndarray,
    *,
    shares: Shares,
    full: bool,
    improve: bool,
    budget: Budget,
) -> Proof:
    """Mean balance over windows and layers of slots, and the least of any placement; load: [W, L, E].

    improve: better slots may be taken; else they only say what the best would be.
    """
    fleet, windows, experts = single.fleet, len(load), load.shape[2]
    usable = int(np.minimum(fleet.capacity, experts).sum())
    least = least_balance(load, single, shares, full)
    best = least.copy()
    value = reached_balance(slots, load, fleet.speed)
    asked, late, improved = False, False, 0
    # Whole counts are known to be whole: they are not divided where there is one window of them.
    relative = load if windows == 1 else over_ideal(load, fleet.speed)
    unit = 1.0 if windows > 1 else np.maximum(load[0].sum(axis=1), 1e-300) / fleet.speed.sum()
    open_layers = np.flatnonzero(least < value * (1 - ROUNDING))
    for done, layer in enumerate(open_layers.tolist() if small(load, single, shares) else []):
        left = budget.left
        if left < LEAST_TIME or budget.stopped:
            late = True
            break
        own = Slots(slots.expert_of[layer : layer + 1], slots.share_of[layer : layer + 1], slots.capacity)
        try:
            found = replicate_exactly(
                relative[:, layer],
                fleet.speed,
                fleet.capacity,
                fleet.hosts,
                groups=single.groups,
                shares=shares,
                full=full,
                seed=single.seed,
                time_limit=left / (len(open_layers) - done),
                known=own,
                most_variables=MOST_SINGLE if usable == experts else MOST_VARIABLES,
            )
        except SolverError:  # no back end, or no answer: what is known stays
            continue
        asked = asked or found.status != "feasible"
        late |= found.status == "time_limit"
        scale = unit if isinstance(unit, float) else float(unit[layer])
        best[layer] = max(best[layer], found.bound / scale)
        if improve and found.objective / scale < value[layer] * (1 - ROUNDING):
            slots = _with_layer(slots, layer, found.assignment)
            value[layer] = found.objective / scale
            improved += 1
    bounds = {"balance": float(least.mean())}
    if asked:
        bounds[EXACT_PROGRAM] = float(np.minimum(best, value).mean())
    return Proof(slots, float(value.mean()), bounds, late, improved)


def small(load: np.ndarray, single: Single, shares: Shares) -> bool:
    """Whether a layer is small enough to be asked about; under groups every host is a question of its own."""
    fleet, experts, apart = single.fleet, load.shape[2], 1
    if single.groups > 1 and len(load) == 1:
        apart = len(fleet.names)
    places = experts // apart * int(np.bincount(fleet.hosts).max() if apart > 1 else len(fleet.speed))
    if int(np.minimum(fleet.capacity, experts).sum()) == experts:
        return places <= MOST_SINGLE
    return places <= (MOST_PLACES[shares] if len(load) == 1 else MOST_VARIABLES)


def least_balance(load: np.ndarray, single: Single, shares: Shares, full: bool) -> np.ndarray:
    """[L] bounds on the mean balance over windows of a layer."""
    fleet = single.fleet
    ideal = load.sum(axis=2) / fleet.speed.sum()
    bound = [hottest_bound(w, fleet.speed, fleet.capacity, fleet.hosts, single.groups, shares, full) for w in load]
    return np.where(ideal > 0, np.array(bound) / np.where(ideal > 0, ideal, 1.0), 1.0).mean(axis=0)


def _with_layer(slots: Slots, layer: int, other: Slots) -> Slots:
    """The same slots but for one layer, which is that of ``other``."""
    expert_of, share_of = slots.expert_of.copy(), slots.share_of.copy()
    expert_of[layer], share_of[layer] = other.expert_of[0], other.share_of[0]
    return Slots(expert_of, share_of, slots.capacity)


def within_cap(slots: Slots, single: Single, counts: np.ndarray, request: Request, budget: Budget) -> Slots:
    """Slots whose balance on ``counts`` [L, E] keeps the cap asked for: those given, or the coolest there are.

    Raises ``InfeasibleError`` where none are known, with the bound where that proves why.
    """
    cap, load = request.balance_cap, counts[None]
    assert cap is not None
    reached = float(reached_balance(slots, load, single.fleet.speed).mean())
    if reached <= cap * (1 + ROUNDING):
        return slots
    found = prove(
        slots,
        single,
        load,
        shares=request.shares,
        full=request.equal_slots,
        improve=request.previous is None,
        budget=budget,
    )
    least = max(found.bounds.values())
    if least > cap * (1 + ROUNDING):
        raise InfeasibleError(
            f"no placement has a mean balance of {cap:.6g} or less: it is proven to be at least {least:.6g}"
        )
    if found.value > cap * (1 + ROUNDING):
        best = f"allow {found.value:.6g}, the best"
        raise InfeasibleError(f"found no placement with a balance of {cap:.6g} or less: {best}")
    return found.slots
