"""Grids that grow as far as their time allows and are complete rectangles at every moment.

A grid starts with one point. Steps, in order of how much a prediction gains from them, each add one value to one
axis, which measures a slab: that value against all values of the other axes. A step's cost is foreseen from the
slabs already measured; what does not fit is left out, first of all the far end of a large model's token axis.
"""

from collections.abc import Callable, Sequence
from itertools import product
from math import inf, prod
from typing import NamedTuple

from ..spec.curve import Axis, Curve
from .measure import Bench, Pace, Timing

Coordinates = dict[str, int]


class Step(NamedTuple):
    """One more value on an axis."""

    axis: str
    value: int


class Grid(NamedTuple):
    """``start`` gives every axis its first value; the first ``needed`` steps are taken whatever they cost, the
    ``early`` ones after them before any other grid is made finer. ``asked``: needed ones that a workload asks for,
    which may be too large."""

    start: Coordinates
    steps: tuple[Step, ...]
    needed: int
    linear: tuple[str, ...] = ()
    early: int = 0
    asked: tuple[Step, ...] = ()


NOISY_SPREAD = 0.5  # of a point: beyond it the point is measured again later
BACKWARDS = 2.0  # a call that takes a quarter longer than one with more work is as doubtful as NOISY_SPREAD


class Point(NamedTuple):
    """One measured point; ``call`` and ``build`` (seconds beside the calls) are the slowest rank's, the same on all.

    ``noise``: the largest spread of the ranks, infinite where one was disturbed.
    """

    timing: Timing
    call: float
    build: float
    noise: float = 0.0


def measured(timing: Timing, seconds: float, bench: Bench) -> Point:
    """The point of a timing that took so many ``seconds`` in all, whatever others did meanwhile."""
    call = bench.agree(timing.median)
    beside = max(0.0, bench.agree(seconds) - bench.pace.cost(call))
    return Point(timing, call, beside, bench.agree(timing.spread if timing.clean else inf))


def steps(axis: str, *values: int) -> tuple[Step, ...]:
    return tuple(Step(axis, value) for value in values)


SIZES = Grid(
    {"bytes": 1 << 10}, steps("bytes", 1 << 20, 1 << 16, 1 << 24, 1 << 22, 1 << 18, 1 << 14, 1 << 12), needed=2
)
"""Of messages: 1 KiB to 16 MiB. On a slow link 1 MiB may take all the time there is, 64 KiB little beside it."""


