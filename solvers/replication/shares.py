"""Shares: which fraction of an expert's tokens each of its copies takes, so that the hottest device is coolest.

    x[e, g] >= 0            tokens of expert e that device g computes, for the devices g that hold e
    minimise max_g sum_e x[e, g] / speed[g]

    (1) all tokens:  sum_g x[e, g] = load[e]        ``_drain``: a push keeps every expert's sum

One layer at a time, and exactly. Some set H of devices proves the optimum: the experts whose copies are all in H must
be computed there, so max_g >= load confined to H / speed of H. Newton's method over such sets (Dinkelbach): start at
the level of all devices together, drain every device above the level along augmenting paths to one below it; where
no path is left, the devices that were reached confine their load, and their common level is the next, higher one.
It ends when no device is above the level, after at most G levels.

Draining starts at even shares and moves only what it must, along shortest paths: the result is deterministic, and
shares stay even where evenness costs nothing.

Over several windows of load the shares minimise the mean over windows of the hottest device, a linear program (HiGHS).
"""

# W windows, L layers, E experts, G devices, R slots

from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..jit import njit
from ..slots import EMPTY, Slots

ROUNDING = 1e-12  # relative to the level: what counts as above it


def optimal_shares(slots: Slots, load: ArrayLike, speed: ArrayLike) -> Slots:
    """The same copies with optimal shares; load: [L, E] tokens or [W, L, E] windows of them; speed: [G].

    Minimises every layer's hottest load over speed (its mean over windows). Raises ``ValueError`` on wrong shapes.
    """
    loads, speeds = np.asarray(load, float), np.asarray(speed, float)
    layers, expected = len(slots.expert_of), (len(slots.expert_of), slots.num_experts)
    if loads.ndim not in (2, 3) or loads.shape[-2:] != expected or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"load must be finite, non-negative {list(expected)} per window, got {list(loads.shape)}")
    if speeds.shape != slots.capacity.shape or not (np.isfinite(speeds).all() and (speeds > 0).all()):
        raise ValueError(f"speed must hold a positive number for each of {len(slots.capacity)} devices, got {speed!r}")
    windows = loads.reshape(-1, *expected)
    share_of = np.empty(slots.share_of.shape)
    device = slots.device_of_slot
    for layer in range(layers):
        row = np.ascontiguousarray(windows[:, layer])
        if len(row) == 1:
            share_of[layer] = layer_shares(slots.expert_of[layer], device, row[0], speeds)[0]
        else:
            share_of[layer] = _windowed(slots.expert_of[layer], device, row, speeds)
    return Slots(slots.expert_of, share_of, slots.capacity)


