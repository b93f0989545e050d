"""Measuring for ``kernels``: routing with a recorded trace's skew, this machine's limits, interleaved times, peaks.

Letters: T tokens, D model, E experts, K top-k.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moeplan.runtime.kernels import esmm
from moeplan.spec import Trace

DECODE = 64  # up to so many tokens are one of each sequence, as in a step of decoding; more are whole sequences
COLD = 512 * 2**20  # bytes of weights that no cache holds
NEAR, BRIEF, LONG = 1.25, 0.5, 3.0  # see ``interleaved``
HOPELESS = 4.0  # times the faster way of multiplying, at a quarter of the size

Call = Callable[[int], object]  # takes the number of the call: see ``ring``


class Timing(NamedTuple):
    """Seconds: median, and half the distance between the quartiles."""

    median: float
    spread: float
    runs: int


def recorded_routing(trace: Trace, experts: int, top_k: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Routing of T tokens over E experts with the skew and the joint choices of the trace's.

    Where E is above the trace's experts, several layers' are pooled: expert e of the j-th layer becomes number
    j * (trace's experts) + e, and a token keeps its K choices of highest gate weight in all these layers. Where E is
    below, experts of neighbouring rank in popularity become one (the busiest with the second busiest, and so on), and
    tokens whose choices fall together are left out. ids: [T, K] int64; gate weights: [T, K] float32, of sum 1.
    """
    have, layers = trace.num_experts, -(-experts // trace.num_experts)
    length = int(trace.seq_len[0])
    by_sequence = np.arange(trace.tokens).reshape(-1, length)
    order = (by_sequence.T if tokens <= DECODE else by_sequence).reshape(-1)
    if layers > 1 or experts == have:
        ids = np.concatenate([trace.expert_ids[order, j] + j * have for j in range(layers)], axis=1)
    else:
        rank = np.argsort(np.argsort(-trace.expert_counts[0], kind="stable"))
        ids = (rank * experts // have)[trace.expert_ids[order, 0]]
    weights = np.concatenate([trace.expert_weights[order, j] for j in range(layers)], axis=1)
    heaviest = np.argsort(-weights, axis=1, kind="stable")[:, :top_k]
    ids, weights = (np.take_along_axis(a, heaviest, 1) for a in (ids, weights))
    distinct = (np.diff(np.sort(ids, axis=1), axis=1) > 0).all(1)
    ids, weights = ids[distinct][:tokens].astype(np.int64), weights[distinct][:tokens]
    return torch.from_numpy(ids), torch.from_numpy(weights / weights.sum(1, keepdims=True))


def ring(ids: Tensor, experts: int, expert_bytes: int) -> list[Tensor]:
    """The same routing over several disjoint sets of experts, for calls one after the other.

    As many as make a round of COLD bytes of weights, so that none of a call's is in a cache any more; one where a call
    alone has as many; fewer where the layer has fewer.
    """
    used = ids.unique()
    label = torch.zeros(experts, dtype=torch.int64)
    found: list[Tensor] = []
    for first in range(0, experts - len(used) + 1, len(used)):
        if len(found) * len(used) * expert_bytes >= COLD:
            break
        label[used] = torch.arange(first, first + len(used))
        found.append(label[ids])
    return found


class Limits(NamedTuple):
    """What this machine reads and multiplies at best while the calls of one case run.

    stream: bytes / s; peak: flop / s of the case's dtype.
    """

    stream: float
    peak: float

    def roofline(self, flops: int, moved: int) -> float:
        """Seconds that no implementation can do without."""
        return max(flops / self.peak, moved / self.stream)

    def bound(self, flops: int, moved: int) -> str:
        return "flops" if flops / self.peak > moved / self.stream else "bytes"


class Probes:
    """Calls that show the limits: they take turns with those that are measured, for what a shared machine gives varies.

    Reads of COLD bytes, and square products; two ways each, for the vendor's library may know the processors of one
    maker only.
    """

    SIZE = 2048

    def __init__(self) -> None:
        self._memory = torch.ones(COLD // 4)

    def calls(self, dtype: torch.dtype) -> list[Call]:
        matrix = self._memory.view(-1, 2**13)
        vector = torch.ones(matrix.shape[1])
        # Where torch has no products of a dtype for the processor, each would take a minute.
        small = [min(seconds(lambda: call(0)) for _ in range(3)) for call in _products(self.SIZE // 4, dtype)]  # noqa: B023
        products = [c for c, t in zip(_products(self.SIZE, dtype), small, strict=True) if t < HOPELESS * min(small)]
        return [lambda _: self._memory.sum(), lambda _: torch.mv(matrix, vector), *products]

    def limits(self, timings: Sequence["Timing"]) -> Limits:
        """From the times of ``calls``: medians as everyone's, of the faster way each."""
        reads, products = timings[:2], timings[2:]
        return Limits(
            self._memory.nbytes / min(t.median for t in reads), 2 * self.SIZE**3 / min(t.median for t in products)
        )


def _products(size: int, dtype: torch.dtype) -> list[Call]:
    a, b = torch.randn(2, size, size).to(dtype)
    ids = torch.zeros(size, 1, dtype=torch.int64)
    return [lambda _: torch.mm(a, b), lambda _: esmm(a, b[None], ids)]


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Sequence[Call], probes: Sequence[Call], first: Sequence[float], budget: float) -> list[Timing]:
    """Times of some calls that do the same, and of probes: each ``call(number)`` once a round, always in a new order.

    ``first``: what each took when it was called before, to find its memory and warm up; that does not count. A call
    takes part while it has used less than ``budget`` seconds; the calls within ``NEAR`` times the fastest, those
    of less than ``BRIEF`` seconds, and the probes, run three times at least, or twice where they take over ``LONG``.
    """
    run = [*calls, *probes]
    taken: list[list[float]] = [[] for _ in run]
    number = 1
    for turn in range(50):
        known = [min(t, default=f) for t, f in zip(taken, first, strict=True)]
        near = NEAR * min(known[: len(calls)])
        for i in np.random.default_rng(turn).permutation(len(run)):
            counts = i >= len(calls) or known[i] <= max(near, BRIEF)
            least = 1 if not counts else 2 if known[i] > LONG else 3
            if len(taken[i]) < least or sum(taken[i]) < budget:
                taken[i].append(seconds(lambda: run[i](number)))  # noqa: B023 called at once
                number += 1
    return [timing(t) for t in taken]


def timing(taken: Sequence[float]) -> Timing:
    low, median, high = np.percentile(taken, [25, 50, 75])
    return Timing(float(median), float(high - low) / 2, len(taken))


def peak_memory(call: Callable[[], Tensor]) -> int:
    """Bytes of resident memory that a call takes at its peak, beyond what was there before and its result."""
    ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak becomes the present
    before = _status("VmRSS")
    result = call()
    return _status("VmHWM") - before - result.nbytes


def _status(field: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(f"{field}:")) * 1024
