"""Layers over the stages of a pipeline whose devices differ: the split whose slowest stage is fastest.

Formulation. L layers in order go to S stages in order, each stage takes one or more consecutive layers:

    0 = cut[0] < cut[1] < ... < cut[S] = L
    minimise  max_s ( fixed[s] + sum of seconds[s, l] for cut[s] <= l < cut[s+1] )
    such that held[s] + sum of bytes[s, l] <= room[s]        for every stage

A pipeline that is kept full gives one result per time of its slowest stage. Exact by dynamic programming over (stages
so far, layers so far), S * L^2 steps, all layers of a step at once. Where nothing fits, the same recursion finds the
split that lacks the fewest bytes.
"""

import time

import numpy as np

from .result import Infeasible, Solution


def split_stages(
    seconds: np.ndarray,
    fixed: np.ndarray,
    bytes_: np.ndarray,
    held: np.ndarray,
    room: np.ndarray,
) -> Solution[np.ndarray]:
    """[S] layers of each stage; objective: seconds of the slowest one, proven least.

    seconds, bytes_: [S, L] of each layer on each stage; fixed, held, room: [S]. All at least 0, finite.
    Raises ValueError for wrong shapes, Infeasible (unit ``bytes``, ``per_device``: of each stage) where nothing fits.
    """
    start = time.perf_counter()
    stages, layers = seconds.shape
    if bytes_.shape != seconds.shape or not fixed.shape == held.shape == room.shape == (stages,):
        raise ValueError(f"expected [{stages}, {layers}] seconds and bytes, and [{stages}] of the rest")
    if not all(np.isfinite(a).all() and (a >= 0).all() for a in (seconds, fixed, bytes_, held, room)):
        raise ValueError("seconds and bytes must be finite and at least 0")
    if stages > layers:
        raise Infeasible(f"{stages} stages for {layers} layers", unit="layers", missing=stages - layers)
    times = np.stack([_spans(fixed[s], seconds[s]) for s in range(stages)])
    lacking = np.maximum(np.stack([_spans(held[s], bytes_[s]) for s in range(stages)]) - room[:, None, None], 0)
    counts, slowest = _best(np.where(lacking > 0, np.inf, times), np.maximum)
    if not np.isfinite(slowest):
        counts, missing = _best(np.where(np.isfinite(times), lacking, np.inf), np.add)
        cuts = np.concatenate([[0], np.cumsum(counts)])
        each = tuple(int(np.ceil(lacking[s, cuts[s], cuts[s + 1]])) for s in range(stages))
        raise Infeasible("no split fits", unit="bytes", missing=float(missing), per_device=each)
    return Solution(counts, slowest, slowest, "optimal", time.perf_counter() - start, solver="dynamic programming")


def _spans(first: float, each: np.ndarray) -> np.ndarray:
    """[L+1, L+1] first + sum of ``each`` from a layer to before another; infinite where that is no layer."""
    total = np.concatenate([[0.0], np.cumsum(each)])
    found = first + np.maximum(total[None, :] - total[:, None], 0.0)
    found[np.tril_indices(len(total))] = np.inf
    return found


def _best(spans: np.ndarray, join: np.ufunc) -> tuple[np.ndarray, float]:
    """[S] layers of each stage with the least value over all stages, joined by maximum or sum; and that value.

    spans: [S, L+1, L+1] value of a stage that takes the layers from one to before another.
    """
    stages, size = spans.shape[:2]
    best = np.full(size, np.inf)
    best[0] = 0.0
    came = np.zeros((stages, size), np.int64)
    for s in range(stages):
        options = join(best[:, None], spans[s])
        came[s] = options.argmin(0)
        best = options.min(0)
    counts, at = np.zeros(stages, np.int64), size - 1
    for s in reversed(range(stages)):
        counts[s] = at - came[s, at]
        at = came[s, at]
    return counts, float(best[-1])
