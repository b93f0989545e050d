"""Affinity placement, exactly, where a layer has few arrangements: a shortest path through the layers, under a cap.

    n[l] in arrangements       where the experts of layer l are (``arrangements``)
    minimise  sum_l cost[l, n[l]] + sum_l sum_{a,b} transitions[l][a, b] * weight(at[n[l], a], at[n[l+1], b])

    (1) balance:  sum_l heat[l, n[l]] <= L * cap

Without (1) it is dynamic programming (Viterbi 1967). With it, a price per unit of heat is first raised to where the
best path just keeps (1): LARAC (Juettner, Szviatovszki, Mecs and Rajko 2001), which ends with a path, and a bound that
may be a little lower. An arrangement whose best path at that price, or without a price, costs more than the path known
is out. Through what remains go labels (cost and heat so far), of which one that another beats in both is dropped
(Handler and Zang 1980); what they could still save is bounded in the same two ways. Work is counted in labels.

Of equal costs, the least heat is taken.
"""

# L layers, N arrangements, C classes of them, E experts, G devices

import math
import time
from dataclasses import dataclass, replace
from threading import Event
from typing import NamedTuple

import numpy as np

from ..result import Infeasible, NotFound, Solution

SOLVER = "dynamic programming"
ROUNDING = 1e-9  # relative: costs this close are one, and a cap is kept to so much
SAME = 1e-12  # relative: heats that differ by the order of their sums
BLOCK = 1 << 20  # labels at a time
MOST_PAIRS = 40_000_000  # arrangements x classes x boundaries, whose costs are kept
FEW_LABELS, MOST_LABELS = 300_000, 5_000_000  # labels tried in all: for a good path first, then for the best
PRICES = 30  # at most; the method ends by itself, after a handful


@dataclass(frozen=True, eq=False)
class Layers:
    """What a path pays. transitions: [L-1, E, E], or none; levels: (weight, place of each device [G]).

    at: [N, E] devices, of which every renaming of alike ones is there; cost, heat: [L, N], the same for all names.
    first: [C] an arrangement of each class; of_class: [N] (``arrangements.classes``).
    """

    at: np.ndarray
    cost: np.ndarray
    heat: np.ndarray
    cap: float
    first: np.ndarray
    of_class: np.ndarray
    transitions: np.ndarray | None = None
    levels: tuple[tuple[float, np.ndarray], ...] = ()

    @property
    def pairs(self) -> int:
        """Of arrangements and classes, over all boundaries."""
        return 0 if self.transitions is None else len(self.transitions) * len(self.at) * len(self.first)


def shortest(layers: Layers, *, time_limit: float = math.inf, stop: Event | None = None) -> Solution[np.ndarray]:
    """[L, E] devices of the cheapest path that keeps the cap: ``optimal``; ``feasible`` where labels were too many.

    ``time_limit`` where the time ended, or ``stop`` was set, among the labels. Raises ``Infeasible`` where no path
    keeps the cap, and ``NotFound`` where the time ends before there is one.
    """
    began = time.perf_counter()
    search = _Search(layers, began + time_limit, stop)
    path, bound = search.run()
    value = search.value(path)
    found = Solution.from_heuristic(layers.at[path], value, min(bound, value), time.perf_counter() - began, SOLVER)
    return replace(found, status="time_limit") if search.late and found.status != "optimal" else found


