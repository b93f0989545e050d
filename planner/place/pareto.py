"""Pareto front: what a little balance buys in token movement, at caps from the coolest placement to locality alone.

Every point is annealed by itself with a part of the steps that the placement had. Beside them stand the placement
itself, linear and EPLB; a point that another one beats in balance and in movement is left out.
"""

# L layers, E experts

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from ...solvers.balance import mean_balance
from ...solvers.placement.affinity import Affinity, usual_steps
from ...solvers.result import NotFound, SolverError
from ...solvers.slots import Slots
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.placement import Placement, Score, Scores
from ...spec.trace import Trace
from ..budget import SAFETY_FACTOR, Budget
from .compared import rest_of, scores
from .fleet import Fleet
from .layers import document_layers
from .ready import solvers_ready
from .request import Request
from .sample import load_samples
from .single import single_of

POINTS = 7  # with both ends
MARKED = ("placement", "linear", "eplb")
LEAST_TIME = 0.05  # of a search, in seconds
AFFINITY_TIME = 0.15  # of the time, at most, for the traffic between experts
CHAINS = 4  # of each search

Part = Literal["fit", "held_out"]


@dataclass(frozen=True)
class Point:
    """One placement. name: ``coolest``, ``cap``, ``locality``, or one of those that are compared; cap: what held it."""

    name: str
    scores: Scores
    cap: float | None = None
    on_front: bool = True

    @property
    def marked(self) -> bool:
        return self.name in MARKED


@dataclass(frozen=True)
class Front:
    """Points by rising balance on ``part``; marked ones are there even where others beat them.

    host, device: the fields of ``Score`` that say what moves. dropped: points that others beat. missed: caps that no
    placement was found for in time.
    """

    points: tuple[Point, ...]
    part: Part
    host: str
    device: str
    dropped: int
    missed: tuple[float, ...]
    steps: int
    seconds: float

    def score(self, point: Point, part: Part | None = None) -> Score:
        """On the part that the front is drawn for, or another."""
        found: Score | None = getattr(point.scores, part or self.part)
        assert found is not None
        return found

    def moved(self, point: Point, part: Part | None = None) -> tuple[float, float]:
        """Between hosts, between devices."""
        found = self.score(point, part)
        return getattr(found, self.host), getattr(found, self.device)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        body = asdict(replace(self, points=()))
        points = [
            {"name": p.name, "cap": p.cap, "on_front": p.on_front, "scores": p.scores.model_dump(mode="json")}
            for p in self.points
        ]
        return body | {"points": points}


def pareto(
    trace: Trace,
    request: Request,
    placement: Placement,
    *,
    points: int = POINTS,
    budget: Budget | None = None,
) -> Front:
    """The front around ``placement``, which ``place`` made of the same trace and request.

    ``points`` searches share the steps and the budget, by default the time limit of the request once more. What ends
    the budget leaves the points known. Raises what ``check_front`` does.
    """
    check_front(trace, request)
    began, fleet = time.perf_counter(), Fleet.of(request.devices)
    budget = budget or Budget.of(request.time_limit)
    fitted = trace.part(*request.fit)
    # The placement itself comes first where points are equal.
    found = [
        Point(name, both, placement.balance_cap if name == "placement" else None)
        for name, both in placement.scores.items()
    ]
    missed: list[float] = []
    searched: list[Point] = []
    search = _Search(trace, fitted, request, fleet, points, budget)
    try:
        if solvers_ready(budget):
            searched, missed = search.points()
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    found = searched + found
    part: Part = "fit" if found[0].scores.held_out is None else "held_out"
    crossing = found[0].scores.fit.boundary_cross_host is not None and request.movement == "coherent"
    host, device = ("boundary_cross_host", "boundary_cross_device") if crossing else ("fanout_host", "fanout_device")
    front = Front(tuple(found), part, host, device, 0, tuple(missed), search.steps, 0.0)
    kept = _undominated(front, search.single.weights)
    return replace(front, points=kept, dropped=len(found) - len(kept), seconds=time.perf_counter() - began)


