"""Placement: which device holds each expert, one copy each, so that few tokens change devices between layers.

    d[l, e] in devices      the device that holds expert e of layer l
    minimise sum_l sum_{a,b} transitions[l][a][b] * weight(d[l, a], d[l+1, b])

    (1) slots:    #{e: d[l, e] = g} <= capacity[g]                                   ``_assign``, ``_changes``
    (2) balance:  max_g finish[l, g] <= balance_cap[l] * ideal[l]  (see ``balance``)  ``_place_layer``, ``_cool``

weight is 0 on one device, ``device_weight`` between devices of a host, ``host_weight`` between hosts.

Given its two neighbours, one layer is an assignment problem (experts to device slots), solved exactly; alternating
over the layers never goes up and ends in a local optimum. Where the exact assignment breaks (2), overloaded devices
are priced (a few subgradient steps on the Lagrangian of (2)) or cooled by swaps, and moves and swaps that keep (1) and
(2) descend from the best placement that keeps them; one above the cap is never returned. It is a heuristic with a
bound: a proof-grade solver of the same problem would be a file of its own.
"""

# L layers, E experts, G devices

import time
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment

from .balance import balance, balance_bound, checked, finish, greedy_balance, linear, longest_first
from .result import Infeasible, NotFound, Solution

__all__ = ["alternating", "balance", "crossing_bound", "crossings", "greedy_balance", "host_weights", "linear"]

PRICE_STEPS = 8  # assignments that one re-placement may spend on pricing overloaded devices
ROUNDING = 1e-9  # relative, of sums of loads and of counts


def host_weights(hosts: ArrayLike, device_weight: float = 1.0, host_weight: float = 1.0) -> np.ndarray:
    """[G, G] what a token pays between two devices; hosts: [G] number of each device's host."""
    host = np.asarray(hosts)
    weight = np.where(host[:, None] == host[None, :], float(device_weight), float(host_weight))
    np.fill_diagonal(weight, 0.0)
    return weight


def crossings(device_of: ArrayLike, transitions: ArrayLike, weight: ArrayLike) -> float:
    """Weighted crossings; device_of: [L, E], transitions: [L-1, E, E], weight: [G, G]."""
    placed, counts, weights = np.asarray(device_of), np.asarray(transitions, float), np.asarray(weight, float)
    return float(sum((counts[i] * weights[np.ix_(placed[i], placed[i + 1])]).sum() for i in range(len(counts))))


def crossing_bound(transitions: np.ndarray, capacity: np.ndarray, hosts: np.ndarray, weight: np.ndarray) -> float:
    """Lower bound on the weighted crossings: each boundary by itself, and its weights at their smallest.

    The tokens of one expert stay on its device only if their next expert is there too, and a device has only so many
    slots: at least everything beyond the heaviest max(capacity) successors crosses. The same holds for predecessors,
    and for hosts. It ignores balance, and that experts compete for successors: often far below what is possible.
    """
    count = len(hosts)
    if count == 1 or len(transitions) == 0:
        return 0.0
    apart = hosts[:, None] != hosts[None, :]
    near = float(weight[~np.eye(count, dtype=bool)].min())
    bound = near * _least_leaving(transitions, int(capacity.max()))
    if apart.any():  # what leaves a host pays at least this much more
        far = float(weight[apart].min()) - near
        bound += far * _least_leaving(transitions, int(np.bincount(hosts, capacity).max()))
    return bound


def _least_leaving(transitions: np.ndarray, slots: int) -> float:
    """Tokens that must leave a place of so many slots, whichever experts it holds."""
    after = np.sort(transitions, axis=2)[:, :, ::-1][:, :, slots:].sum(axis=(1, 2))
    before = np.sort(transitions, axis=1)[:, ::-1, :][:, slots:, :].sum(axis=(1, 2))
    return float(np.maximum(after, before).sum())


