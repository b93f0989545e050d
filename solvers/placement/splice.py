"""Splicing for ``annealing``: of several placements, each layer from the one where it fits best.

    j[l] in candidates        the placement that layer l is taken from, its devices relabelled
    minimise  sum_l within[l, j[l]] + sum_l across[l, j[l], j[l+1]] + price * sum_l hottest[l, j[l]]

    across[l, i, j]  weighted crossings from layer l of candidate i to layer l + 1 of candidate j
                     once the devices of j are renamed to suit those of i, ``_suiting``

    (1) balance:  mean_l hottest[l, j[l]] <= cap         the price is raised until it holds, ``splice``

Walks of annealing freeze into different orders in different layers; what one of them found in the first layers and
another in the last goes together, and only the boundary between the two costs. Renaming alike devices of a host, or
alike hosts, changes nothing inside a candidate, so the layers are a chain and the best path for a price is exact:
Viterbi's dynamic program (1967). Crossover of solutions by dynamic programming is known as optimised crossover
(Aggarwal, Orlin and Tai 1997).

Names are chosen in two steps, first hosts by all that moves between them, then devices inside each pair of hosts, both
by linear assignment. That is a heuristic; the costs are those of the names chosen, so a path costs what it says.
"""

# N candidates, L layers, E experts, G devices, H hosts, S samples

import math
import time
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..jit import njit
from .relabel import Groups

PRICES = 40  # halvings of the range of prices
HIGHEST = 1e3  # price over the mean cost of a layer: nothing but balance counts


class Costs(NamedTuple):
    """What placements cost.

    transitions: [L-1, E, E]; together: [L, E, E]; weights: per crossing between devices and, on top of it, between
    hosts; load: [S, L, E] over the ideal; speed: [G]; groups: what is alike; fixed_hosts: hosts keep their names.
    """

    transitions: np.ndarray
    together: np.ndarray
    weights: tuple[float, float]
    load: np.ndarray
    speed: np.ndarray
    groups: Groups
    fixed_hosts: bool

    def hottest(self, placed: np.ndarray) -> np.ndarray:
        """[L] mean over samples of the hottest device of placed [L, E]; 0 without samples."""
        found = np.zeros(len(placed))
        for layer, row in enumerate(placed):
            for load in self.load[:, layer]:
                found[layer] += (np.bincount(row, load, len(self.speed)) / self.speed).max()
        return found / max(len(self.load), 1)

    def total(self, placed: np.ndarray) -> float:
        """Weighted crossings of placed [L, E]."""
        found = float(self.within(placed).sum())
        for weight, name in zip(self.weights, (placed, self.groups.host_of[placed]), strict=True):
            if weight:
                found += weight * float((self.transitions * (name[:-1, :, None] != name[1:, None, :])).sum())
        return found

    def within(self, placed: np.ndarray) -> np.ndarray:
        """[L] weighted pairs of a layer that are apart in placed [L, E]."""
        found = np.zeros(len(placed))
        for weight, name in zip(self.weights, (placed, self.groups.host_of[placed]), strict=True):
            if weight:
                found += weight * (self.together * (name[:, :, None] != name[:, None, :])).sum(axis=(1, 2)) / 2
        return found


def load_splices() -> None:
    """Import what splices need, which takes longer than a first search: best while another thread searches."""
    import scipy.optimize  # noqa: F401


def splice(
    costs: Costs, candidates: np.ndarray, cap: float, price: float = 0.0, deadline: float = math.inf
) -> np.ndarray | None:
    """[L, E] the best path through candidates [N, L, E], all of which keep (1) of ``annealing``.

    cap: on the mean hottest, inf for none; price: of one unit of a layer's hottest, where there is no cap. None where
    no path that was tried keeps the cap, or ``deadline`` (``time.perf_counter()``) came before all was compared.
    """
    hottest = np.stack([costs.hottest(placed) for placed in candidates], axis=1)
    within = np.stack([costs.within(placed) for placed in candidates], axis=1)
    compared = _boundaries(costs, candidates, deadline)
    if compared is None:
        return None
    across, names = compared

    def path_at(price: float) -> tuple[np.ndarray, bool]:
        """The best path for a price, and whether it keeps the cap."""
        path = _path(within + price * hottest, across)
        return path, bool(hottest[np.arange(len(path)), path].mean() <= cap)

    best, kept = path_at(price)
    if not kept:
        low, high = 0.0, HIGHEST * max(float(within.sum() + across.sum()) / within.size, 1e-300)
        best, kept = path_at(high)
        if not kept:
            return None
        for _ in range(PRICES):  # a lower price never makes a dearer path
            path, kept = path_at((low + high) / 2)
            if kept:
                best, high = path, (low + high) / 2
            else:
                low = (low + high) / 2
    return _named(candidates, names, best)


