"""Balance: experts on unequal devices so that the hottest device of every layer is as cool as possible.

    d[l, e] in devices      the device that holds expert e of layer l, one copy each
    finish[l, g] = sum_{e: d[l, e] = g} load[l][e] / speed[g]
    minimise sum_l max_g finish[l, g]      a layer waits for its slowest device

    (1) slots:  #{e: d[l, e] = g} <= capacity[g]      ``longest_first``

``balance`` reports it as engines do: the hottest device over the ideal sum_e load[l][e] / sum_g speed[g]; 1 is perfect.
A layer without load counts 1, as in ``spec.balance``, which says why; solvers leave it out and add it to their means.
"""

# L layers, E experts, G devices

import time

import numpy as np
from numpy.typing import ArrayLike

from .result import Infeasible, Solution


def linear(num_experts: int, num_devices: int) -> np.ndarray:
    """[E] device of each expert: contiguous blocks; where E / G is not whole, the first devices hold one more."""
    if num_experts < 1 or num_devices < 1:
        raise ValueError(f"need at least 1 expert and 1 device, got {num_experts} and {num_devices}")
    blocks = np.array_split(np.arange(num_experts), num_devices)
    return np.repeat(np.arange(num_devices), [len(block) for block in blocks])


def finish(device_of: np.ndarray, load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """[G] load over speed of each device, for one layer: device_of, load [E]; speed [G]."""
    return np.bincount(device_of, load, len(speed)) / speed


def balance(device_of: ArrayLike, load: ArrayLike, speed: ArrayLike) -> np.ndarray:
    """[L] hottest device over ideal; 1 for a layer without load. device_of, load: [L, E]; speed: [G]."""
    placed, loads, speeds = np.asarray(device_of), np.asarray(load, float), np.asarray(speed, float)
    hottest = np.array([finish(d, row, speeds).max() for d, row in zip(placed, loads, strict=True)])
    ideal = loads.sum(axis=1) / speeds.sum()
    return np.where(ideal > 0, hottest / np.where(ideal > 0, ideal, 1.0), 1.0)


def over_ideal(load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """Load [..., E] over the ideal finish of its layer; a layer without load stays so (``idle`` counts it)."""
    ideal = load.sum(axis=-1, keepdims=True) / speed.sum()
    return load / np.where(ideal > 0, ideal, 1.0)


def idle(load: np.ndarray) -> float:
    """What samples and layers without load add to a mean balance: the part that they are; load: [..., E]."""
    return float((load.sum(axis=-1) == 0).mean())


def mean_balance(device_of: np.ndarray, load: np.ndarray, speed: np.ndarray) -> float:
    """Mean over samples and layers of the hottest device over the ideal; device_of: [L, E], load: [S, L, E]."""
    return float(np.mean([balance(device_of, sample, speed) for sample in load]))


def mean_balance_bound(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> float:
    """Lower bound on ``mean_balance`` of any placement; load: [S, L, E]."""
    relative = over_ideal(load, speed)
    least = float(np.mean([[balance_bound(row, speed, capacity) for row in sample] for sample in relative]))
    return least + idle(load)


def check_cap(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, cap: float) -> None:
    """Raise ``Infeasible`` where no placement can keep the mean balance to ``cap``, with the bound. load: [S, L, E]."""
    least = mean_balance_bound(load, speed, capacity)
    if least > cap * (1 + 1e-9):
        raise Infeasible(
            f"no placement has a mean balance of {cap:.6g} or less: it is proven to be at least {least:.6g}",
            unit="balance",
            missing=least - cap,
        )


def greedy_balance(load: ArrayLike, speed: ArrayLike, capacity: ArrayLike) -> Solution[np.ndarray]:
    """Longest processing time first on unequal devices: the heaviest expert next, to where it ends earliest.

    load: [L, E] tokens per expert; speed: [G] relative; capacity: [G] slots per layer. Ties go to the lower expert and
    device number. Returns [L, E] devices; objective and bound (``balance_bound``) are summed over the layers.
    Raises ``Infeasible`` with the missing slots.
    """
    started = time.perf_counter()
    loads, speeds, slots = checked(load, speed, capacity)
    placed = longest_first(loads, speeds, slots)
    objective = float(sum(finish(d, row, speeds).max() for d, row in zip(placed, loads, strict=True)))
    bound = float(sum(balance_bound(row, speeds, slots) for row in loads))
    return Solution.from_heuristic(placed, objective, bound, time.perf_counter() - started)


def balance_bound(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> float:
    """Lower bound on the hottest device's load over speed, for one layer's load [E].

    The largest of: all devices equally busy (the linear relaxation without slots); the heaviest expert on the fastest
    device; and for each device the lightest experts that it must take because the others' slots are full.
    """
    slots = np.minimum(capacity, len(load))
    forced = np.maximum(len(load) - (slots.sum() - slots), 0)
    lightest = np.concatenate([[0.0], np.cumsum(np.sort(load))])
    usable = speed[slots > 0]
    return float(max(load.sum() / usable.sum(), load.max() / usable.max(), (lightest[forced] / speed).max()))


def checked(load: ArrayLike, speed: ArrayLike, capacity: ArrayLike) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validated (load [L, E], speed [G], capacity [G])."""
    loads, speeds, slots = np.asarray(load, float), np.asarray(speed, float), np.asarray(capacity)
    if loads.ndim != 2 or 0 in loads.shape or not np.isfinite(loads).all() or (loads < 0).any():
        raise ValueError(f"load must be finite, non-negative [layers, experts], got {list(loads.shape)}")
    if speeds.ndim != 1 or len(speeds) == 0 or not np.isfinite(speeds).all() or (speeds <= 0).any():
        raise ValueError(f"speed must hold a positive number per device, got {speed!r}")
    if slots.shape != speeds.shape or slots.dtype.kind not in "iu" or (slots < 0).any():
        raise ValueError(
            f"capacity must hold a whole number of slots for each of {len(speeds)} devices, got {capacity!r}"
        )
    experts, total = loads.shape[1], int(slots.sum())
    if total < experts:
        raise Infeasible(
            f"{experts} experts need {experts - total} more slots: the devices hold {total}",
            unit="slots",
            missing=experts - total,
        )
    return loads, speeds, slots.astype(np.int64)


def longest_first(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """Greedy placement: [L, E] devices; load: [L, E]."""
    layer, devices = np.arange(len(load)), len(speed)
    placed = np.empty(load.shape, np.int64)
    carried, free = np.zeros((len(load), devices)), np.tile(capacity, (len(load), 1))
    full = np.where(free > 0, 0.0, np.inf)
    for expert in np.argsort(-load, axis=1, kind="stable").T:
        heavy = load[layer, expert]
        device = ((carried + heavy[:, None]) / speed + full).argmin(1)
        placed[layer, expert] = device
        carried[layer, device] += heavy
        free[layer, device] -= 1
        full[layer, device] = np.where(free[layer, device] > 0, 0.0, np.inf)
    return placed
