"""When each device ends each stage, in closed form, and how long the longest chain of stages is.

No two operations of a step ask for more than a resource has, but for one case: the members of a collective together
never exceed a capacity, nor do those of collectives in groups across hosts, which are costed together; a device
computes one thing at a time, and every collective waits for all its members. So a step is a recursion on the devices'
clocks t [G]:

    compute    t[g] += seconds[g]
    exchange   t[g] = max(last of g's group to come + seconds[g], last but one + level[g])

The one case is a started collective. Its transfer on g takes a part b[g] of g's compute, and what g computes meanwhile
takes all of it: while both run, each goes at the speed 1 / (1 + b[g]) (progressive filling, as in ``simulator``). With
M when the transfers begin to work, W[g] their work alone and x what g's calls alone would have ended by, they end at

    x                                        for x <= M
    x + b[g] min(x - M, W[g])                after it
    M + max(R, W[g]) + b[g] min(R, W[g])     what waits for both, with R = max(x - M, 0) left at M

Where tensor groups exchange beside it, transfers share links too, and these stages are simulated. Where several
collectives are started before the first is waited for, their ends follow from event to event (``solvers.pipeline``):
those of one lane never run together, and those of two share nothing but what the devices compute with.
"""

# B layers that are costed together, G devices

from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from .costs import Costs
from .graph import overlapped
from .simulator import FULL
from .stages import Partition, Stage

BITS = 42  # of the longest stage that a beginning is rounded to

Watch = Callable[[Stage, np.ndarray, np.ndarray], None]
"""Called with a stage and the clocks [B, G] before and after it."""


Known = dict[tuple, np.ndarray]
"""What was simulated, by how the devices began and what they did."""


def run(
    costs: Costs,
    stages: Sequence[Stage],
    begin: np.ndarray,
    watch: Watch | None = None,
    known: Known | None = None,
) -> np.ndarray:
    """[B, G] clocks after all stages, from ``begin`` [B, G]. known: of other layers of the same batch."""
    now, first = begin, 0
    while first < len(stages):
        end = first + 1
        if stages[first].kind == "start":
            end = _all_waited(stages, first)
            beside = stages[first:end]
            if sum(stage.kind == "start" for stage in beside) > 1:
                clocks = _pipelined(beside, now)
            elif any(stage.kind == "exchange" and not stage.groups.alone for stage in beside):
                clocks = _simulated(costs, beside, now, {} if known is None else known)
            else:
                clocks = _beside(beside, now)
        else:
            clocks = [_synchronous(stages[first], now)]
        for stage, after in zip(stages[first:end], clocks, strict=True):
            if watch:
                watch(stage, now, after)
            now = after
        first = end
    return now


def _all_waited(stages: Sequence[Stage], first: int) -> int:
    """Behind the stage by which everything that was started from ``first`` on has been waited for."""
    under_way = 0
    for i, stage in enumerate(stages[first:], first):
        under_way += (stage.kind == "start") - (stage.kind == "wait")
        if not under_way:
            return i + 1
    raise AssertionError("a started collective is waited for in its layer")


def _synchronous(stage: Stage, now: np.ndarray) -> np.ndarray:
    if stage.kind == "compute":
        return now + stage.seconds
    ends = stage.groups.latest(now) + stage.seconds
    return ends if stage.level is None else np.maximum(ends, stage.groups.together(now) + stage.level)


