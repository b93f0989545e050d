"""Uneven split: how many units of work each of several unequal devices takes, so that the last one ends earliest.

Units are whatever is divided: tokens, sequences, granules of FFN columns. A device's cost may be any function of its
units: measured curves are neither linear nor always increasing.

    n[g] in 0..N        units of device g
    x[g, n] in {0, 1}   the same as a choice: n[g] = n   (the tests' program only)
    minimise t = max_g cost[g][n[g]], then, among the splits with that t, sum_g cost[g][n[g]] ** 2

    (1) every device takes one count:    sum_n x[g, n] = 1               ``_one_count_each``
    (2) all units are taken:             sum_g n[g] = N                  ``_all_units``
    (3) t is the makespan:               sum_n cost[g][n] x[g, n] <= t   ``_makespan``

The second goal breaks ties: squares spread what is left evenly over the other devices, where a plain sum would as
soon leave one of them idle (9 units on 4 equal devices are 3+2+2+2, not 3+3+3+0).

``split`` is exact and fast: the makespan by binary search over the costs that occur, each threshold tested on bit
sets of reachable totals; the tie by a (min, +) dynamic program over the counts that the makespan allows.
The tests solve the program above, which is slower, to check this.
"""

# G devices, N units

import time

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike

from ..result import Infeasible, Solution

LARGE = 2**22  # table entries beyond which only the makespan is the least, and the rest spread as well as it goes
BLOCK = 2**19  # table entries that one step of the dynamic program handles at once: stays in the cache


def split(cost: ArrayLike, units: int, *, partial: bool = False) -> Solution[tuple[int, ...]]:
    """The exact split of ``units`` over the devices.

    cost: [G, >= units + 1] seconds of device g for n units; ``inf`` marks counts that it cannot take.
    partial: the table may end earlier; no device takes more than it says.
    Among splits of equal makespan and equal squares, the last device takes the fewest units, then the one before it,
    and so on. Raises ``Infeasible`` with the units that do not fit.
    """
    started = time.perf_counter()
    table = checked(cost, units, partial)
    alike = (units % len(table) == 0 or units < len(table)) and (table == table[0]).all()
    if alike and np.isfinite(table[0]).all() and (np.diff(table[0]) > 0).all():
        # Equal devices that any further unit slows: only equal shares, or at most one unit each, have the least
        # makespan.
        share, more = divmod(units, len(table))
        makespan = float(table[0, share + (more > 0)])
        counts = (share + 1,) * more + (share,) * (len(table) - more)
        return Solution(counts, makespan, makespan, "optimal", time.perf_counter() - started)
    if table.size > LARGE and (np.diff(table, axis=1) >= 0).all():
        taken = _by_threshold(table, units)
        makespan = float(table[np.arange(len(table)), taken].max())
        return Solution(tuple(taken.tolist()), makespan, makespan, "optimal", time.perf_counter() - started)
    makespan = _least_makespan(table, units)
    counts = _least_sum(np.where(table <= makespan, table, np.inf) ** 2, units)
    return Solution(counts, makespan, makespan, "optimal", time.perf_counter() - started)


def checked(cost: ArrayLike, units: int, partial: bool = False) -> np.ndarray:
    table = np.asarray(cost, dtype=float)
    if units < 0:
        raise ValueError(f"units must be at least 0, got {units}")
    if table.ndim != 2 or table.shape[0] == 0 or table.shape[1] <= (0 if partial else units):
        raise ValueError(f"cost must be [devices, at least {units + 1}] for {units} units, got {list(table.shape)}")
    table = table[:, : units + 1]
    if np.isnan(table).any() or (table < 0).any():
        raise ValueError("cost must hold seconds of at least 0 (inf where a device cannot), found NaN or negative")
    return table


def _least_makespan(table: np.ndarray, units: int) -> float:
    """Binary search for the smallest cost T such that counts of cost <= T can sum to ``units``."""
    everything = reachable(np.isfinite(table), units)
    if not everything >> units & 1:
        raise infeasible(table, units, everything)
    # No device can end before its cheapest count.
    floor = table.min(axis=1).max()
    candidates = np.unique(table[np.isfinite(table) & (table >= floor)])
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        if reachable(table <= candidates[middle], units) >> units & 1:
            high = middle
        else:
            low = middle + 1
    return float(candidates[low])