def alternating(
    transitions: ArrayLike,
    load: ArrayLike,
    capacity: ArrayLike,
    speed: ArrayLike,
    balance_cap: ArrayLike,
    hosts: ArrayLike,
    *,
    device_weight: float = 1.0,
    host_weight: float = 1.0,
    seed: int = 0,
    sweeps: int = 16,
) -> Solution[np.ndarray]:
    """Few crossings between devices, at a balance of at most ``balance_cap`` in every layer.

    transitions: [L-1, E, E] tokens whose first choice goes from expert a of a layer to expert b of the next.
    load: [L, E]; capacity: [G] slots per layer; speed: [G]; hosts: [G] number of each device's host.
    balance_cap: a number or [L], at least 1 (``inf``: none).
    sweeps: work budget, passes over the layers. Once a pass changes nothing, the rest of the budget starts again from
    the best placement with one layer shuffled (``seed``) and the following ones placed after it.

    Returns [L, E] devices: never above a cap, and never with more crossings than ``linear`` or ``greedy_balance``
    where those keep to capacity and caps. Objective: weighted crossings; bound: ``crossing_bound``.
    Raises ``Infeasible`` when slots are missing or a cap lies below ``balance_bound``, and ``NotFound`` when a cap
    above it could not be met by greedy balancing, moves and swaps.
    """
    started = time.perf_counter()
    loads, speeds, slots = checked(load, speed, capacity)
    layers, experts = loads.shape
    counts = np.asarray(transitions, dtype=float)
    if counts.shape != (layers - 1, experts, experts) or not np.isfinite(counts).all() or (counts < 0).any():
        raise ValueError(
            f"transitions must be finite, non-negative [{layers - 1}, {experts}, {experts}], got {list(counts.shape)}"
        )
    host = np.asarray(hosts)
    if host.shape != speeds.shape or host.dtype.kind not in "iu" or (host < 0).any():
        raise ValueError(f"hosts must hold a host number for each of {len(speeds)} devices, got {hosts!r}")
    if not (0 <= device_weight < np.inf and 0 <= host_weight < np.inf) or sweeps < 0:
        raise ValueError(f"weights and sweeps must not be negative: {device_weight}, {host_weight}, {sweeps}")
    weight = host_weights(host, device_weight, host_weight)
    search = _Search(counts, loads, speeds, slots, weight, _limits(loads, speeds, slots, balance_cap))
    bound = crossing_bound(counts, slots, host, weight)

    rng = np.random.default_rng(seed)
    best = search.start()
    best_value = crossings(best, counts, weight)
    current, stale = best.copy(), np.ones(layers, bool)
    for _ in range(sweeps):
        search.sweep(current, stale)
        value = crossings(current, counts, weight)
        if value < best_value * (1 - ROUNDING):
            best, best_value = current.copy(), value
        if best_value <= bound:
            break
        if not stale.any():
            current, stale = search.shuffled(best, rng), np.ones(layers, bool)
    return Solution.from_heuristic(best, best_value, bound, time.perf_counter() - started)


def _limits(load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, balance_cap: ArrayLike) -> np.ndarray:
    """[L] largest finish that each layer may have."""
    caps = np.asarray(balance_cap, dtype=float)
    if caps.shape not in ((), (len(load),)) or not (caps >= 1).all():
        raise ValueError(f"balance_cap must be a number of at least 1, or one for each of {len(load)} layers")
    caps = np.broadcast_to(caps, len(load))
    ideal = load.sum(axis=1) / speed.sum()
    for layer in np.flatnonzero(ideal > 0):
        least = balance_bound(load[layer], speed, capacity) / ideal[layer]
        if least > caps[layer] * (1 + ROUNDING):
            raise Infeasible(
                f"layer {layer}: no placement has a balance of {caps[layer]:.4g} or less: it is at least {least:.4g}",
                unit="balance",
                missing=float(least - caps[layer]),
            )
    return np.where(ideal > 0, ideal, 1.0) * caps * (1 + ROUNDING)


