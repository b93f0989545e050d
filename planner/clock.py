"""When each device ends each stage, in closed form, and how long the longest chain of stages is.

No two operations of a step ask for more than a resource has, but for one case: the members of a collective together
never exceed a capacity, a device computes one thing at a time, and every collective waits for all its members, which
lie on one host where they are not all devices. So a step is a recursion on the devices' clocks t [G]:

    compute    t[g] += seconds[g]
    exchange   t[g] = max over g's group of t + seconds[g]

The one case is a started collective. Its transfer on g takes a part b[g] of g's compute, and what g computes meanwhile
takes all of it: while both run, each goes at the speed 1 / (1 + b[g]) (progressive filling, as in ``simulator``). With
M when the transfers begin to work, W[g] their work alone and x what g's calls alone would have ended by, they end at

    x                                        for x <= M
    x + b[g] min(x - M, W[g])                after it
    M + max(R, W[g]) + b[g] min(R, W[g])     what waits for both, with R = max(x - M, 0) left at M

Where tensor groups exchange beside it, transfers share links too, and these stages are simulated. Where several
collectives are started before the first is waited for, their ends follow from event to event (``solvers.pipeline``).
"""

# B layers that are costed together, G devices

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from .costs import Costs
from .graph import overlapped
from .simulator import FULL
from .stages import Stage

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
            elif any(stage.kind == "exchange" and stage.width > 1 for stage in beside):
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
    return _latest(now, stage.width) + stage.seconds


def _latest(now: np.ndarray, width: int) -> np.ndarray:
    """[B, G] the largest clock in each device's group of ``width`` consecutive ones."""
    if width == now.shape[1]:
        return now.max(1, keepdims=True)
    groups = now.reshape(len(now), -1, width)
    return np.broadcast_to(groups.max(2, keepdims=True), groups.shape).reshape(now.shape)


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
    width = max(stage.width for stage in stages[1:] if stage.kind == "exchange")
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
        rows = np.stack([begin, *own])
        for first in range(0, now.shape[1], width):
            group = range(first, first + width)
            alike = rows[:, group].tobytes(), begin.max(), wanted[:, group].tobytes()
            if alike not in known:
                known[alike] = overlapped(costs, stages, index, group, begin)
            clocks[:, index, group] = least + known[alike]
    return list(clocks)


def _pipelined(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """Clocks after calls, starts and waits of several collectives of all devices."""
    assert all(stage.kind != "exchange" for stage in stages)
    slowed = any(stage.busy is not None and (stage.busy > FULL - 1).any() for stage in stages)
    return _slowed(stages, now) if slowed else _unslowed(stages, now)


def _unslowed(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """The same where collectives take nothing from what is computed beside them."""
    free, under_way, clocks = now.min(1, keepdims=True), dict[int, np.ndarray](), []
    for stage in stages:
        if stage.kind == "compute":
            now = now + stage.seconds
        elif stage.kind == "start":
            ends = np.maximum(now.max(1, keepdims=True), free) + stage.seconds
            free = ends.max(1, keepdims=True)
            under_way[stage.number] = ends
        else:
            now = np.maximum(now, under_way.pop(stage.number))
        clocks.append(now)
    return clocks


def _slowed(stages: Sequence[Stage], now: np.ndarray) -> list[np.ndarray]:
    """The same where both slow each other, from event to event."""
    from ..solvers import pipeline  # compiled loops, which take a moment to load

    steps = {"compute": pipeline.CALL, "start": pipeline.START, "wait": pipeline.WAIT}
    started = [stage for stage in stages if stage.kind == "start"]
    order = {stage.number: k for k, stage in enumerate(started)}

    def table(values: Iterable[np.ndarray | None]) -> np.ndarray:
        """[B, n, G]"""
        return np.stack([np.broadcast_to(0.0 if v is None else v, now.shape) for v in values], axis=1)

    latency, busy = table(stage.latency for stage in started), table(stage.busy for stage in started)
    least = now.min(1)
    ends = pipeline.clocks(
        np.array([steps[stage.kind] for stage in stages]),
        np.array([order.get(stage.number, 0) for stage in stages]),
        table(stage.seconds for stage in stages),
        np.ascontiguousarray(latency[:, :, 0]),
        table(stage.seconds for stage in started) - latency,
        np.where(busy > FULL - 1, busy, 0.0),
        now - least[:, None],
    )
    return list(np.moveaxis(ends, 1, 0) + least[:, None])


class Chains(NamedTuple):
    """Longest chains of stages from one device's beginning to another's end, nothing slowed: from a to b

    max(leave[a] + arrive[b], and where both are in one group of ``width``: out[a] + back[b]).

    All [B, G]; -inf where there is no chain.
    """

    leave: np.ndarray
    arrive: np.ndarray
    out: np.ndarray
    back: np.ndarray
    width: int

    def ends(self, begin: np.ndarray) -> np.ndarray:
        """[B, G] the latest end over all chains from devices that begin at ``begin``."""
        through = (begin + self.leave).max(1, keepdims=True) + self.arrive
        return np.maximum(through, _latest(begin + self.out, self.width) + self.back)

    def slowest(self) -> np.ndarray:
        """[B] least seconds from the last device's beginning to the last end, whichever device is last."""
        through = self.leave + self.arrive.max(1, keepdims=True)
        return np.maximum(through, self.out + _latest(self.back, self.width)).min(1)

    def one(self, index: int) -> "Chains":
        """Those of one layer of the batch."""
        row = slice(index, index + 1)
        return Chains(self.leave[row], self.arrive[row], self.out[row], self.back[row], self.width)


def longest_chains(stages: Sequence[Stage], count: int, devices: int) -> Chains:
    """For ``count`` layers. Nothing runs faster than alone, so that a device ends no earlier than its chains say."""
    none, zero = np.full((count, devices), -np.inf), np.zeros((count, devices))
    chains, started = Chains(none, none, zero, zero, 1), None
    several = sum(stage.kind == "start" for stage in stages) > 1
    under_way: dict[int, np.ndarray] = {}  # of several: longest chains to each device's end of what was started
    free = none  # and to the end of the last of them
    for stage in stages:
        match stage.kind:
            case "compute":
                chains = chains._replace(arrive=chains.arrive + stage.seconds, back=chains.back + stage.seconds)
            case "exchange" if stage.width < devices or started:
                chains = _grouped(chains, stage)
            case "exchange":
                chains = Chains(_leave(chains), zero + stage.seconds, none, none, chains.width)
            case "start" if several:
                # Where several are started, an exchange of all came before: what counts is from there.
                assert np.isneginf(chains.out).all()
                ready = np.maximum(chains.arrive, free).max(1, keepdims=True)
                free = under_way[stage.number] = ready + stage.seconds
            case "wait" if several:
                chains = chains._replace(arrive=np.maximum(chains.arrive, under_way.pop(stage.number)))
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
    return np.maximum(through, chains.out + _latest(chains.back, chains.width))


def _grouped(chains: Chains, stage: Stage) -> Chains:
    """After a collective inside groups: every chain goes through the last member to come."""
    arrive = _latest(chains.arrive, stage.width) + stage.seconds
    out = chains.out + _latest(chains.back, chains.width)
    return Chains(chains.leave, arrive, out, np.broadcast_to(stage.seconds, out.shape), stage.width)
