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
NEAR, LONG = 1.25, 3.0  # see ``interleaved``


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


class Limits:
    """What this machine reads and multiplies at best, over all looks at it in this run."""

    def __init__(self) -> None:
        self.stream = 0.0  # bytes / s
        self.peak: dict[torch.dtype, float] = {}  # flop / s
        self._memory = torch.ones(2**27)

    def look(self, dtype: torch.dtype) -> None:
        matrix = self._memory.view(2**14, -1)
        vector = torch.ones(matrix.shape[1])
        for _ in range(5):
            for read in (self._memory.sum, lambda: torch.mv(matrix, vector)):
                self.stream = max(self.stream, self._memory.nbytes / seconds(read))
        for rows, size in ((2048, 2048), (2048, 4096)):
            a, b = torch.randn(rows, size).to(dtype), torch.randn(size, size).to(dtype)
            ids = torch.zeros(rows, 1, dtype=torch.int64)
            for _ in range(4):
                # The vendor's library may know the processors of one maker only.
                for product in (lambda: torch.mm(a, b), lambda: esmm(a, b[None], ids)):  # noqa: B023 called at once
                    self.peak[dtype] = max(self.peak.get(dtype, 0.0), 2 * rows * size * size / seconds(product))

    def roofline(self, flops: int, moved: int, dtype: torch.dtype) -> float:
        """Seconds that no implementation can do without."""
        return max(flops / self.peak[dtype], moved / self.stream)

    def bound(self, flops: int, moved: int, dtype: torch.dtype) -> str:
        return "flops" if flops / self.peak[dtype] > moved / self.stream else "bytes"


def seconds(call: Callable[[], object]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def interleaved(calls: Sequence[Callable[[int], object]], first: Sequence[float], budget: float) -> list[Timing]:
    """Times of some calls that do the same, each ``call(number)`` once a round, in a new order every round.

    ``first``: what each took when it was called before, to find its memory and warm up; that does not count. A call
    takes part while it has used less than ``budget`` seconds; those within ``NEAR`` times the fastest run three times
    at least, or twice where they take over ``LONG`` seconds.
    """
    taken: list[list[float]] = [[] for _ in calls]
    number = 1
    for turn in range(50):
        known = [min(t, default=f) for t, f in zip(taken, first, strict=True)]
        for i in np.random.default_rng(turn).permutation(len(calls)):
            least = 1 if known[i] > NEAR * min(known) else 2 if known[i] > LONG else 3
            if len(taken[i]) < least or sum(taken[i]) < budget:
                taken[i].append(seconds(lambda: calls[i](number)))  # noqa: B023 called at once
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
