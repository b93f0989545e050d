"""What each number of moves buys: balance, and what travels, of placements that load ever more copies.

Where layers are independent (balance, replicas) every layer is searched for each number of loads, and the loads of each
point are spent where they cool most, exactly. Else each point is a search with that many moves allowed.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from ...solvers.placement.affinity import Affinity, usual_steps
from ...solvers.result import NotFound, SolverError
from ...solvers.slots import Slots
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.placement import Placement, Scores
from ...spec.trace import Trace
from ..budget import SAFETY_FACTOR, Budget
from .compared import rest_of, scores
from .fleet import Fleet
from .layers import document_layers
from .ready import solvers_ready
from .replan import copies_to_load, slots_of
from .request import Request
from .sample import load_samples, windows
from .single import single_of

POINTS = 10  # at most, between the previous placement and the one that moves at will
CHAINS, LEAST_TIME = 4, 0.05  # of each search, and seconds


@dataclass(frozen=True)
class MovesPoint:
    """limit: moves allowed, none: any number; copies: those that are loaded."""

    limit: int | None
    copies: int
    scores: Scores


@dataclass(frozen=True)
class MovesFront:
    """Points by rising ``copies``; minimised: fields of ``Score`` that were asked for; seconds: recorded time."""

    previous: str
    minimised: tuple[str, ...]
    points: tuple[MovesPoint, ...]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        points = [
            {"limit": p.limit, "copies": p.copies, "scores": p.scores.model_dump(mode="json")} for p in self.points
        ]
        return asdict(replace(self, points=())) | {"points": points}


def check_moves_front(request: Request) -> None:
    """Raise ``MoeplanError`` where there is nothing to count moves from, or nothing to choose."""
    if request.previous is None:
        raise MoeplanError("--moves-front needs --previous: moves are counted from an old placement")
    if request.timing is not None:
        raise MoeplanError("--moves-front does not go with --cluster: predicted time is the objective there")


def moves_front(
    trace: Trace,
    request: Request,
    placement: Placement,
    *,
    budget: Budget,
) -> MovesFront:
    """The points around ``placement``, which ``place`` made of the same trace and request."""
    check_moves_front(request)
    assert request.previous is not None
    began, fleet = time.perf_counter(), Fleet.of(request.devices)
    fitted, rest = trace.part(*request.fit).for_placement(), rest_of(trace, request.fit)
    free = replace(request, max_moves=None)
    found: dict[int, MovesPoint] = {}

    def add(limit: int | None, slots: Slots) -> float:
        """Keep a point, the last of those with as many loads; the seconds that it took."""
        start = time.perf_counter()
        layers = document_layers(slots)
        copies = copies_to_load(free.previous, layers) if free.previous else 0
        if copies not in found:
            found[copies] = MovesPoint(limit, copies, scores(layers, request, fitted, rest))
        return time.perf_counter() - start

    each = add(0, slots_of(request.previous, fleet.capacity))
    try:
        if solvers_ready(budget):
            ways = _layer_by_layer if _independent(request, placement) else _searched
            ways(fitted, free, fleet, placement, add, each, budget)
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    if placement.moves is not None and placement.moves.copies not in found:
        found[placement.moves.copies] = MovesPoint(
            request.max_moves, placement.moves.copies, placement.scores["placement"]
        )
    points = tuple(found[copies] for copies in sorted(found))
    previous = placement.moves.previous if placement.moves else ""
    return MovesFront(previous, _minimised(request, placement), points, time.perf_counter() - began)


def _independent(request: Request, placement: Placement) -> bool:
    return placement.objective == "balance" or request.slots > placement.num_experts


def _minimised(request: Request, placement: Placement) -> tuple[str, ...]:
    """Fields of ``Score``: balance, or what travels between devices and, where there are several, hosts."""
    if _independent(request, placement):
        return ("balance_mean",)
    score = placement.scores["placement"].fit
    coherent = placement.movement == "coherent" and score.boundary_cross_device is not None
    what = "boundary_cross" if coherent else "fanout"
    places = ("host", "device") if len({device.host for device in placement.devices}) > 1 else ("device",)
    return tuple(f"{what}_{place}" for place in places)


def _layer_by_layer(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    placement: Placement,
    add: Callable[[int | None, Slots], float],
    each: float,
    budget: Budget,
) -> None:
    # Imported when it is needed: the solvers take a second to load.
    from .copies import newly_placed, replan

    objective = placement.objective
    searching = budget.before(SAFETY_FACTOR * each * POINTS)
    new = newly_placed(fitted, request, fleet, objective, searching.part(0.5)).assignment
    way = replan(request, fleet, new, windows(fitted), objective, searching)
    last = way.within(None)
    most = sum(layer[-1].loads for layer in way.options)
    for limit in series(most):
        if not budget.affords(each, "some points of the moves"):
            return
        add(limit, way.within(limit))
    add(None, last)


def _searched(
    fitted: Trace,
    request: Request,
    fleet: Fleet,
    placement: Placement,
    add: Callable[[int | None, Slots], float],
    each: float,
    budget: Budget,
) -> None:
    limits = series(fitted.expert_counts.size)
    single, load = single_of(request, fleet), load_samples(fitted)
    affinity = single.affinity(fitted, budget.part(0.15))
    nothing = Affinity.of(np.zeros_like(affinity.transitions))
    cap = np.inf if placement.balance_cap is None else placement.balance_cap
    load = fitted.expert_counts[None] if placement.balance_cap_of == "fit" else load
    steps = max(1, (request.steps or usual_steps(fitted.expert_counts.size)) // (len(limits) + 1))
    for i, limit in enumerate(limits):
        if budget.stopped or not budget.affords(
            each + LEAST_TIME, f"{len(limits) - i} of {len(limits)} points of the moves"
        ):
            return
        budget.tell(done=i, of=len(limits), what=f"moves: at most {limit}")
        mine = replace(budget.part(1 / (len(limits) - i)).before(SAFETY_FACTOR * each), on_event=None)
        within = replace(single, max_moves=limit)
        options: dict[str, Any] = {"steps": steps, "chains": CHAINS}
        try:
            best = within.solve(affinity, load, cap=float(cap), budget=mine.part(0.5), **options)
        except NotFound:  # so few moves cannot keep the cap: then as cool as they can
            best = within.solve(nothing, load, price=1.0, budget=mine, **options)
        each = max(each, add(limit, Slots.from_device_of(best.assignment, fleet.capacity)))


def series(most: int) -> list[int]:
    """Numbers of moves up to ``most``: all where they are few, else ever larger ones."""
    if most <= POINTS:
        return list(range(1, most + 1))
    return sorted(set(np.geomspace(1, most, POINTS).round().astype(int).tolist()))
