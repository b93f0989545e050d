"""The answer of a search: single copies, copies for balance, or predicted time, each with its bound.

It imports the solvers, whose compiled loops and programs take a while to load: ``solve`` imports it once there is time
for a search.
"""

from typing import TYPE_CHECKING

from ...solvers.slots import EMPTY, Slots
from ...spec.errors import MoeplanError
from ...spec.placement import Objective
from ...spec.trace import Trace
from ..budget import Budget
from . import baselines
from .answer import EPLB, GREEDY, PREVIOUS, Answer, record_of
from .anytime import place_single
from .fleet import Fleet
from .request import Request
from .single import Single, previous_devices, single_of

if TYPE_CHECKING:
    from .timed import Timing


def searched_answer(fitted: Trace, request: Request, fleet: Fleet, objective: Objective, budget: Budget) -> Answer:
    """The best placement that is found in the budget, with a bound. Raises ``SolverError`` and ``MoeplanError``."""
    if request.timing is not None:
        return _for_time(fitted, request, fleet, request.timing, budget)
    if objective == "balance" or request.slots > fitted.num_experts:
        # Imported when they are needed: their solvers take a while to load.
        from .copies import place_with_copies

        single = Single(fleet, request.movement, request.groups, seed=request.seed)
        return place_with_copies(fitted, request, single, objective, budget)
    return place_single(fitted, request, single_of(request, fleet), objective, budget)


def _for_time(fitted: Trace, request: Request, fleet: Fleet, timing: "Timing", budget: Budget) -> Answer:
    # Imported when it is needed: predictions need much that other placements do not.
    from .timed import place_for_time

    copies = request.slots > fitted.num_experts
    if request.balance_cap is not None or (copies and request.previous is not None):
        what = "--balance-cap" if request.balance_cap is not None else "--previous with replicas"
        raise MoeplanError(f"{what} does not go with --cluster: predicted time is the objective there")
    old = previous_devices(request, fleet)
    weights = timing.weights(fitted)
    single = Single(fleet, "ep", request.groups, old, request.max_moves, weights, request.seed)
    load = fitted.expert_counts
    candidates: dict[str, Slots | None] = {}
    if old is not None:
        candidates = {PREVIOUS: Slots.from_device_of(old, fleet.capacity)}
    elif request.groups == 1:
        candidates = {
            "linear": baselines.linear_slots(fitted.layers, fitted.num_experts, fleet),
            EPLB: baselines.eplb_slots(load, request.slots, request.groups, fleet),
            GREEDY: Slots.from_device_of(baselines.greedy(load, fleet), fleet.capacity),
        }
    if copies:
        from .replicated import place_copies

        half = budget.part(0.5)
        found = place_copies(single, fitted, shares=request.shares, full=request.equal_slots, budget=half)
        candidates[found.solver] = found.assignment
    known = {name: slots for name, slots in candidates.items() if slots is not None}
    steps = request.steps
    found = place_for_time(single, fitted, timing, known, steps=steps, budget=budget)
    minimised = timing.minimised
    bounds = {"all devices busy at their best rate": found.bound}
    notes = _without_copies(found.assignment, request, fitted) if copies else ()
    record = record_of(found, found.objective, found.bound, bounds, minimised, found.seconds)
    return Answer(found.assignment, record, notes=notes)


def _without_copies(slots: Slots, request: Request, fitted: Trace) -> tuple[str, ...]:
    """What to say where copies were asked for and none are made."""
    if (slots.expert_of != EMPTY).sum() > fitted.expert_counts.size:
        return ()
    return (
        f"{request.slots} slots are asked for and no expert is copied: of what was tried, one copy of each is "
        "predicted to be the fastest",
    )
