"""Annealing of one layer's copies: the compiled inner loop of ``replicate``.

A state is the expert of every slot. Two changes, always between slots of one zone (a host where groups of experts must
stay on one, else everything):

    swap      two devices exchange a copy
    replace   a slot takes a copy of what another slot holds, or nothing, instead of its own copy: of an expert that has
              another, or none

Copies take even shares here. What is annealed is sum over windows w and devices g of weight[w] * (finish[w, g] /
target[w]) ** power: smooth, local to the devices that a change touches, and led by the hottest. Half of the changes
start at the hottest device of some window. The state returned is the one with the least mean over windows of the
hottest device.

The loop is one function: cut into pieces, compiled apart or into each other, it took 1.4 to 1.9 times as long.
"""

# W windows, E experts, G devices, R slots

import numpy as np

from ..jit import njit
from ..slots import EMPTY

HOT, COLD = 10.0, 1e-7  # temperatures, relative to the energy of one device at its target


@njit(cache=True, nogil=True)
def _raise(tree: np.ndarray, leaf: int, value: float) -> None:
    """Set a leaf of a tree of maxima; tree: [2 * size], the root at 1."""
    tree[leaf] = value
    leaf //= 2
    while leaf:
        larger = max(tree[2 * leaf], tree[2 * leaf + 1])
        if tree[leaf] == larger:
            break
        tree[leaf] = larger
        leaf //= 2


@njit(cache=True, nogil=True)
def _energy(finish: float, inverse: float, squarings: int) -> float:
    x = finish * inverse
    for _ in range(squarings):
        x *= x
    return x