def _path(nodes: np.ndarray, across: np.ndarray) -> np.ndarray:
    """[L] the cheapest path by nodes [L, N] and across [L-1, N, N]."""
    cost, came = nodes[0], []
    for node, edge in zip(nodes[1:], across, strict=True):
        total = cost[:, None] + edge
        came.append(total.argmin(axis=0))
        cost = total.min(axis=0) + node
    path = [int(cost.argmin())]
    for back in reversed(came):
        path.append(int(back[path[-1]]))
    return np.array(path[::-1])


def _named(candidates: np.ndarray, names: np.ndarray, path: np.ndarray) -> np.ndarray:
    """[L, E] the layers of a path, their devices renamed one after the other."""
    placed, name = [candidates[path[0], 0]], np.arange(names.shape[-1])
    for layer, (i, j) in enumerate(pairwise(path)):
        name = name[names[layer, i, j]]
        placed.append(name[candidates[j, layer + 1]])
    return np.stack(placed)


def _boundaries(costs: Costs, candidates: np.ndarray, deadline: float) -> tuple[np.ndarray, np.ndarray] | None:
    """across [L-1, N, N], and the new names [L-1, N, N, G] of the later candidate's devices that it is of.

    None where the deadline comes first: the time that one boundary takes tells early.
    """
    count, layers, _ = candidates.shape
    devices = len(costs.speed)
    across = np.zeros((layers - 1, count, count))
    names = np.zeros((layers - 1, count, count, devices), np.int64)
    flows = np.zeros((devices, devices))
    host = costs.groups.host_of
    began = time.perf_counter()
    for layer in range(layers - 1):
        now = time.perf_counter()
        if layer and now + (now - began) / layer * (layers - 1 - layer) > deadline:
            return None
        for i in range(count):
            for j in range(count):
                fill_boundary(costs.transitions[layer], candidates[i, layer], candidates[j, layer + 1], flows)
                name = np.arange(devices) if i == j else _suiting(flows, costs.groups, costs.fixed_hosts)
                apart = np.arange(devices)[:, None] != name
                far = host[:, None] != host[name]
                across[layer, i, j] = float((flows * (costs.weights[0] * apart + costs.weights[1] * far)).sum())
                names[layer, i, j] = name
    return across, names


@njit(cache=True, nogil=True)
def fill_boundary(transitions, before, after, flows):
    """flows: [G, G] out, tokens from devices ``before`` [E] to devices ``after`` [E]."""
    flows[:] = 0
    for e in range(len(before)):
        for f in range(len(after)):
            flows[before[e], after[f]] += transitions[e, f]


def _suiting(flows: np.ndarray, groups: Groups, fixed_hosts: bool) -> np.ndarray:
    """[G] new names of the later devices of flows [G, G] that keep many tokens where they are."""
    # Imported when it is needed: it takes as long as all else that a command begins with.
    from scipy.optimize import linear_sum_assignment

    members, kind = groups.members, groups.kind
    hosts = len(members)
    before = np.arange(hosts)  # the host that each later host becomes
    if hosts > 1 and not fixed_hosts:
        between = np.zeros((hosts, hosts))
        np.add.at(between, (groups.host_of[:, None], groups.host_of[None, :]), flows)
        alike = groups.host_kind[:, None] == groups.host_kind[None, :]
        rows, columns = linear_sum_assignment(np.where(alike, between, -np.inf), maximize=True)
        before[columns] = rows
    name = np.empty(len(kind), np.int64)
    for later, earlier in enumerate(before):
        mine, theirs = members[later][members[later] >= 0], members[earlier][members[earlier] >= 0]
        alike = kind[theirs][:, None] == kind[mine][None, :]
        kept = np.where(alike, flows[np.ix_(theirs, mine)], -np.inf)
        rows, columns = linear_sum_assignment(kept, maximize=True)
        name[mine[columns]] = theirs[rows]
    return name
