"""Pareto front: what a little balance buys in token movement, at caps from the coolest placement to locality alone.

Every point is annealed by itself with a part of the steps that the placement had. Beside them stand the placement
itself, linear and EPLB; a point that another one beats in balance and in movement is left out.
"""

# L layers, E experts

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from threading import Event
from typing import Any, Literal

import numpy as np

from ...solvers.annealing import FOLLOWERS, Affinity, usual_steps
from ...solvers.balance import mean_balance
from ...solvers.result import NotFound, SolverError
from ...solvers.slots import Slots
from ...spec.errors import InfeasibleError, MoeplanError
from ...spec.placement import Placement, Score, Scores
from ...spec.trace import Trace
from .fleet import Fleet
from .layers import document_layers
from .request import Request
from .sample import load_samples
from .solve import scores, single_of

POINTS = 7  # with both ends
MARKED = ("placement", "linear", "eplb")
LEAST_TIME = 0.2  # of a search, in seconds

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
    on_event: Callable[[dict[str, Any]], None] | None = None,
    stop: Event | None = None,
) -> Front:
    """The front around ``placement``, which ``place`` made of the same trace and request.

    ``points`` searches share the steps and the time limit of the request once more: the front takes at most as long as
    the placement. ``stop`` ends it with the points known. Raises what ``check_front`` does.
    """
    check_front(trace, request)
    began, fleet = time.perf_counter(), Fleet.of(request.devices)
    fitted = trace.part(*request.fit)
    single, load = single_of(request, fleet), load_samples(fitted)
    affinity = single.affinity(fitted)
    nothing = Affinity.of(np.zeros_like(affinity.transitions))
    steps = max(1, (request.steps or usual_steps(load[0].size)) // points)

    def search(done: int, what: Affinity, cap: float, price: float = 0.0) -> np.ndarray:
        if on_event:
            on_event({"done": done, "of": points, "what": "front: what balance buys"})
        left = (request.time_limit - (time.perf_counter() - began)) / (points - done)
        limit = max(left, LEAST_TIME)
        return single.solve(
            what, load, cap=cap, price=price, steps=steps, time_limit=limit, chains=FOLLOWERS, stop=stop
        ).assignment

    def point(name: str, placed: np.ndarray, cap: float | None = None) -> Point:
        layers = document_layers(Slots.from_device_of(placed, fleet.capacity))
        return Point(name, scores(layers, request, trace), cap)

    try:
        coolest = search(0, nothing, math.inf, price=1.0)
        local = search(1, affinity, math.inf)
        found = [point("coolest", coolest), point("locality", local)]
        missed = []
        least, most = (mean_balance(placed, load, fleet.speed) for placed in (coolest, local))
        for i, cap in enumerate(caps(least, most, points - 2)):
            if stop is not None and stop.is_set():
                break
            try:
                found.append(point("cap", search(2 + i, affinity, cap), cap))
            except NotFound:
                missed.append(cap)
    except SolverError as error:
        raise InfeasibleError(str(error)) from None
    found += [
        Point(name, both, placement.balance_cap if name == "placement" else None)
        for name, both in placement.scores.items()
    ]
    part: Part = "fit" if found[0].scores.held_out is None else "held_out"
    crossing = found[0].scores.fit.boundary_cross_host is not None and single.movement == "coherent"
    host, device = ("boundary_cross_host", "boundary_cross_device") if crossing else ("fanout_host", "fanout_device")
    front = Front(tuple(found), part, host, device, 0, tuple(missed), steps, 0.0)
    kept = _undominated(front, single.weights)
    return replace(front, points=kept, dropped=len(found) - len(kept), seconds=time.perf_counter() - began)


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
    if trace.counts_only:
        raise MoeplanError("--pareto needs expert_ids per token: a trace of counts says nothing about movement")
    if request.slots > trace.num_experts:
        raise MoeplanError("--pareto is for single copies: leave out --slots; replicas buy balance without movement")
    if request.timing is not None:
        raise MoeplanError("--pareto does not go with --cluster: predicted time has one optimum, not a front")