@njit(cache=True, nogil=True)
def anneal(
    at: np.ndarray,
    load: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    zone_of_device: np.ndarray,
    target: np.ndarray,
    full: bool,
    squarings: int,
    steps: int,
    seed: int,
    halt: np.ndarray,
    held: np.ndarray,
    most_loads: int,
) -> tuple[np.ndarray, float]:
    """Anneal for ``steps`` changes, or until the target is met; returns the best ([R] experts, objective).

    at: [R] experts, kept as they are; load: [W, E]; speed: [G]; first: [G + 1]; target: [W] lower bounds on the
    hottest device, positive; full: slots may not be empty (``at`` must not have empty slots then); squarings: the power
    is 2 ** squarings. halt: [1], set to end the search with the best so far. held: [G, E] experts that devices have
    already, most_loads: how many others they may load in all (-1: any number).
    """
    np.random.seed(seed)
    windows, experts = load.shape
    devices, slots = len(speed), len(at)
    at = at.copy()
    device = np.empty(slots, np.int64)
    for g in range(devices):
        device[first[g] : first[g + 1]] = g
    zones = zone_of_device.max() + 1
    zone_first = np.zeros(zones + 1, np.int64)
    for r in range(slots):
        zone_first[zone_of_device[device[r]] + 1] += 1
    for z in range(zones):
        zone_first[z + 1] += zone_first[z]
    zone_slot = np.empty(slots, np.int64)
    filled = zone_first[:-1].copy()
    for r in range(slots):
        z = zone_of_device[device[r]]
        zone_slot[filled[z]] = r
        filled[z] += 1

    # Copies of an expert are chained through their slots
    head = np.full(experts, EMPTY, np.int64)
    after, before = np.full(slots, EMPTY, np.int64), np.full(slots, EMPTY, np.int64)
    copies = np.zeros(experts, np.int64)
    for r in range(slots):
        if at[r] != EMPTY:
            _link(head, after, before, at[r], r)
            copies[at[r]] += 1
    size = 1
    while size < devices:
        size *= 2
    tree = np.zeros((windows, 2 * size))
    for r in range(slots):
        if at[r] != EMPTY:
            for w in range(windows):
                tree[w, size + device[r]] += load[w, at[r]] / copies[at[r]] / speed[device[r]]
    for w in range(windows):
        for i in range(size - 1, 0, -1):
            tree[w, i] = max(tree[w, 2 * i], tree[w, 2 * i + 1])
    weight = target / target.sum()
    inverse = 1 / target
    goal = target.sum()
    value = tree[:, 1].sum()
    best, best_at = value, at.copy()

    loads = 0
    if most_loads >= 0:
        for r in range(slots):
            if at[r] != EMPTY and not held[device[r], at[r]]:
                loads += 1
    touched = np.empty(devices, np.int64)
    place = np.full(devices, -1, np.int64)  # of a device in touched
    change = np.zeros((devices, windows))
    cooling = (COLD / HOT) ** (1 / max(steps, 1))
    temperature = HOT
    for _ in range(steps):
        temperature *= cooling
        if best <= goal * (1 + 1e-12) or halt[0]:
            break
        if np.random.random() < 0.5:
            w = np.random.randint(windows) if windows > 1 else 0
            i = 1
            while i < size:
                i = 2 * i if tree[w, 2 * i] >= tree[w, 2 * i + 1] else 2 * i + 1
            g = i - size
            r = first[g] + np.random.randint(first[g + 1] - first[g])
        else:
            r = np.random.randint(slots)
        z = zone_of_device[device[r]]
        q = zone_slot[zone_first[z] + np.random.randint(zone_first[z + 1] - zone_first[z])]
        kind = np.random.randint(4 if full else 5)
        if kind == 3:
            r, q = q, r
        g, h, a, b = device[r], device[q], at[r], at[q]
        if kind == 4:
            b = EMPTY
        if a == b or g == h:
            continue
        replace = kind >= 2
        if replace and ((a != EMPTY and copies[a] == 1) or (b == EMPTY and full)):
            continue
        twice = False
        if b != EMPTY:
            for i in range(first[g], first[g + 1]):
                twice = twice or at[i] == b
        if not replace and a != EMPTY:
            for i in range(first[h], first[h + 1]):
                twice = twice or at[i] == a
        if twice:
            continue
        more = 0
        if most_loads >= 0:
            if b != EMPTY:
                more += int(not held[g, b])
            if a != EMPTY:
                more -= int(not held[g, a])
            if not replace:
                if a != EMPTY:
                    more += int(not held[h, a])
                if b != EMPTY:
                    more -= int(not held[h, b])
            if more > 0 and loads + more > most_loads:
                continue

        count = 2
        touched[0], touched[1] = g, h
        place[g], place[h] = 0, 1
        change[:2] = 0.0
        if not replace:
            for w in range(windows):
                moved = 0.0
                if a != EMPTY:
                    moved += load[w, a] / copies[a]
                if b != EMPTY:
                    moved -= load[w, b] / copies[b]
                change[0, w] = -moved
                change[1, w] = moved
        else:
            if a != EMPTY:
                for w in range(windows):
                    change[0, w] -= load[w, a] / copies[a]
                i = head[a]
                while i != EMPTY:
                    if i != r:
                        k = device[i]
                        if place[k] < 0:
                            place[k] = count
                            touched[count] = k
                            change[count] = 0.0
                            count += 1
                        for w in range(windows):
                            change[place[k], w] += load[w, a] / (copies[a] - 1) - load[w, a] / copies[a]
                    i = after[i]
            if b != EMPTY:
                for w in range(windows):
                    change[0, w] += load[w, b] / (copies[b] + 1)
                i = head[b]
                while i != EMPTY:
                    k = device[i]
                    if place[k] < 0:
                        place[k] = count
                        touched[count] = k
                        change[count] = 0.0
                        count += 1
                    for w in range(windows):
                        change[place[k], w] += load[w, b] / (copies[b] + 1) - load[w, b] / copies[b]
                    i = after[i]
        energy = 0.0
        for i in range(count):
            k = touched[i]
            place[k] = -1
            for w in range(windows):
                now = tree[w, size + k]
                then = now + change[i, w] / speed[k]
                energy += weight[w] * (_energy(then, inverse[w], squarings) - _energy(now, inverse[w], squarings))
        if energy > 0 and energy > -temperature * np.log(1 - np.random.random()):
            continue

        loads += more
        for i in range(count):
            k = touched[i]
            for w in range(windows):
                _raise(tree[w], size + k, tree[w, size + k] + change[i, w] / speed[k])
        if a != EMPTY:
            _unlink(head, after, before, a, r)
        if replace:
            if a != EMPTY:
                copies[a] -= 1
            if b != EMPTY:
                copies[b] += 1
        else:
            if b != EMPTY:
                _unlink(head, after, before, b, q)
            at[q] = a
            if a != EMPTY:
                _link(head, after, before, a, q)
        at[r] = b
        if b != EMPTY:
            _link(head, after, before, b, r)
        value = tree[:, 1].sum()
        if value < best * (1 - 1e-12):
            best = value
            best_at[:] = at
    return best_at, best / windows


@njit(cache=True, nogil=True)
def _link(head: np.ndarray, after: np.ndarray, before: np.ndarray, expert: int, slot: int) -> None:
    after[slot], before[slot] = head[expert], EMPTY
    if head[expert] != EMPTY:
        before[head[expert]] = slot
    head[expert] = slot


@njit(cache=True, nogil=True)
def _unlink(head: np.ndarray, after: np.ndarray, before: np.ndarray, expert: int, slot: int) -> None:
    if before[slot] == EMPTY:
        head[expert] = after[slot]
    else:
        after[before[slot]] = after[slot]
    if after[slot] != EMPTY:
        before[after[slot]] = before[slot]
