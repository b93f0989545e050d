"""Scores of a placement on a trace: balance, crossings between layers, fan-out."""

# W windows, T tokens, L layers, E experts, K top-k, G devices

from collections.abc import Sequence

import numpy as np

from ...solvers.slots import Slots
from ...spec.balance import balance as balance_of
from ...spec.placement import PlacementDevice, PlacementLayer, Score
from ...spec.trace import Trace

SEED = 0  # of the draws of copies


def score(layers: Sequence[PlacementLayer], devices: Sequence[PlacementDevice], trace: Trace) -> Score:
    """Score on every token of ``trace``, or on its counts.

    Devices count with their speeds in the balance. Which copy of a replicated expert serves a token is drawn by the
    shares, each choice by itself (seeded); boundaries are scored only where every expert has one copy.
    """
    speed = np.array([device.speed for device in devices])
    names = sorted({device.host for device in devices})
    host_of = np.array([names.index(device.host) for device in devices])
    shares = [layer.share_matrix(trace.num_experts) for layer in layers]
    balance = np.array([balance_of(counts @ s, speed) for counts, s in zip(trace.expert_counts, shares, strict=True)])
    mean, largest = float(balance.mean()), float(balance.max())
    if trace.counts_only:
        return Score(tokens=float(trace.expert_counts[0].sum()), balance_mean=mean, balance_max=largest)

    single = all((s > 0).sum() == trace.num_experts for s in shares)
    chosen = _copies(trace, shares, single)
    fan_device = [_distinct(chosen[:, layer], len(devices)) for layer in range(trace.layers)]
    fan_host = [_distinct(host_of[chosen[:, layer]], len(names)) for layer in range(trace.layers)]
    first = chosen[:, :, 0]
    crossed = single and trace.layers > 1
    return Score(
        tokens=trace.tokens,
        balance_mean=mean,
        balance_max=largest,
        boundary_cross_device=_crossed(first) if crossed else None,
        boundary_cross_host=_crossed(host_of[first]) if crossed else None,
        fanout_device=float(np.mean(fan_device)),
        fanout_host=float(np.mean(fan_host)),
    )


def reached_balance(slots: Slots, load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """[L] mean balance over windows."""
    return balance_of([slots.finish(window, speed) * speed for window in load], speed).mean(axis=0)


def _copies(trace: Trace, shares: Sequence[np.ndarray], single: bool) -> np.ndarray:
    """[T, L, K] device that serves each choice."""
    rng = np.random.default_rng(SEED)
    chosen = np.empty(trace.expert_ids.shape, np.int64)
    for layer, matrix in enumerate(shares):
        ids = trace.expert_ids[:, layer]
        if single:
            chosen[:, layer] = (matrix > 0).argmax(axis=1)[ids]
            continue
        # Column by column of the copies that an expert has at most, not of all devices.
        draw, most = rng.random(ids.shape), int((matrix > 0).sum(axis=1).max())
        holders = np.argsort(matrix == 0, axis=1, kind="stable")[:, :most]
        upto = np.take_along_axis(np.where(matrix > 0, matrix.cumsum(axis=1), np.inf), holders, axis=1)
        copy = np.zeros(ids.shape, np.int64)
        for column in range(most - 1):
            copy += upto[:, column][ids] <= draw
        chosen[:, layer] = holders[ids, copy]
    return chosen


def _distinct(places: np.ndarray, count: int) -> float:
    """Mean number of distinct places in the rows of [T, K]: bits of words that hold 64 places each."""
    found = np.zeros(len(places), np.int64)
    for first in range(0, count, 64):
        here = (np.arange(count) >= first) & (np.arange(count) < first + 64)
        bit = np.where(here, np.left_shift(np.uint64(1), (np.arange(count) % 64).astype(np.uint64)), np.uint64(0))
        held = np.zeros(len(places), np.uint64)
        for column in places.T:
            held |= bit[column]
        found += np.bitwise_count(held)
    return float(found.mean())


def _crossed(place: np.ndarray) -> float:
    """Share of (token, boundary) whose places [T, L] differ."""
    return float((place[:, 1:] != place[:, :-1]).mean())