@dataclass(frozen=True)
class _Search:
    """The input of one search; methods take and return placements [L, E] or, of one layer, [E]."""

    transitions: np.ndarray
    load: np.ndarray
    speed: np.ndarray
    capacity: np.ndarray
    weight: np.ndarray
    limit: np.ndarray

    def start(self) -> np.ndarray:
        """The better of greedy (repaired where it breaks a cap) and linear (where it is allowed at all)."""
        greedy = np.stack([self._within_limit(layer) for layer in range(len(self.load))])
        block = linear(self.load.shape[1], len(self.speed))
        held = np.bincount(block, minlength=len(self.speed))
        plain = np.broadcast_to(block, self.load.shape)
        allowed = (held <= self.capacity).all() and all(
            finish(block, row, self.speed).max() <= limit for row, limit in zip(self.load, self.limit, strict=True)
        )
        candidates = [greedy, plain.copy()] if allowed else [greedy]
        return min(candidates, key=lambda placed: crossings(placed, self.transitions, self.weight))

    def _within_limit(self, layer: int) -> np.ndarray:
        """Greedy balance of one layer, cooled where it is above the limit."""
        load, limit = self.load[layer], self.limit[layer]
        placed = _cool(longest_first(load, self.speed, self.capacity), load, self.speed, self.capacity, limit)
        if finish(placed, load, self.speed).max() > limit:
            reached = float(balance(placed[None], load[None], self.speed)[0])
            wanted = limit / (load.sum() / self.speed.sum())
            raise NotFound(
                f"layer {layer}: found no placement with a balance of {wanted:.4g} or less: allow {reached:.4g}, "
                "the best found"
            )
        return placed

    def _cost(self, placed: np.ndarray, layer: int, *, after: bool = True) -> np.ndarray:
        """[E, G] crossings of each expert of a layer on each device, its neighbours fixed."""
        cost = np.zeros((self.load.shape[1], len(self.speed)))
        if layer > 0:
            cost += self.transitions[layer - 1].T @ self.weight[placed[layer - 1]]
        if after and layer + 1 < len(placed):
            cost += self.transitions[layer] @ self.weight[:, placed[layer + 1]].T
        return cost

    def sweep(self, placed: np.ndarray, stale: np.ndarray) -> None:
        """Re-place, in place, every layer whose neighbours changed since it was last placed."""
        for layer in range(len(placed)):
            if stale[layer]:
                stale[layer] = False
                cost = self._cost(placed, layer)
                better = self._place_layer(cost, layer, placed[layer])
                if _total(cost, better) < _total(cost, placed[layer]) * (1 - ROUNDING):
                    placed[layer] = better
                    stale[max(layer - 1, 0) : layer] = True
                    stale[layer + 1 : layer + 2] = True

    def shuffled(self, placed: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One random layer shuffled by swaps that keep the limit, the following layers placed after it in turn."""
        result = placed.copy()
        first = int(rng.integers(len(result)))
        load, row = self.load[first], result[first]
        for a, b in rng.integers(len(row), size=(2 * len(row), 2)):
            row[[a, b]] = row[[b, a]]
            if finish(row, load, self.speed).max() > self.limit[first]:
                row[[a, b]] = row[[b, a]]
        for layer in range(first + 1, len(result)):
            result[layer] = self._place_layer(self._cost(result, layer, after=False), layer, result[layer])
        return result

    def _place_layer(self, cost: np.ndarray, layer: int, incumbent: np.ndarray) -> np.ndarray:
        """A placement of small ``cost`` within slots and limit: the least where the limit does not bind, and never
        above ``incumbent``, which must keep both."""
        load, limit = self.load[layer], self.limit[layer]
        placed = _assign(cost, self.capacity)
        ends = finish(placed, load, self.speed)
        if ends.max() <= limit:
            return placed
        price = np.zeros(len(self.speed))
        step = float(np.ptp(cost, axis=1).mean()) / max(float(load.mean()), ROUNDING)
        tried = [(ends.max(), placed)]
        for i in range(PRICE_STEPS):
            price = np.maximum(price + step / (1 + i) * (ends / limit - 1), 0.0)
            placed = _assign(cost + load[:, None] * price, self.capacity)
            ends = finish(placed, load, self.speed)
            tried.append((ends.max(), placed))
        within = [placed for hottest, placed in tried if hottest <= limit]
        if not within:
            cooled = _cool(min(tried, key=lambda t: t[0])[1], load, self.speed, self.capacity, limit)
            within = [cooled] if finish(cooled, load, self.speed).max() <= limit else []
        best = min([*within, incumbent], key=lambda placed: _total(cost, placed))
        return _descend(best, cost, load, self.speed, self.capacity, limit)


def _total(cost: np.ndarray, placed: np.ndarray) -> float:
    return float(cost[np.arange(len(placed)), placed].sum())


def _assign(cost: np.ndarray, capacity: np.ndarray) -> np.ndarray:
    """[E] the exact assignment of experts to device slots; cost: [E, G]."""
    slot_of = np.repeat(np.arange(len(capacity)), np.minimum(capacity, len(cost)))
    _, slot = linear_sum_assignment(cost[:, slot_of])
    return slot_of[slot]


def _changes(placed: np.ndarray, load: np.ndarray, speed: np.ndarray, capacity: np.ndarray) -> tuple[np.ndarray, ...]:
    """All single changes: swaps (expert, expert) and moves to a free slot (expert, device).

    Returns finish after them: swap_here, swap_there [E, E] on the first and second expert's device, move_there [E, G]
    (``inf`` where the device is full).
    """
    ends = finish(placed, load, speed)
    exchanged = load[None, :] - load[:, None]
    own = speed[placed]
    swap_here = ends[placed][:, None] + exchanged / own[:, None]
    swap_there = ends[placed][None, :] - exchanged / own[None, :]
    free = np.bincount(placed, minlength=len(speed)) < capacity
    move_there = np.where(free[None, :], ends[None, :] + load[:, None] / speed[None, :], np.inf)
    return swap_here, swap_there, move_there


def _apply(placed: np.ndarray, swap: np.ndarray, move: np.ndarray) -> np.ndarray:
    """The change of smallest value; swap [E, E] and move [E, G] hold values."""
    result = placed.copy()
    if swap.min() <= move.min():
        a, b = np.unravel_index(int(swap.argmin()), swap.shape)
        result[[a, b]] = placed[[b, a]]
    else:
        e, g = np.unravel_index(int(move.argmin()), move.shape)
        result[e] = g
    return result


def _descend(
    placed: np.ndarray, cost: np.ndarray, load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, limit: float
) -> np.ndarray:
    """Steepest descent of cost [E, G] by moves and swaps that keep slots and limit."""
    rows = np.arange(len(placed))
    while True:
        swap_here, swap_there, move_there = _changes(placed, load, speed, capacity)
        gain = cost - cost[rows, placed][:, None]  # [E, G]
        across = gain[:, placed]  # [E, E]
        worthwhile = -ROUNDING * (1.0 + _total(cost, placed))
        swap, move = across + across.T, gain
        swap = np.where((swap < worthwhile) & (swap_here <= limit) & (swap_there <= limit), swap, np.inf)
        move = np.where((move < worthwhile) & (move_there <= limit), move, np.inf)
        if not min(swap.min(), move.min()) < np.inf:
            return placed
        placed = _apply(placed, swap, move)


def _cool(placed: np.ndarray, load: np.ndarray, speed: np.ndarray, capacity: np.ndarray, limit: float) -> np.ndarray:
    """Moves and swaps off the hottest device until it keeps the limit, or until none leaves its two devices cooler."""
    while (ends := finish(placed, load, speed)).max() > limit:
        hottest = int(ends.argmax())
        swap_here, swap_there, move_there = _changes(placed, load, speed, capacity)
        off, elsewhere = (placed == hottest)[:, None], (placed != hottest)[None, :]
        swap = np.where(off & elsewhere, np.maximum(swap_here, swap_there), np.inf)
        left = ends[placed] - load / speed[placed]
        move = np.where(
            off & (np.arange(len(speed)) != hottest)[None, :], np.maximum(left[:, None], move_there), np.inf
        )
        if min(swap.min(), move.min()) >= ends[hottest] * (1 - ROUNDING):
            break
        placed = _apply(placed, swap, move)
    return placed