class _Search:
    """Values of paths are equal for all names of an arrangement, so that they are kept by class."""

    def __init__(self, layers: Layers, deadline: float, stop: Event | None) -> None:
        self.layers, self.deadline, self.stop = layers, deadline, stop
        self.limit = len(layers.cost) * layers.cap * (1 + ROUNDING)
        self.late = False
        self.on = [
            (place[layers.at][:, :, None] == np.arange(int(place.max()) + 1)).astype(float)
            for _, place in layers.levels
        ]
        everything = np.arange(len(layers.at))
        self.before: list[np.ndarray] = []  # [N, C] what is paid from any arrangement to one of each class
        self.after: list[np.ndarray] = []  # [C, N] from one of each class to any
        for layer in range(len(layers.cost) - 1 if layers.transitions is not None else 0):
            self._check()
            self.before.append(self._across(layer, everything, layers.first))
            self.after.append(self._across(layer, layers.first, everything))

    def run(self) -> tuple[np.ndarray, float]:
        """(path [L], bound)"""
        free = self._forward(0.0)
        hot, least = self._trace(free), float(free[-1].min())
        if self._heat(hot) <= self.limit:
            return self._labelled(hot, 0.0, least)
        cool = self._trace(self._forward(math.inf))
        if self._heat(cool) > self.limit:
            mean = self._heat(cool) / len(cool)
            raise Infeasible(
                f"no placement has a mean balance of {self.layers.cap:.6g} or less: it is proven to be at least "
                f"{mean:.6g}",
                unit="balance",
                missing=mean - self.layers.cap,
            )
        price, bound = 0.0, least
        for _ in range(PRICES):
            price = (self.value(cool) - self.value(hot)) / (self._heat(hot) - self._heat(cool))
            value = self._forward(price)
            path, low = self._trace(value), float(value[-1].min())
            bound = max(bound, low - price * self.limit)
            if low >= self.value(cool) + price * self._heat(cool) - ROUNDING * abs(low):
                break
            hot, cool = (path, cool) if self._heat(path) > self.limit else (hot, path)
        return self._labelled(cool, price, bound)

    def value(self, path: np.ndarray) -> float:
        total = float(self.layers.cost[np.arange(len(path)), path].sum())
        for layer in range(len(self.before)):
            total += float(self._across(layer, path[layer : layer + 1], path[layer + 1 : layer + 2])[0, 0])
        return total

    def _heat(self, path: np.ndarray) -> float:
        return float(self.layers.heat[np.arange(len(path)), path].sum())

    def _check(self) -> None:
        if time.perf_counter() > self.deadline or (self.stop is not None and self.stop.is_set()):
            raise NotFound("the time limit ended the exact program")

    def _across(self, layer: int, before: np.ndarray, after: np.ndarray) -> np.ndarray:
        """[A, B] what tokens pay between arrangements of a layer and of the next."""
        assert self.layers.transitions is not None
        counts = self.layers.transitions[layer]
        paid = np.zeros((len(before), len(after)))
        for (weight, _), on in zip(self.layers.levels, self.on, strict=True):
            led = np.einsum("ef,nfp->nep", counts, on[after], optimize=True)
            stay = on[before].reshape(len(before), -1) @ led.reshape(len(after), -1).T
            paid += weight * np.maximum(counts.sum() - stay, 0.0)
        return paid

    def _node(self, price: float) -> np.ndarray:
        """[L, N] what an arrangement costs by itself; at an infinite price, only the coolest may be taken."""
        cost, heat = self.layers.cost, self.layers.heat
        if price == math.inf:
            return np.where(heat <= heat.min(axis=1, keepdims=True) * (1 + SAME), cost, np.inf)
        return cost + price * heat

    def _forward(self, price: float) -> np.ndarray:
        """[L, C] cost of the best path that ends there."""
        node, first, of_class = self._node(price), self.layers.first, self.layers.of_class
        value = node[:, first]
        for layer in range(1, len(node)):
            self._check()
            if self.before:
                value[layer] += (value[layer - 1][of_class, None] + self.before[layer - 1]).min(axis=0)
            else:
                value[layer] += value[layer - 1].min()
        return value

    def _rest(self, price: float) -> np.ndarray:
        """[L, C] what the best path from there costs on, itself left out."""
        node, first, of_class = self._node(price), self.layers.first, self.layers.of_class
        rest = np.zeros((len(node), len(first)))
        for layer in reversed(range(len(node) - 1)):
            self._check()
            ahead = node[layer + 1] + rest[layer + 1][of_class]
            rest[layer] = (self.after[layer] + ahead).min(axis=1) if self.after else ahead.min()
        return rest

    def _trace(self, value: np.ndarray) -> np.ndarray:
        """[L] the best path; value: [L, C] of ``_forward``."""
        path = np.empty(len(value), np.int64)
        path[-1] = self.layers.first[value[-1].argmin()]
        everything = np.arange(len(self.layers.at))
        for layer in reversed(range(len(value) - 1)):
            total = value[layer][self.layers.of_class]
            if self.before:
                total = total + self._across(layer, everything, path[layer + 1 : layer + 2])[:, 0]
            path[layer] = total.argmin()
        return path

    def _labelled(self, known: np.ndarray, price: float, bound: float) -> tuple[np.ndarray, float]:
        """(the best path, bound), from a path that keeps the cap and a price at which it is nearly the best."""
        after = {p: (self._forward(p), self._rest(p)) for p in {0.0, price}}
        promises = {
            p: ((value + rest)[:, self.layers.of_class], rest[:, self.layers.of_class])
            for p, (value, rest) in after.items()
        }
        for beam in (FEW_LABELS, MOST_LABELS):
            try:
                found, whole = self._walk(known, promises, beam)
            except NotFound:
                self.late = True
                break
            known = min((path for path in (found, known) if path is not None), key=self.value)
            if whole:  # where nothing is left but for rounding, what is known is the best
                return known, self.value(known)
        return known, bound

    def _walk(
        self, known: np.ndarray, promises: dict[float, tuple[np.ndarray, np.ndarray]], beam: int
    ) -> tuple[np.ndarray | None, bool]:
        """(a path no worse than the one known, whether there is no better); beam: labels tried in all.

        promises: by price, [L, N] what the best path through an arrangement costs, and what it costs from there on.
        """
        value = self.value(known)
        most = value + ROUNDING * abs(value)
        cool = self.layers.heat.min(axis=1)
        later = np.append(np.cumsum(cool[::-1])[::-1][1:], 0.0)
        keep = self.layers.heat + (cool.sum() - cool)[:, None] <= self.limit
        for p, (through, _) in promises.items():
            keep &= through - (p * self.limit if p else 0.0) <= most
        keep[0] &= np.isin(np.arange(keep.shape[1]), self.layers.first)  # other names are the same again
        labels = _Labels(np.zeros(1), np.zeros(1), np.full(1, -1), np.full(1, -1), np.zeros(1, np.int64))
        trail, whole, share = [], True, beam // len(keep)
        for layer in range(len(keep)):
            nodes = np.flatnonzero(keep[layer])
            if len(nodes) * len(labels.cost) > share:
                whole, labels = False, self._likeliest(labels, layer, promises, max(1, share // len(nodes)))
            labels = self._extend(layer, labels, nodes, promises, float(later[layer]), most)
            if not len(labels.cost):
                return None, whole
            trail.append(labels)
        least = float(labels.cost.min())
        close = np.flatnonzero(labels.cost <= least + ROUNDING * abs(least))
        at = int(close[labels.heat[close].argmin()])
        path = np.empty(len(keep), np.int64)
        for layer in reversed(range(len(keep))):
            path[layer], at = trail[layer].node[at], trail[layer].came[at]
        return path, whole

    def _likeliest(
        self, labels: "_Labels", layer: int, promises: dict[float, tuple[np.ndarray, np.ndarray]], count: int
    ) -> "_Labels":
        """The labels of the layer before whose best path at the highest price is cheapest."""
        price = max(promises)
        promise = labels.cost + promises[price][1][layer - 1, labels.node] + price * labels.heat
        best = np.sort(np.argsort(promise, kind="stable")[:count])
        return _Labels(*(part[best] for part in labels))

    def _extend(
        self,
        layer: int,
        labels: "_Labels",
        nodes: np.ndarray,
        promises: dict[float, tuple[np.ndarray, np.ndarray]],
        later: float,
        most: float,
    ) -> "_Labels":
        """Labels one layer on, those that no other beats at the same arrangement."""
        found = []
        for some in np.array_split(nodes, max(1, len(nodes) * len(labels.cost) // BLOCK)):
            self._check()
            cost = labels.cost[:, None] + self.layers.cost[layer, some]
            if layer and self.before:
                ends, which = np.unique(labels.node, return_inverse=True)
                cost = cost + self._across(layer - 1, ends, some)[which]
            heat = labels.heat[:, None] + self.layers.heat[layer, some]
            fits = heat + later <= self.limit
            for price, (_, rest) in promises.items():
                fits &= cost + rest[layer, some] + (price * (heat - self.limit) if price else 0.0) <= most
            came, which = np.nonzero(fits)
            found.append((cost[fits], heat[fits], some[which], labels.at[came]))
        cost, heat, node, came = (np.concatenate(parts) for parts in zip(*found, strict=True))
        # Where nothing is paid between layers it does not matter where a label is.
        return _undominated(cost, heat, node, came, np.zeros_like(node) if not self.before else node)


class _Labels(NamedTuple):
    """Paths so far: cost, heat, the last arrangement, the label of the layer before, and their own numbers there."""

    cost: np.ndarray
    heat: np.ndarray
    node: np.ndarray
    came: np.ndarray
    at: np.ndarray


def _undominated(cost: np.ndarray, heat: np.ndarray, node: np.ndarray, came: np.ndarray, group: np.ndarray) -> _Labels:
    """The labels that no other of their group equals or beats in both cost and heat."""
    order = np.lexsort((heat, cost, group))
    group, cool = group[order], heat[order]
    keep = np.ones(len(order), bool)
    starts = np.flatnonzero(np.diff(group, prepend=-1))
    for first, end in zip(starts, [*starts[1:], len(group)], strict=True):
        keep[first + 1 : end] = cool[first + 1 : end] < np.minimum.accumulate(cool[first:end])[:-1]
    order = order[keep]
    return _Labels(cost[order], heat[order], node[order], came[order], np.arange(len(order)))