class _Search:
    """The searches of a front, one after the other; steps: of each chain."""

    def __init__(
        self,
        trace: Trace,
        fitted: Trace,
        request: Request,
        fleet: Fleet,
        count: int,
        budget: Budget,
    ) -> None:
        self.fitted, self.rest = fitted, rest_of(trace, request.fit)
        self.request, self.fleet, self.count = request, fleet, count
        self.budget = budget
        self.single = single_of(request, fleet)
        self.steps = max(1, (request.steps or usual_steps(fitted.expert_counts.size)) // count)
        self.done, self.scoring = 0, 0.0

    def points(self) -> tuple[list[Point], list[float]]:
        """Those found, from both ends inwards, and the caps that nothing was found for."""
        load, speed = load_samples(self.fitted), self.fleet.speed
        affinity = self.single.affinity(self.fitted, self.budget.part(AFFINITY_TIME))
        nothing = Affinity.of(np.zeros_like(affinity.transitions))
        found: list[Point] = []
        missed: list[float] = []
        ends: list[float] = []
        for name, what, price in (("coolest", nothing, 1.0), ("locality", affinity, 0.0)):
            if self._late():
                return found, missed
            placed = self._search(what, load, math.inf, price)
            ends.append(mean_balance(placed, load, speed))
            found.append(self._point(name, placed))
        for cap in caps(ends[0], ends[1], self.count - 2):
            if self._late():
                break
            try:
                found.append(self._point("cap", self._search(affinity, load, cap, 0.0), cap))
            except NotFound:
                missed.append(cap)
        return found, missed

    def _late(self) -> bool:
        """Whether the user or the clock ends it here: a point needs its score as well."""
        if self.budget.stopped:
            return True
        left = f"{self.count - self.done} of {self.count} points of the front"
        return not self.budget.affords(self.scoring + LEAST_TIME, left)

    def _search(self, what: Affinity, load: np.ndarray, cap: float, price: float) -> np.ndarray:
        self.budget.tell(done=self.done, of=self.count, what="front: what balance buys")
        mine = self.budget.part(1 / (self.count - self.done)).before(SAFETY_FACTOR * self.scoring)
        self.done += 1
        return self.single.solve(
            what,
            load,
            cap=cap,
            price=price,
            steps=self.steps,
            chains=CHAINS,
            budget=replace(mine, on_event=None),
        ).assignment

    def _point(self, name: str, placed: np.ndarray, cap: float | None = None) -> Point:
        began = time.perf_counter()
        layers = document_layers(Slots.from_device_of(placed, self.fleet.capacity))
        point = Point(name, scores(layers, self.request, self.fitted, self.rest), cap)
        self.scoring = time.perf_counter() - began
        return point


def caps(least: float, most: float, count: int) -> list[float]:
    """Caps between two balances, closer together where balance is dear."""
    return [least + (most - least) * (i / (count + 1)) ** 2 for i in range(1, count + 1)]


def beaten(costs: Sequence[tuple[float, float]]) -> list[bool]:
    """Which points another one equals or beats in both costs and beats in one; of equal points the first stays."""
    return [
        any(a <= x and b <= y and (a < x or b < y or other < i) for other, (a, b) in enumerate(costs) if other != i)
        for i, (x, y) in enumerate(costs)
    ]


def _undominated(front: Front, weights: tuple[float, float]) -> tuple[Point, ...]:
    """By rising balance: the points that no other beats, and the marked ones."""
    inside, between = weights

    def costs(point: Point) -> tuple[float, float]:
        host, device = front.moved(point)
        return front.score(point).balance_mean, inside * device + (between - inside) * host

    # The placement itself comes first where points are equal.
    points = sorted(front.points, key=lambda p: (*costs(p), not p.marked))
    lost = beaten([costs(p) for p in points])
    judged = [replace(p, on_front=not worse) for p, worse in zip(points, lost, strict=True)]
    return tuple(p for p in judged if p.on_front or p.marked)


def check_front(trace: Trace, request: Request) -> None:
    """Raise ``MoeplanError`` where a front makes no sense: for counts, replicas and predicted time."""
    if not trace.tells_movement:
        what = "a trace of counts" if trace.counts_only else "one with choices of identity experts"
        raise MoeplanError(f"--pareto needs expert_ids per token: {what} says nothing about movement")
    if request.slots > trace.num_experts:
        raise MoeplanError("--pareto is for single copies: leave out --slots; replicas buy balance without movement")
    if request.timing is not None:
        raise MoeplanError("--pareto does not go with --cluster: predicted time has one optimum, not a front")
