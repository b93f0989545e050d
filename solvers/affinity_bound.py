"""Proven lower bounds on token movement: how few tokens any placement lets change devices between layers.

The problem is that of ``placement`` without its balance cap (a bound without it holds with it too): single copies,
slots #{e: d[l, e] = g} <= capacity[g], minimise sum_l sum_{a,b} transitions[l][a, b] * weight(d[l, a], d[l+1, b]).

weight is ``device_weight`` between the devices of a host and ``host_weight``, no less, between hosts:

    movement = device_weight * (tokens that change devices) + (host_weight - device_weight) * (tokens that change hosts)

Both terms are the same problem, with devices or with hosts as *places*; each is bounded by itself, and the bounds add.
For places of ``capacity`` slots:

    slots          an expert shares its place with at most max(capacity) experts of the next layer, and of the one
                   before: all but its heaviest successors (predecessors) leave.
    matching       the same for all experts at once: the pairs that share a place are a b-matching, of no more pairs in
                   all than the fullest places allow; the heaviest one is a linear program.
    spectral       Donath and Hoffman's eigenvalue bound with the best diagonal, all layers at once.
    semidefinite   the spectral bound's matrix with entries in 0..1.

The last two take every place for as large as the largest, and are in ``affinity_semidefinite``. The linear relaxation
of the integer program itself proves nothing: by symmetry, all experts evenly on all devices move nothing.
"""

# B boundaries (L - 1), E experts, G devices, P places

import math
import time

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linprog
from scipy.sparse import csr_array, eye_array, kron, vstack

from .affinity_semidefinite import least_leaving
from .result import Infeasible

DEFAULT_STEPS = 200
SAFETY = 1e-9  # of the tokens: what floating-point linear algebra may add to a bound


def affinity_bounds(
    transitions: ArrayLike,
    capacity: ArrayLike,
    hosts: ArrayLike,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    *,
    steps: int = DEFAULT_STEPS,
    time_limit: float = math.inf,
) -> dict[str, float]:
    """Every bound by name, in the unit of the movement; all of them hold, the largest is the one to quote.

    transitions: [B, E, E] tokens from expert a of a layer to expert b of the next; capacity: [G] slots per layer;
    hosts: [G] number of each device's host; 0 <= device_weight <= host_weight.
    steps: work budget of each iterative bound at each level; 0 leaves them out. time_limit: seconds, a ceiling: what
    is started late ends with a weaker bound, or is left out; ``slots`` is always there.

    Raises ``Infeasible`` when slots are missing.
    """
    started = time.perf_counter()
    counts, slots, host = _checked(transitions, capacity, hosts)
    if not 0 <= device_weight <= host_weight < math.inf:
        raise ValueError(f"weights must be 0 <= device_weight <= host_weight, got {device_weight} and {host_weight}")
    if steps < 0 or not time_limit > 0:
        raise ValueError(f"steps must be at least 0 and time_limit positive, got {steps} and {time_limit}")
    experts = counts.shape[1]
    levels = [(device_weight, slots), (host_weight - device_weight, np.bincount(host, slots).astype(np.int64))]
    # A place needs no more slots than there are experts; a level without weight or with one place costs nothing.
    levels = [(weight, np.minimum(places[places > 0], experts)) for weight, places in levels]
    levels = [(weight, places) for weight, places in levels if weight > 0 and len(places) > 1]

    bounds = {"slots": sum(weight * _least_by_slots(counts, places) for weight, places in levels)}
    if time.perf_counter() - started < time_limit:
        bounds["matching"] = sum(weight * _least_by_matching(counts, places) for weight, places in levels)
    for name, entries in (("spectral", False), ("semidefinite", True)):
        if steps == 0 or time.perf_counter() - started >= time_limit:
            break
        bounds[name] = 0.0
        for i, (weight, places) in enumerate(levels):
            now = time.perf_counter()
            share = 1 / ((2 if name == "spectral" else 1) * (len(levels) - i))
            deadline = now + share * (started + time_limit - now)
            bounds[name] += weight * least_leaving(
                counts, len(places), int(places.max()), steps=steps, deadline=deadline, entries=entries
            )
    safety = SAFETY * host_weight * float(counts.sum())
    return {name: max(float(bound) - safety, 0.0) for name, bound in bounds.items()}


def best_bound(bounds: dict[str, float]) -> tuple[str, float]:
    """(name, value) of the largest; of equals, the first."""
    name = max(bounds, key=lambda key: bounds[key])
    return name, bounds[name]


def _checked(
    transitions: ArrayLike, capacity: ArrayLike, hosts: ArrayLike
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    counts, slots, host = np.asarray(transitions, float), np.asarray(capacity), np.asarray(hosts)
    square = counts.ndim == 3 and counts.shape[1] == counts.shape[2] > 0
    if not square or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(f"transitions must be finite, non-negative [L - 1, E, E], got {list(counts.shape)}")
    if slots.ndim != 1 or len(slots) == 0 or slots.dtype.kind not in "iu" or (slots < 0).any():
        raise ValueError(f"capacity must hold a whole number of slots for each device, got {capacity!r}")
    if host.shape != slots.shape or host.dtype.kind not in "iu" or (host < 0).any():
        raise ValueError(f"hosts must hold a host number for each of {len(slots)} devices, got {hosts!r}")
    experts, room = counts.shape[1], int(slots.sum())
    if room < experts:
        raise Infeasible(
            f"{experts} experts need {experts - room} more slots: the devices hold {room}",
            unit="slots",
            missing=experts - room,
        )
    return counts, slots.astype(np.int64), host.astype(np.int64)


def _least_by_slots(transitions: np.ndarray, capacity: np.ndarray) -> float:
    slots = int(capacity.max())
    after = np.sort(transitions, axis=2)[:, :, ::-1][:, :, slots:].sum(axis=(1, 2))
    before = np.sort(transitions, axis=1)[:, ::-1, :][:, slots:, :].sum(axis=(1, 2))
    return float(np.maximum(after, before).sum())


def _least_by_matching(transitions: np.ndarray, capacity: np.ndarray) -> float:
    """The linear program relaxes pairs to 0..1; its dual solution, made exactly feasible, is the proof."""
    experts, slots = transitions.shape[1], int(capacity.max())
    # sum_p n[p] n'[p] <= sum_p n[p]^2 (or n'), which is largest with the largest places full.
    free, pairs = experts, 0
    for room in sorted(capacity.tolist(), reverse=True):
        pairs += min(room, free) ** 2
        free -= min(room, free)
    unit, ones = eye_array(experts), csr_array(np.ones((1, experts)))
    rows = vstack([kron(unit, ones), kron(ones, unit), csr_array(np.ones((1, experts**2)))]).tocsr()
    limits = np.concatenate([np.full(2 * experts, float(slots)), [float(pairs)]])
    staying = 0.0
    for counts in transitions:
        total = float(counts.sum())
        if total == 0.0:
            continue
        weight = counts.ravel() / total
        result = linprog(-weight, A_ub=rows, b_ub=limits, bounds=(0, 1), method="highs")
        if result.status != 0:
            raise AssertionError(f"b-matching: {result.message}")
        price = np.maximum(-result.ineqlin.marginals, 0.0)
        staying += total * min(1.0, float(limits @ price + np.maximum(weight - rows.T @ price, 0.0).sum()))
    return float(transitions.sum()) - staying