def _by_threshold(table: np.ndarray, units: int) -> np.ndarray:
    """[G] counts of the least makespan where more units never take less: as many as each device does within it, and
    what is too many taken from those that would end last."""
    devices = np.arange(len(table))
    low, high = float(table[:, 0].max()), float(table[np.isfinite(table)].max())
    if _within(table, low).sum() >= units:
        high = low
    for _ in range(200):  # halving the interval of thresholds until no cost lies inside
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if _within(table, middle).sum() >= units:
            high = middle
        else:
            low = middle
    counts = _within(table, high)
    if counts.sum() < units:
        raise infeasible(table, units, (1 << int(counts.sum()) + 1) - 1)
    while (surplus := int(counts.sum()) - units) > 0:
        last = np.argsort(-table[devices, counts], kind="stable")
        last = last[counts[last] > 0][:surplus]
        counts[last] -= 1
    return counts


def _within(table: np.ndarray, threshold: float) -> np.ndarray:
    """[G] the most units that each device takes within a threshold."""
    return np.array([int(np.searchsorted(row, threshold, side="right")) - 1 for row in table])


def reachable(allowed: np.ndarray, units: int) -> int:
    """Bit n is set where the devices can together take exactly n units; allowed: [G, N + 1] bool."""
    mask = (1 << (units + 1)) - 1
    totals = 1
    for row, times in _runs(allowed):
        edges = np.flatnonzero(np.diff(row, prepend=False, append=False)).reshape(-1, 2).tolist()
        if len(edges) == 1:  # so many devices together take a range of counts too
            edges = [[times * edges[0][0], times * (edges[0][1] - 1) + 1]]
            times = 1
        for _ in range(times):
            reached = 0
            for first, end in edges:
                reached |= _smear(totals << min(first, units + 1), min(end - first, units + 1))
            totals = reached & mask
    return totals


def _runs(rows: np.ndarray) -> list[tuple[np.ndarray, int]]:
    """Equal rows that follow each other, and how many."""
    change = np.flatnonzero((rows[1:] != rows[:-1]).any(axis=1)) + 1
    starts = [0, *change.tolist()]
    return [(rows[a], b - a) for a, b in zip(starts, [*starts[1:], len(rows)], strict=True)]


def _smear(bits: int, width: int) -> int:
    """OR of ``bits`` shifted by 0..width - 1, in log2(width) steps."""
    done = 1
    while done < width:
        step = min(done, width - done)
        bits |= bits << step
        done += step
    return bits


def infeasible(table: np.ndarray, units: int, reachable: int) -> Infeasible:
    usable = np.isfinite(table)
    if not usable.any(axis=1).all():
        device = int(np.flatnonzero(~usable.any(axis=1))[0])
        return Infeasible(f"device {device} cannot take any count of units", unit="units", missing=units)
    if reachable == 0:
        least = int(usable.argmax(axis=1).sum())
        return Infeasible(f"the devices need at least {least} units, got {units}", unit="units", missing=least - units)
    most = reachable.bit_length() - 1
    return Infeasible(
        f"{units - most} of {units} units do not fit: the devices can take {most}", unit="units", missing=units - most
    )


def _least_sum(table: np.ndarray, units: int) -> tuple[int, ...]:
    """The split of smallest cost sum; table: [G, N + 1] with ``inf`` where a count is not allowed.

    best[n] is the least sum of the devices so far taking n units; only totals from which the later devices can still
    reach exactly ``units`` are computed.
    """
    devices = len(table)
    counts = [np.flatnonzero(np.isfinite(row)) for row in table]
    most_after = np.cumsum([0, *(int(c[-1]) for c in reversed(counts))])[::-1][1:]
    least_after = np.cumsum([0, *(int(c[0]) for c in reversed(counts))])[::-1][1:]
    best = np.full(units + 1, np.inf)
    best[0] = 0.0
    chosen = np.zeros((devices, units + 1), np.int32)
    for g, (row, allowed) in enumerate(zip(table, counts, strict=True)):
        # window[n, k] = best[n - k]
        window = sliding_window_view(np.concatenate([np.full(units, np.inf), best]), units + 1)[:, ::-1]
        following = np.full(units + 1, np.inf)
        first, end = max(0, units - int(most_after[g])), units - int(least_after[g]) + 1
        # A range of counts is a view of the window, a list of them a copy: worth it where few of the range are allowed.
        ranged = np.arange(allowed[0], allowed[-1] + 1)
        allowed, held = (ranged, slice(ranged[0], ranged[-1] + 1)) if len(ranged) < 4 * len(allowed) else (allowed,) * 2
        rows = max(1, BLOCK // len(allowed))
        for start in range(first, end, rows):
            block = slice(start, min(start + rows, end))
            sums = window[block, held] + row[held]
            pick = sums.argmin(axis=1)
            following[block] = sums[np.arange(len(pick)), pick]
            chosen[g, block] = allowed[pick]
        best = following
    result, left = [], units
    for g in reversed(range(devices)):
        result.append(int(chosen[g, left]))
        left -= result[-1]
    return tuple(reversed(result))
