"""Re-planning one layer: the coolest placement for every number of copies that may be loaded.

    at[r]                  the expert of slot r, or none; held[g, e]: what device g has already
    minimise mean_w max_g finish[w, g]        as in ``replication``, copies taking even shares
    (1) loads:  #{(g, e): g holds e in at, not held[g, e]} <= limit

Each limit is annealed (``replication.search``) from the best of the smaller ones, so that more loads are never worse;
where a layer has few ``arrangements`` of single copies, the best of all of these is taken where it is cooler.
"""

# W windows, E experts, G devices, R slots

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..bounds.replication import hottest_bound
from ..exact.arrangements import arrangements
from ..exact.arrangements import hottest as hottest_of_all
from ..slots import EMPTY
from .search import anneal

STEPS = 20_000  # changes tried per limit, and again at each power
SQUARINGS = (2, 3, 5)
REACH = 0.85  # of the hottest device so far: the target of the next search, where the bound is lower


class Option(NamedTuple):
    """A placement of a layer: copies that it loads, its mean hottest device, its experts [R]."""

    loads: int
    value: float
    at: np.ndarray


def held_by(at: np.ndarray, device: np.ndarray, devices: int, experts: int) -> np.ndarray:
    """[G, E] whether a device holds an expert; at, device: [R]."""
    held = np.zeros((devices, experts), np.bool_)
    there = at != EMPTY
    held[device[there], at[there]] = True
    return held


def options(
    old: Option,
    new: Option,
    load: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    zone_of_device: np.ndarray,
    full: bool,
    limits: Sequence[int],
    seed: int,
    late: Callable[[], bool],
    halt: np.ndarray,
) -> list[Option]:
    """By rising loads and falling value: ``old``, the best found within each of the rising limits, and ``new``.

    load: [W, E]; speed: [G]; first: [G + 1] first slot of each device; zone_of_device: [G]
    copies stay in their zone; full: no slot may become empty. late, halt [1]: end the search.
    """
    devices, experts = len(speed), load.shape[1]
    device = np.repeat(np.arange(devices), np.diff(first))
    held = held_by(old.at, device, devices, experts)

    def hottest(at: np.ndarray) -> np.ndarray:
        """[W]"""
        there = np.flatnonzero(at != EMPTY)
        tokens = load[:, at[there]] / np.bincount(at[there], minlength=experts)[at[there]]
        return np.array([(np.bincount(device[there], t, devices) / speed).max() for t in tokens])

    def option(at: np.ndarray) -> Option:
        there = np.flatnonzero(at != EMPTY)
        return Option(int((~held[device[there], at[there]]).sum()), float(hottest(at).mean()), at)

    found, capacity = [old], np.diff(first)
    bound = hottest_bound(load, speed, capacity, zone_of_device, 1, "even")
    least = np.maximum(bound, 1e-300)
    known = _single_copies(old.at, held, load, speed, first, zone_of_device, full)
    for limit in limits:
        best = found[-1]
        for squarings in SQUARINGS:
            if late():
                break
            # What few loads reach may be far above the bound: temperatures must suit where the search is.
            target = np.maximum(least, REACH * hottest(best.at))
            at, _ = anneal(
                best.at, load, speed, first, zone_of_device, target, full, squarings, STEPS, seed, halt, held, limit
            )
            best = min(best, option(at), key=lambda o: (o.value, o.loads))
        within = [at for loads, at in known if loads <= limit]
        best = min([best, *map(option, within[-1:])], key=lambda o: (o.value, o.loads))
        if best.value < found[-1].value * (1 - 1e-12):
            found.append(best)
    kept = [found[0], *(o for o in found[1:] if o.loads < new.loads or o.value <= new.value)]
    return [*kept, new] if new.value < kept[-1].value * (1 - 1e-12) else kept


def _single_copies(
    old: np.ndarray,
    held: np.ndarray,
    load: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    zone_of_device: np.ndarray,
    full: bool,
) -> list[tuple[int, np.ndarray]]:
    """(loads, experts [R]) of the coolest arrangements of single copies, by rising loads and falling value.

    None where there are too many to look at all of them, or slots must be filled that they leave empty.
    """
    devices, experts = held.shape
    capacity, slots = np.diff(first), int(first[-1])
    at = None if full and slots > experts else arrangements(experts, capacity, np.zeros(devices, np.int64))
    if at is None:
        return []
    lies_in = np.zeros((int(zone_of_device.max()) + 1, experts), np.bool_)
    np.logical_or.at(lies_in, zone_of_device, held)
    at = at[lies_in[zone_of_device[at], np.arange(experts)].all(axis=1)]
    loads, value = (~held[at, np.arange(experts)]).sum(axis=1), hottest_of_all(at, load, speed)
    kept: list[tuple[int, np.ndarray]] = []
    coolest = np.inf
    for n in np.lexsort((value, loads)).tolist():
        if value[n] < coolest * (1 - 1e-12):
            coolest = float(value[n])
            row = np.full(slots, EMPTY, old.dtype)
            for g in range(devices):
                here = np.flatnonzero(at[n] == g)
                row[first[g] : first[g] + len(here)] = here
            kept.append((int(loads[n]), row))
    return kept


def choose(layers: Sequence[Sequence[Option]], budget: int) -> list[int]:
    """Which option of each layer: the least sum of values within so many loads, exactly; the first costs nothing.

    A knapsack with one choice of each layer, by dynamic programming over the loads spent.
    """
    budget = min(budget, sum(max(o.loads for o in layer) for layer in layers))
    least, chosen = np.zeros(budget + 1), []
    for layer in layers:
        total = np.full((len(layer), budget + 1), np.inf)
        for i, option in enumerate(layer):
            if option.loads <= budget:
                total[i, option.loads :] = least[: budget + 1 - option.loads] + option.value
        chosen.append(total.argmin(axis=0))
        least = total.min(axis=0)
    picked, left = [], budget
    for layer, best in zip(reversed(layers), reversed(chosen), strict=True):
        picked.append(int(best[left]))
        left -= layer[picked[-1]].loads
    return picked[::-1]