class Growth:
    """A grid being measured: ``start`` takes what is needed, ``refine`` as much more as fits into its time.

    ``visit`` measures one point; ``fits`` says whether a point's memory is there. Both must answer alike on all ranks.
    ``work``: how much a call has to do, in any unit, to foresee what calls beyond the largest one take.
    """

    def __init__(
        self,
        grid: Grid,
        visit: Callable[[Coordinates], Point],
        pace: Pace,
        fits: Callable[[Coordinates], bool] = lambda coordinates: True,
        work: Callable[[Coordinates], float] = lambda coordinates: prod(coordinates.values()),
    ) -> None:
        self.grid, self.visit, self.pace, self.fits, self.work = grid, visit, pace, fits, work
        self.values = {axis: [value] for axis, value in grid.start.items()}
        self.points: dict[tuple[int, ...], Point] = {}
        self.spent = 0.0
        self.pending = [step for step in dict.fromkeys(grid.steps) if step.value != grid.start[step.axis]]

    def start(self, allowance: float = 0.0, most: float = inf) -> None:
        """What is needed, and what comes early, as far as it fits into ``allowance`` seconds for all of it.

        In place of a size whose memory is not there, or that was asked for and takes more than ``most`` seconds, the
        largest possible smaller one.
        """
        needed = self.grid.steps[: self.grid.needed]
        self._take(dict(self.grid.start))
        for step in [step for step in self.pending if step in needed]:
            smaller = [s for s in self.pending if s.axis == step.axis and s.value < step.value]
            for instead in [step, *sorted(smaller, reverse=True)] if step in self.pending else []:
                if self._fits(instead) and (step not in self.grid.asked or self._foreseen(instead) <= most):
                    self._grow(instead)
                    break
        self.refine(allowance - self.spent, early=True)

    @property
    def early(self) -> list[Step]:
        """Steps to take before other grids are made finer."""
        first = self.grid.needed
        return [step for step in self.pending if step in self.grid.steps[first : first + self.grid.early]]

    @property
    def lacking(self) -> list[Step]:
        """What was asked for and left out, for want of memory or time."""
        return [step for step in self.pending if step in self.grid.asked]

    def refine(self, allowance: float, early: bool = False) -> int:
        """Take the first pending (or ``early``) step that fits, again and again, for ``allowance`` more seconds; how
        many."""
        end, taken = self.spent + allowance, 0
        while step := next((s for s in self._open(early) if self.spent + self._foreseen(s) <= end), None):
            self._grow(step)
            taken += 1
        return taken

    def _open(self, early: bool) -> list[Step]:
        return [step for step in (self.early if early else self.pending) if self._fits(step)]

    def doubt(self, coordinates: Coordinates) -> float:
        """How noisy a point is: its spread, or what it takes beyond a larger call; the same on all ranks."""
        point = self.points[tuple(coordinates.values())]
        doubts = [point.noise]
        for axis, values in self.values.items():
            larger = min((v for v in values if v > coordinates[axis]), default=None)
            if larger is not None:
                next_call = self.points[tuple((coordinates | {axis: larger}).values())].call
                doubts.append(BACKWARDS * (point.call / max(next_call, 1e-12) - 1))
        return max(doubts)

    @property
    def noisy(self) -> list[Coordinates]:
        """Points whose doubt is above NOISY_SPREAD."""
        every = (dict(zip(self.values, at, strict=True)) for at in self.points)
        return [at for at in every if self.doubt(at) > NOISY_SPREAD]

    def again(self, coordinates: Coordinates) -> None:
        """Measure a point once more and keep the less doubtful of the two.

        Not simply the smaller one: of times that vary by themselves that would be too small.
        """
        key, doubt = tuple(coordinates.values()), self.doubt(coordinates)
        before = self.points[key]
        self._take(coordinates)
        if (self.doubt(coordinates), self.points[key].call) > (doubt, before.call):
            self.points[key] = before

    def curve(self) -> Curve:
        """What was measured, as a ``spec`` curve."""
        axes = tuple(
            Axis(name=name, values=tuple(sorted(v)), beyond="linear" if name in self.grid.linear else "flagged")
            for name, v in self.values.items()
        )
        timings = [self.points[tuple(map(int, row))].timing for row in product(*(axis.values for axis in axes))]
        return Curve(axes=axes, median=tuple(t.median for t in timings), spread=tuple(t.spread for t in timings))

    def _slab(self, step: Step) -> list[Coordinates]:
        rows = product(*(values if axis != step.axis else [step.value] for axis, values in self.values.items()))
        return [dict(zip(self.values, row, strict=True)) for row in rows]

    def _fits(self, step: Step) -> bool:
        return all(map(self.fits, self._slab(step)))

    def _foreseen(self, step: Step) -> float:
        """Cost of a slab: on a straight line between its neighbours, as the smallest's, or the largest's times as much
        work."""
        known = self.values[step.axis]
        above = min((v for v in known if v > step.value), default=max(known))
        below = max((v for v in known if v < step.value), default=above)
        part = min(1.0, (step.value - below) / (above - below)) if above > below else 1.0
        total = 0.0
        for at in self._slab(step):
            ratio = max(1.0, self.work(at) / self.work(at | {step.axis: above}))
            low, high = (self.points[tuple((at | {step.axis: value}).values())] for value in (below, above))
            call = low.call + part * (high.call - low.call)
            total += low.build + part * (high.build - low.build) + self.pace.cost(call * ratio)
        return total

    def _grow(self, step: Step) -> None:
        self.pending.remove(step)
        for coordinates in self._slab(step):
            self._take(coordinates)
        self.values[step.axis].append(step.value)

    def _take(self, coordinates: Coordinates) -> None:
        point = self.points[tuple(coordinates.values())] = self.visit(coordinates)
        self.spent += point.build + self.pace.cost(point.call)


def repair(growths: Sequence[Growth], end: Callable[[], bool], wait: Callable[[], object]) -> None:
    """Measure the noisy points of several grids again, in turn, until ``end`` says so (alike on all ranks).

    ``wait`` is called before each: what was disturbed a while ago may be left alone now.
    """
    queue = [(growth, at) for growth in growths for at in growth.noisy]
    for growth, at in sorted(queue, key=lambda item: -item[0].doubt(item[1])):
        if end():
            return
        wait()
        growth.again(at)


def grow(
    grid: Grid,
    visit: Callable[[Coordinates], Point],
    pace: Pace,
    allowance: float,
    fits: Callable[[Coordinates], bool] = lambda coordinates: True,
) -> Curve:
    """Measure a grid within ``allowance`` seconds, but for what it needs."""
    growth = Growth(grid, visit, pace, fits)
    growth.start()
    growth.refine(allowance - growth.spent)
    return growth.curve()