@njit(cache=True, nogil=True)
def layer_shares(
    expert_of: np.ndarray, device: np.ndarray, load: np.ndarray, speed: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """Shares [R] of one layer, its hottest load over speed, and a set of devices [G] that proves it.

    expert_of, device: [R]; load: [E]; speed: [G].
    """
    slots, experts, devices = len(expert_of), len(load), len(speed)
    first = np.zeros(experts + 1, np.int64)
    for r in range(slots):
        if expert_of[r] != EMPTY:
            first[expert_of[r] + 1] += 1
    copies = first[1:].copy()
    for e in range(experts):
        first[e + 1] += first[e]
    slot_of = np.empty(first[experts], np.int64)
    filled = first[:-1].copy()
    tokens = np.zeros(slots)
    carried = np.zeros(devices)
    shared = np.zeros(devices + 1, np.int64)  # slots with an expert that has copies elsewhere, by device
    for r in range(slots):
        e = expert_of[r]
        if e == EMPTY:
            continue
        slot_of[filled[e]] = r
        filled[e] += 1
        tokens[r] = load[e] / copies[e]
        carried[device[r]] += tokens[r]
        if copies[e] > 1 and load[e] > 0:
            shared[device[r] + 1] += 1
    for g in range(devices):
        shared[g + 1] += shared[g]
    shared_slot = np.empty(shared[devices], np.int64)
    filled = shared[:-1].copy()
    for r in range(slots):
        e = expert_of[r]
        if e != EMPTY and copies[e] > 1 and load[e] > 0:
            shared_slot[filled[device[r]]] = r
            filled[device[r]] += 1

    proof = _drain(expert_of, device, speed, first, slot_of, shared, shared_slot, tokens, carried)
    for r in range(slots):
        e = expert_of[r]
        if e == EMPTY:
            tokens[r] = 0.0
        elif load[e] > 0:
            tokens[r] /= load[e]
        else:
            tokens[r] = 1.0 / copies[e]
    return tokens, (carried / speed).max(), proof


@njit(cache=True, nogil=True)
def _drain(
    expert_of: np.ndarray,
    device: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    slot_of: np.ndarray,
    shared: np.ndarray,
    shared_slot: np.ndarray,
    tokens: np.ndarray,
    carried: np.ndarray,
) -> np.ndarray:
    """Newton over levels; tokens [R] and carried [G] are changed in place. Returns the last level's devices [G]."""
    devices = len(speed)
    level = carried.sum() / speed.sum()
    proof = np.ones(devices, np.bool_)
    seen = np.full(devices, -1, np.int64)
    expert_seen = np.full(len(first) - 1, -1, np.int64)
    give, take = np.empty(devices, np.int64), np.empty(devices, np.int64)  # the slots that a device was reached over
    queue = np.empty(devices, np.int64)
    search = -1
    g = 0
    while g < devices:
        if carried[g] <= level * speed[g] * (1 + ROUNDING):
            g += 1
            continue
        # Breadth first from g, over experts with tokens here and a copy there, to a device below the level
        search += 1
        queue[0] = g
        seen[g] = search
        head, tail, sink = 0, 1, -1
        while head < tail and sink < 0:
            here = queue[head]
            head += 1
            for i in range(shared[here], shared[here + 1]):
                r = shared_slot[i]
                e = expert_of[r]
                if tokens[r] <= 0 or expert_seen[e] == search:
                    continue
                expert_seen[e] = search
                for j in range(first[e], first[e + 1]):
                    there = device[slot_of[j]]
                    if seen[there] == search:
                        continue
                    seen[there] = search
                    give[there], take[there] = r, slot_of[j]
                    queue[tail] = there
                    tail += 1
                    if carried[there] < level * speed[there] * (1 - ROUNDING):
                        sink = there
                        break
                if sink >= 0:
                    break
        if sink < 0:  # what was reached confines its load
            load_sum, speed_sum = 0.0, 0.0
            for i in range(tail):
                load_sum += carried[queue[i]]
                speed_sum += speed[queue[i]]
            confined = load_sum / speed_sum
            if confined <= level * (1 + ROUNDING):  # g is above the level by the rounding of the others
                g += 1
            level = max(level, confined)
            for i in range(devices):
                proof[i] = seen[i] == search
            continue
        amount = min(carried[g] - level * speed[g], level * speed[sink] - carried[sink])
        at = sink
        while at != g:
            amount = min(amount, tokens[give[at]])
            at = device[give[at]]
        at = sink
        while at != g:
            tokens[give[at]] -= amount
            tokens[take[at]] += amount
            at = device[give[at]]
        carried[g] -= amount
        carried[sink] += amount
    return proof


def _windowed(expert_of: np.ndarray, device: np.ndarray, load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """[R] shares that minimise the mean over windows of the hottest device; load: [W, E]."""
    # Imported when they are needed: they take as long as all else that a command begins with.
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    windows, experts, devices = len(load), load.shape[1], len(speed)
    held = np.flatnonzero(expert_of != EMPTY)
    copies = np.bincount(expert_of[held], minlength=experts)
    share = np.zeros(len(expert_of))
    share[held] = 1 / copies[expert_of[held]]
    split = held[(copies[expert_of[held]] > 1) & (load[:, expert_of[held]] > 0).any(axis=0)]
    if not len(split):
        return share
    fixed = np.setdiff1d(held, split)
    expert, at = expert_of[split], device[split]
    base = np.stack([np.bincount(device[fixed], w[expert_of[fixed]], devices) for w in load]) / speed
    unit = max(float(base.max()), float(load.max()) / float(speed.min()))  # the solver's tolerances are absolute

    # Columns: the shares, then each window's hottest. Rows: finish[w, g] <= hottest[w]; shares sum to 1
    w, i = np.meshgrid(np.arange(windows), np.arange(len(split)), indexing="ij")
    rows = np.concatenate([(w * devices + at[i]).ravel(), np.arange(windows * devices)])
    columns = np.concatenate([i.ravel(), len(split) + np.repeat(np.arange(windows), devices)])
    cells = np.concatenate([(load[:, expert] / speed[at] / unit).ravel(), -np.ones(windows * devices)])
    size = len(split) + windows
    names, row_of = np.unique(expert, return_inverse=True)
    hottest: Any = coo_array((cells, (rows, columns)), shape=(windows * devices, size)).tocsr()
    whole: Any = coo_array((np.ones(len(split)), (row_of, np.arange(len(split)))), shape=(len(names), size)).tocsr()
    result: Any = linprog(
        np.concatenate([np.zeros(len(split)), np.full(windows, 1 / windows)]),
        A_ub=hottest,
        b_ub=-base.ravel() / unit,
        A_eq=whole,
        b_eq=np.ones(len(names)),
        method="highs",
    )
    if not result.success:
        raise RuntimeError(f"HiGHS failed on a feasible linear program of shares: {result.message}")
    found = np.clip(result.x[: len(split)], 0.0, None)
    share[split] = found / np.bincount(row_of, found)[row_of]
    return share