def _beside(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """Clocks after a start, the calls beside it, and its wait."""
    started = stages[0]
    assert started.busy is not None
    begins = now.max(1, keepdims=True) + started.latency
    work = started.seconds - started.latency
    lost = np.where(started.busy > FULL - 1, started.busy, 0.0)
    alone, clocks = now, [now]
    for stage in stages[1:-1]:
        alone = alone + stage.seconds
        after = alone - begins
        clocks.append(np.where(after <= 0, alone, alone + lost * np.minimum(after, work)))
    rest = np.maximum(alone - begins, 0.0)
    clocks.append(begins + np.maximum(rest, work) + lost * np.minimum(rest, work))
    return clocks


def _simulated(costs: Costs, stages: Sequence[Stage], now: np.ndarray, known: Known) -> list[np.ndarray]:
    """The same where tensor groups exchange beside the started collective; groups that are alike only once.

    Devices begin at whole multiples of a time too short to count, so that layers which differ by rounding are alike.
    """
    width = max(stage.groups.width for stage in stages[1:] if stage.kind == "exchange")
    if len(now) > 1 and (now == now[0]).all() and all(len(stage.seconds) == 1 for stage in stages):
        return [np.broadcast_to(after, now.shape) for after in _simulated(costs, stages, now[:1], known)]
    clocks = np.zeros((len(stages), *now.shape))
    gather = stages[0].exchanges[0]
    demands = [costs.fractions(gather, index) for index in range(len(gather.seconds))]
    for index, begin in enumerate(now):
        least, wanted = float(begin.min()), demands[min(index, len(demands) - 1)]
        own = np.stack([stage.one(index) for stage in stages])
        unit = 2.0 ** (np.floor(np.log2(max(own.max(), np.finfo(float).tiny))) - BITS)
        begin = np.round((begin - least) / unit) * unit
        levels = [stage.level[min(index, len(stage.level) - 1)] for stage in stages if stage.level is not None]
        rows = np.stack([begin, *own, *levels])
        for first in range(0, now.shape[1], width):
            group = range(first, first + width)
            alike = rows[:, group].tobytes(), begin.max(), wanted[:, group].tobytes()
            if alike not in known:
                known[alike] = overlapped(costs, stages, index, group, begin)
            clocks[:, index, group] = least + known[alike]
    return list(clocks)


def _pipelined(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """Clocks after calls, starts and waits of several collectives."""
    assert all(stage.kind != "exchange" for stage in stages)
    slowed = any(stage.busy is not None and (stage.busy > FULL - 1).any() for stage in stages)
    return _slowed(stages, now) if slowed else _unslowed(stages, now)


class Lanes:
    """When collectives end that are started one after another, nothing slowed: the same for clocks and for chains.

    A group's begins when the last of its members has come to it and the one before has ended where they share a lane.
    """

    def __init__(self) -> None:
        self._free: dict[int, np.ndarray] = {}  # [B, G] when the lane of each device is free
        self._ends: dict[int, np.ndarray] = {}

    def start(self, stage: Stage, now: np.ndarray) -> None:
        assert stage.sharing is not None
        begin = stage.groups.latest(now)
        ends = np.maximum(begin, self._free.get(stage.lane, begin)) + stage.seconds
        self._free[stage.lane] = stage.sharing.latest(ends)
        self._ends[stage.number] = ends

    def wait(self, stage: Stage, now: np.ndarray) -> np.ndarray:
        return np.maximum(now, self._ends.pop(stage.number))


def _unslowed(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """The same where collectives take nothing from what is computed beside them."""
    lanes, clocks = Lanes(), []
    for stage in stages:
        if stage.kind == "compute":
            now = now + stage.seconds
        elif stage.kind == "start":
            lanes.start(stage, now)
        else:
            now = lanes.wait(stage, now)
        clocks.append(now)
    return clocks


def _slowed(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """The same where both slow each other, from event to event."""
    from ..solvers import pipeline  # compiled loops, which take a moment to load

    steps = {"compute": pipeline.CALL, "start": pipeline.START, "wait": pipeline.WAIT}
    started = [stage for stage in stages if stage.kind == "start"]
    order = {stage.number: k for k, stage in enumerate(started)}
    sharing = {stage.lane: stage.sharing for stage in started}
    lanes = sorted(sharing)

    def table(values: Iterable[np.ndarray | None]) -> np.ndarray:
        """[B, n, G]"""
        return np.stack([np.broadcast_to(0.0 if v is None else v, now.shape) for v in values], axis=1)

    latency, busy = table(stage.latency for stage in started), table(stage.busy for stage in started)
    least = now.min(1)
    ends = pipeline.clocks(
        np.array([steps[stage.kind] for stage in stages]),
        np.array([order.get(stage.number, 0) for stage in stages]),
        table(stage.seconds for stage in stages),
        np.array([lanes.index(stage.lane) for stage in started]),
        np.stack([stage.groups.of for stage in started]),
        np.stack([part.of for lane in lanes if (part := sharing[lane]) is not None]),
        latency,
        table(stage.seconds for stage in started) - latency,
        np.where(busy > FULL - 1, busy, 0.0),
        now - least[:, None],
    )
    return list(np.moveaxis(ends, 1, 0) + least[:, None])


class Chains(NamedTuple):
    """Longest chains of stages from one device's beginning to another's end, nothing slowed: from a to b

    max(leave[a] + arrive[b], and where both are in one of ``groups``: out[a] + back[b]).

    All [B, G]; -inf where there is no chain.
    """

    leave: np.ndarray
    arrive: np.ndarray
    out: np.ndarray
    back: np.ndarray
    groups: Partition

    def ends(self, begin: np.ndarray) -> np.ndarray:
        """[B, G] the latest end over all chains from devices that begin at ``begin``."""
        through = (begin + self.leave).max(1, keepdims=True) + self.arrive
        return np.maximum(through, self.groups.latest(begin + self.out) + self.back)

    def slowest(self) -> np.ndarray:
        """[B] least seconds from the last device's beginning to the last end, whichever device is last."""
        through = self.leave + self.arrive.max(1, keepdims=True)
        return np.maximum(through, self.out + self.groups.latest(self.back)).min(1)

    def one(self, index: int) -> "Chains":
        """Those of one layer of the batch."""
        row = slice(index, index + 1)
        return Chains(self.leave[row], self.arrive[row], self.out[row], self.back[row], self.groups)


def longest_chains(stages: Sequence[Stage], count: int, devices: int) -> Chains:
    """For ``count`` layers. Nothing runs faster than alone, so that a device ends no earlier than its chains say.

    Exchanges count from when the last device has come.
    """
    none, zero = np.full((count, devices), -np.inf), np.zeros((count, devices))
    chains, started = Chains(none, none, zero, zero, Partition.consecutive(devices, 1)), None
    several = sum(stage.kind == "start" for stage in stages) > 1
    lanes = Lanes()  # of several
    for i, stage in enumerate(stages):
        match stage.kind:
            case "compute":
                chains = chains._replace(arrive=chains.arrive + stage.seconds, back=chains.back + stage.seconds)
            case "exchange" if started or not stage.groups.everyone:
                chains = _grouped(chains, stage)
            case "exchange":
                chains = Chains(_leave(chains), zero + stage.seconds, none, none, chains.groups)
            case "start" if several:
                if not np.isneginf(chains.out).all():
                    # Where no exchange of all came before, the first that is started is one, and awaited before
                    # anything else is done: what counts is from there.
                    begun = takewhile(lambda later: later.kind != "wait", stages[i:])
                    assert stage.groups.everyone
                    assert all(later.kind == "start" for later in begun)
                    chains = Chains(_leave(chains), zero, none, none, chains.groups)
                lanes.start(stage, chains.arrive)
            case "wait" if several:
                chains = chains._replace(arrive=lanes.wait(stage, chains.arrive))
            case "start":
                started = _leave(chains), zero + stage.seconds
            case "wait":
                # What was started begins the layer: until here no chain went through all devices.
                assert started is not None
                chains, started = chains._replace(leave=started[0], arrive=started[1]), None
    return chains


def _leave(chains: Chains) -> np.ndarray:
    """[B, G] longest chain from each device's beginning to when the last device has come here."""
    through = chains.leave + chains.arrive.max(1, keepdims=True)
    return np.maximum(through, chains.out + chains.groups.latest(chains.back))


def _grouped(chains: Chains, stage: Stage) -> Chains:
    """After a collective inside groups: every chain goes through the last member to come."""
    arrive = stage.groups.latest(chains.arrive) + stage.seconds
    if not np.isfinite(chains.out).any():  # every chain has gone through all devices
        return chains._replace(arrive=arrive)
    out = chains.out + chains.groups.latest(chains.back)
    return Chains(chains.leave, arrive, out, np.broadcast_to(stage.seconds, out.shape), stage.groups)
