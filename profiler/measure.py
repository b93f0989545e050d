"""Timing that survives noise, neighbours and shared cores.

All ranks time the same thing at the same moment, as in a real step, so that what they share (memory bandwidth, a
host's cores) is in the number. Decisions are taken on values that all ranks agree on; otherwise they would deadlock.

Other programs must not be in it. Computation is timed by a clock that stands still while the processor is theirs.
Collectives wait by nature, so there it is the work before each call that tells whether someone took the processor;
such calls are left out and made again (``measure_exchange``).
"""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import cycle
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

from .patience import IMPATIENT, Patience

Run = Callable[[int], float]
"""Runs a call so many times in a row; returns the elapsed seconds."""

Agree = Callable[[float], float]
"""The largest value of all ranks; returns on no rank before every rank has called it, so it is a barrier too."""

Least = Callable[[Sequence[float]], list[float]]
"""The least value of a group's members, element by element; all of them call it with equally many."""

Clock = Callable[[], float]
"""Seconds since some moment."""

LONG_CALL = 1.0  # seconds: beyond it the first call counts as a measurement, and two are enough
MIN_BATCHES = 3
SHARED_BATCH = 0.02  # seconds: spans many turns of a core that several ranks share
PLAIN_BATCH = 0.004  # seconds: far beyond the timer's resolution
COLD_STRETCH = 4.0  # times the usual seconds, where most of them pass between the calls
MOST_STRETCH = 2.0  # times as long as on an idle machine may a window last, but for its fewest batches
TRIES = 4  # times as many batches of a collective as the pace asks for, at most, where others disturb
IN_A_ROW = 2  # disturbed batches: then it is worth while to wait
MOST_CALLS = 1000  # in a batch
WORK = 0.003  # seconds of work before a collective
WORK_MEMORY, READ = 32 << 20, 1 << 16  # bytes that the work goes through, and reads at once: few, so in one thread
LOST = 0.1  # of a collective's WORK: more of it given to others is no hiccup of the kernel but another program
LOW = 20  # percentile of calls that others disturbed: a preemption only ever adds


