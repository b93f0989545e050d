"""Timing that survives noise, neighbours and shared cores.

All ranks time the same thing at the same moment, as in a real step, so that what they share (memory bandwidth, a
host's cores) is in the number. Decisions are taken on values that all ranks agree on; otherwise they would deadlock.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

Run = Callable[[int], float]
"""Runs a call so many times in a row; returns the elapsed seconds."""

Agree = Callable[[float], float]
"""The largest value of all ranks; returns on no rank before every rank has called it, so it is a barrier too."""

LONG_CALL = 1.0  # seconds: beyond it the first call counts as a measurement, and two are enough
MIN_BATCHES = 3
SHARED_BATCH = 0.02  # seconds: spans many turns of a core that several ranks share
PLAIN_BATCH = 0.004  # seconds: far beyond the timer's resolution
COLD_STRETCH = 4.0  # times the usual seconds, where most of them pass between the calls
WORK = 0.003  # seconds of work before a collective
WORK_MEMORY, READ = 32 << 20, 1 << 16  # bytes that the work goes through, and reads at once: few, so in one thread
NOISY_SPREAD = 0.5


class Timing(NamedTuple):
    """Median seconds of one call; spread = (90th - 10th percentile) / median over the batches."""

    median: float
    spread: float
    batches: int


class Pace(NamedTuple):
    """How long to measure: seconds of one batch of calls, and of all batches together."""

    batch: float
    window: float

    @classmethod
    def of(cls, throttled: bool) -> "Pace":
        """A device with a share of a core takes turns with others: only longer averages are the truth there."""
        batch = SHARED_BATCH if throttled else PLAIN_BATCH
        return cls(batch, 5 * batch)

    def among(self, call: float, other: float) -> "Pace":
        """The pace where ``other`` seconds pass before every call of ``call``: fewer calls, COLD_STRETCH as long."""
        part = min(1.0, COLD_STRETCH * call / max(call + other, 1e-9))
        return Pace(self.batch * part, self.window * part)

    def cost(self, call: float) -> float:
        """Seconds that ``measure`` needs at most for calls of ``call`` seconds; never less for a longer call."""
        if call > LONG_CALL:
            return max(2 * call, (MIN_BATCHES + 1) * LONG_CALL)
        return max(self.window + self.batch, (MIN_BATCHES + 1) * call)


@dataclass(frozen=True)
class Bench:
    """Where this process measures: its rank, every rank's host, its device, and how ranks agree and pace themselves.

    ``available``: bytes of memory that the poorest rank may use; the same on all ranks.
    """

    rank: int
    hosts: tuple[str, ...]
    device: torch.device
    agree: Agree
    pace: Pace
    available: int

    @property
    def world(self) -> int:
        return len(self.hosts)


def measure(run: Run, agree: Agree, pace: Pace, *, other: float = 0.0, together: bool = False) -> Timing:
    """Median and spread of one call, measured while all ranks measure it.

    Short calls are batched. Every rank keeps running until the window is over, so that a fast rank does not leave a
    slow one alone with the host. ``other``: seconds (agreed) that pass before every call and are not in ``run``'s.
    ``together`` is for collectives: all ranks make equally many calls.
    """
    agree(0.0)
    calls, elapsed = 1, run(1)
    shared = agree if together else float
    pace = pace.among(agree(elapsed), other)
    while (seconds := shared(elapsed)) < pace.batch / 2:
        calls = min(10 * calls, ceil(calls * pace.batch / max(seconds, 1e-9)))
        elapsed = run(calls)
    slowest = agree(elapsed)
    values = [elapsed] if slowest > LONG_CALL else []
    minimum = 2 if slowest > LONG_CALL else MIN_BATCHES
    window = slowest if slowest > LONG_CALL else max(pace.window, MIN_BATCHES * slowest)
    if together:
        batches = max(minimum - len(values), min(round(window / slowest), 100))
        values += [run(calls) for _ in range(batches)]
    else:
        spent = 0.0
        while len(values) < minimum or spent < 0.8 * window:
            values.append(run(calls))
            spent += values[-1]
    return summary([value / calls for value in values])


def summary(values: Sequence[float]) -> Timing:
    """Median and spread of single measurements; a stray outlier moves neither."""
    low, median, high = np.percentile(np.asarray(values), (10, 50, 90))
    return Timing(float(median), float((high - low) / median) if median > 0 else 0.0, len(values))


def timer(calls: Sequence[Callable[[], object]], device: torch.device) -> Run:
    """A ``Run`` that goes round ``calls``: equal calls on memory of their own keep caches as cold as a step does."""
    turn = cycle(calls)

    def on_cpu(times: int) -> float:
        start = time.perf_counter()
        for _ in range(times):
            next(turn)()
        return time.perf_counter() - start

    def on_cuda(times: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            next(turn)()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1000

    return on_cuda if device.type == "cuda" else on_cpu


class ColdTimer:
    """Seconds of the calls alone, each after ``between`` bytes of other memory were read, as in a step of a model.

    A layer's small operators find caches that its weights went through: tens of microseconds in a tight loop are
    hundreds there. For processors; ``outside`` adds up the seconds of reading, which are in no result.
    """

    def __init__(self, calls: Sequence[Callable[[], object]], between: int) -> None:
        self._turn, self._other, self.outside = cycle(calls), _other_memory(between), 0.0

    def __call__(self, times: int) -> float:
        begin, inside = time.perf_counter(), 0.0
        for _ in range(times):
            self._other.sum()
            start = time.perf_counter()
            next(self._turn)()
            inside += time.perf_counter() - start
        self.outside += time.perf_counter() - begin - inside
        return inside


class StepTimer:
    """Seconds of a call alone, each from the moment when ``WORK`` seconds of reading other memory are due to be over.

    For collectives of processors: devices come to them from computing, each when its processor lets it. In a tight
    loop they wait for each other all the time and answer at once. Two ranks of a 2-core machine exchanged 1 KiB in
    0.09 ms in a loop, in 0.16 ms after 3 ms of work and in 0.29 ms after 10; four in the lab in 1.4, 2.0 and 1.9 ms.

    ``busy``: processor seconds of each call of all threads of this process, one mean for each run.
    """

    def __init__(self, call: Callable[[], object]) -> None:
        self._call, self._memory = call, cycle(_other_memory(WORK_MEMORY).split(READ // 4))
        self.outside, self.busy = 0.0, list[float]()

    def __call__(self, times: int) -> float:
        begin, inside, processor = time.perf_counter(), 0.0, 0.0
        for _ in range(times):
            due = time.perf_counter() + WORK
            while time.perf_counter() < due:
                next(self._memory).sum()
            start = time.process_time()
            self._call()
            inside += time.perf_counter() - due
            processor += time.process_time() - start
        self.busy.append(processor / times)
        self.outside += time.perf_counter() - begin - inside
        return inside


@lru_cache(maxsize=1)
def _other_memory(size: int) -> torch.Tensor:
    return torch.ones(max(size // 4, 1))


def noise_warning(what: str, spreads: Sequence[float]) -> str | None:
    """One line when at least every fifth point of a curve was noisy."""
    noisy = sum(spread > NOISY_SPREAD for spread in spreads)
    if noisy * 5 < len(spreads) or not noisy:
        return None
    typical, worst = float(np.median(spreads)), max(spreads)
    points = f"{noisy} of {len(spreads)} points (median spread {typical:.0%}, worst {worst:.0%})"
    return f"{what}: noisy at {points}; profile again on an idle machine"
