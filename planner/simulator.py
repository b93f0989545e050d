"""An event simulation of a graph of operations that share resources as fluids do.

Every operation has a duration when it runs alone and, for each resource, the fraction of that resource's capacity
that it then uses. Operations that run at the same time and together ask for more than a resource has are slowed:
their speeds (1 = alone) are raised together until a resource is full, those using it keep their speed, the others go
on (progressive filling, the max-min fair allocation of Bertsekas and Gallager, Data Networks, section 6.5.2).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import isfinite

from ..spec.operators import Part

FULL = 1.0 + 1e-9  # tolerance on a capacity of 1, for sums of rounded fractions


@dataclass(frozen=True, slots=True)
class Operation:
    """One piece of work.

    seconds: duration alone, of which ``latency`` uses no resource and comes first.
    demands: resource -> fraction of its capacity, in (0, 1], used while running alone.
    after: indices of operations that must have ended, each smaller than this operation's own index.
    lane: of a transfer (``stages``). level: seconds that lie between the last but one end of ``after`` and this
    operation's beginning, at least.
    """

    name: str
    part: Part
    device: int
    layer: int
    seconds: float
    demands: dict[str, float] = field(default_factory=dict)
    after: tuple[int, ...] = ()
    latency: float = 0.0
    transfer: bool = False
    lane: int = 0
    level: float = 0.0

    def __post_init__(self) -> None:
        if not (isfinite(self.seconds) and 0 <= self.latency <= self.seconds):
            raise ValueError(f"{self.name}: seconds {self.seconds} and latency {self.latency} are no duration")
        for resource, demand in self.demands.items():
            if not 0 < demand <= FULL:
                raise ValueError(f"{self.name}: demand {demand} on {resource} is not a fraction in (0, 1]")


@dataclass(frozen=True)
class Timeline:
    """When each operation started and ended, in seconds from the beginning."""

    operations: Sequence[Operation]
    start: list[float]
    end: list[float]

    @property
    def makespan(self) -> float:
        return max(self.end, default=0.0)


def simulate(operations: Sequence[Operation]) -> Timeline:
    """Run every operation as early as its dependencies and the shared resources allow."""
    count = len(operations)
    start, end = [0.0] * count, [0.0] * count
    waiting = [len(op.after) for op in operations]
    followers: list[list[int]] = [[] for _ in operations]
    for i, op in enumerate(operations):
        for j in op.after:
            if not 0 <= j < i:
                raise ValueError(f"operation {i} ({op.name}) must come after the operations that it waits for, not {j}")
            followers[j].append(i)
    now, left = 0.0, {}  # left: seconds of work (at speed 1) of the running operations
    delayed: list[tuple[float, int]] = []  # operations in their latency, by the time when it ends
    load: dict[str, float] = {}  # sum of the running operations' demands on each resource

    def enter(i: int) -> None:
        left[i] = operations[i].seconds - operations[i].latency
        for resource, demand in operations[i].demands.items():
            load[resource] = load.get(resource, 0.0) + demand

    def begin(ready: list[int]) -> None:
        """Start operations at ``now``; those that take no time end at once and free their followers."""
        while ready:
            i = ready.pop()
            op = operations[i]
            start[i] = now
            if op.level > 0:
                start[i] = max(now, sorted(end[j] for j in op.after)[-2] + op.level)
            if op.latency > 0 or start[i] > now:
                heappush(delayed, (start[i] + op.latency, i))
            elif op.seconds > 0:
                enter(i)
            else:
                ready.extend(finish(i))

    def finish(i: int) -> list[int]:
        end[i] = now
        free = []
        for j in followers[i]:
            waiting[j] -= 1
            if not waiting[j]:
                free.append(j)
        return free

    begin([i for i in range(count) if not waiting[i]])
    while left or delayed:
        slow = any(used > FULL for used in load.values())
        speed = fill({i: operations[i].demands for i in left}) if slow else dict.fromkeys(left, 1.0)
        step = min((left[i] / speed[i] for i in left), default=float("inf"))
        if delayed:
            step = min(step, delayed[0][0] - now)
        now += step
        done = []
        for i in left:
            left[i] -= step * speed[i]
            if left[i] <= 1e-12 * operations[i].seconds:
                done.append(i)
        for i in done:
            del left[i]
            for resource, demand in operations[i].demands.items():
                load[resource] -= demand
        if not left:
            load.clear()  # rounding does not pile up
        while delayed and delayed[0][0] <= now:
            i = heappop(delayed)[1]
            if operations[i].seconds > operations[i].latency:
                enter(i)
            else:
                done.append(i)
        begin([j for i in done for j in finish(i)])
    return Timeline(operations, start, end)


def fill(demands: dict[int, dict[str, float]]) -> dict[int, float]:
    """Speeds by progressive filling: operation -> speed in (0, 1], given operation -> demands."""
    speed: dict[int, float] = {}
    users: dict[str, list[int]] = {}
    for i, wanted in demands.items():
        for resource in wanted:
            users.setdefault(resource, []).append(i)
    remaining = dict.fromkeys(users, 1.0)
    level = 0.0
    while len(speed) < len(demands):
        levels = {}
        for resource, members in users.items():
            load = sum(demands[i][resource] for i in members if i not in speed)
            if load > 0:
                levels[resource] = remaining[resource] / load
        tight = min(levels, key=levels.__getitem__, default=None)
        if tight is None or levels[tight] >= 1:
            return speed | {i: 1.0 for i in demands if i not in speed}
        level = max(level, levels[tight])  # the level only rises; rounding must not lower it
        for i in users[tight]:
            if i not in speed:
                speed[i] = level
                for resource, demand in demands[i].items():
                    remaining[resource] -= level * demand
    return speed