class Timing(NamedTuple):
    """Median seconds of one call; spread = (90th - 10th percentile) / median over the batches.

    ``clean``: whether other programs left it alone.
    """

    median: float
    spread: float
    batches: int
    clean: bool = True


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

    ``available``: bytes of memory that the poorest rank may use, the same on all ranks; ``own``: that this one may.
    ``clock``: what computation is timed with. ``patience``: how to wait for other programs to be done. ``shared``:
    whether ranks have less than their cores by design, and so wait for them all the time.
    """

    rank: int
    hosts: tuple[str, ...]
    device: torch.device
    agree: Agree
    pace: Pace
    available: int
    own: int
    clock: Clock = time.perf_counter
    patience: Patience = IMPATIENT
    shared: bool = False

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
            begin = time.perf_counter()
            values.append(run(calls))
            # Where others have the processor most of the time, the minimum must do.
            spent += max(values[-1], (time.perf_counter() - begin) / MOST_STRETCH)
    return summary([value / calls for value in values])


def summary(values: Sequence[float], percentile: float = 50) -> Timing:
    """Median (or another percentile) and spread of single measurements; a stray outlier moves neither."""
    low, median, high = np.percentile(np.asarray(values), (10, percentile, 90))
    return Timing(float(median), float((high - low) / median) if median > 0 else 0.0, len(values))


class Met(NamedTuple):
    """One call of a collective: from when its devices are due to come to it, and from when the last has come."""

    due: Timing
    last: Timing


def measure_exchange(run: "StepTimer", agree: Agree, pace: Pace, patience: Patience, least: Least) -> Met:
    """Median and spread of one call of a collective: of batches in which no rank's processor was taken by others.

    As many such batches as the pace asks for, in up to ``TRIES`` times as many; in between, ``patience`` waits. Where
    too few come about, the ``LOW`` percentile of all single calls, not ``clean``. ``least``: of the group's members;
    the one that spends least in a call is the one that all others waited for.
    """
    agree(0.0)
    slowest = agree(first := run(1))
    long = slowest > LONG_CALL
    clean, batches = [], list[slice]()
    if long and agree(float(run.disturbed)) == 0:
        clean, batches = [first], [slice(1)]
    if not long:
        slowest = agree(min(run(1) for _ in range(2)))  # the first call also touches its memory for the first time
        run.calls.clear()
        run.inside.clear()
    pace = pace.among(slowest, WORK)
    calls = max(1, min(ceil(pace.batch / max(slowest, 1e-9)), MOST_CALLS))
    wanted = 2 if long else max(MIN_BATCHES, min(round(pace.window / (calls * slowest)), 100))
    row = 0
    for tried in range(1, 2 if long else TRIES * wanted + 1):
        value = run(calls) / calls
        if agree(float(run.disturbed)) == 0:
            clean.append(value)
            batches.append(slice(len(run.inside) - calls, len(run.inside)))
            row = 0
        else:
            row += 1
        if len(clean) >= wanted:
            break
        if row >= IN_A_ROW and not patience.wait() and tried >= wanted:
            break
    alone = least(run.inside)
    if len(clean) >= min(MIN_BATCHES, wanted):
        return Met(summary(clean), summary([float(np.mean(alone[batch])) for batch in batches]))
    return Met(summary(run.calls, LOW)._replace(clean=False), summary(alone, LOW)._replace(clean=False))


def processor_clock(threads: int) -> Clock:
    """A clock that stands still while other programs have the processor of the calling thread.

    With one thread its own processor time. Of several the caller also waits for the others, which counts: then what
    the kernel says it was ready to run and did not, is subtracted from the time of day, or nothing where it says
    nothing.
    """
    if threads == 1:
        return time.thread_time
    with suppress(OSError):
        file = os.open("/proc/thread-self/schedstat", os.O_RDONLY)
        if os.pread(file, 80, 0).split()[-1] != b"0":
            return lambda: time.perf_counter() - int(os.pread(file, 80, 0).split()[1]) / 1e9
    return time.perf_counter


def timer(calls: Sequence[Callable[[], object]], device: torch.device, clock: Clock = time.perf_counter) -> Run:
    """A ``Run`` that goes round ``calls``: equal calls on memory of their own keep caches as cold as a step does."""
    turn = cycle(calls)

    def on_cpu(times: int) -> float:
        start = clock()
        for _ in range(times):
            next(turn)()
        return clock() - start

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

    def __init__(self, calls: Sequence[Callable[[], object]], between: int, clock: Clock = time.perf_counter) -> None:
        self._turn, self._other, self.outside = cycle(calls), _other_memory(between), 0.0
        self._clock = clock

    def __call__(self, times: int) -> float:
        begin, inside, clock = self._clock(), 0.0, self._clock
        for _ in range(times):
            self._other.sum()
            start = clock()
            next(self._turn)()
            inside += clock() - start
        self.outside += clock() - begin - inside
        return inside


class Work:
    """Reads memory for ``WORK`` seconds; gives the moment when that was due to be over and the seconds lost to others.

    Nothing of our own competes for the processor meanwhile, so what it did not give to this thread, others had.
    """

    def __init__(self) -> None:
        self._memory = cycle(_other_memory(WORK_MEMORY).split(READ // 4))

    def __call__(self) -> tuple[float, float]:
        now = time.perf_counter()
        due, before = now + WORK, now - time.thread_time()
        while (now := time.perf_counter()) < due:
            next(self._memory).sum()
        return due, now - time.thread_time() - before


class StepTimer:
    """Seconds of a call alone, each from the moment when ``WORK`` seconds of reading other memory are due to be over.

    For collectives of processors: devices come to them from computing, each when its processor lets it. In a tight
    loop they wait for each other all the time and answer at once. Two ranks of a 2-core machine exchanged 1 KiB in
    0.09 ms in a loop, in 0.16 ms after 3 ms of work and in 0.29 ms after 10; four in the lab in 1.4, 2.0 and 1.9 ms.

    ``busy``: processor seconds of each call of all threads of this process, one mean for each run. ``calls``: seconds
    of every call; ``inside``: from when this device came to it. ``disturbed``: whether in the last run another program
    had this thread's processor during its work, when nothing of our own competes for it; never told where the processor
    is ``shared`` by design.
    """

    def __init__(self, call: Callable[[], object], shared: bool = False) -> None:
        self._call, self._work, self._shared = call, Work(), shared
        self.outside, self.busy, self.disturbed = 0.0, list[float](), False
        self.calls, self.inside = list[float](), list[float]()

    def __call__(self, times: int) -> float:
        begin, inside, processor = time.perf_counter(), 0.0, 0.0
        self.disturbed = False
        for _ in range(times):
            due, lost = self._work()
            self.disturbed |= lost > LOST * WORK and not self._shared
            start, came = time.process_time(), time.perf_counter()
            self._call()
            ended = time.perf_counter()
            self.calls.append(ended - due)
            self.inside.append(ended - came)
            inside += self.calls[-1]
            processor += time.process_time() - start
        self.busy.append(processor / times)
        self.outside += time.perf_counter() - begin - inside
        return inside


@lru_cache(maxsize=1)
def _other_memory(size: int) -> torch.Tensor:
    return torch.ones(max(size // 4, 1))
