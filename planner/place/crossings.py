"""What still crosses between devices and hosts, and why: boundaries between layers, pairs of experts, fan-out.

Layers are counted from 0 among those with experts; boundary j joins layers j and j + 1.
"""

# T tokens, L layers, E experts, K top-k, G devices, Z zones (devices, or hosts)

from dataclasses import dataclass

import numpy as np

from ...spec.placement import Placement
from ...spec.trace import Trace

HEAVIEST = 3  # pairs of a boundary
CELLS = 1 << 22  # of an array of tokens x zones at a time


@dataclass(frozen=True)
class Swap:
    """Exchanging an expert with the best partner in the zone that it is drawn to, everything else left in place.

    crossings: change of the tokens that cross between zones before and after the layer.
    over_ideal: of the layer's hottest device, before and after.
    """

    layer: int
    expert: int
    partner: int
    crossings: int
    over_ideal: tuple[float, float]


@dataclass(frozen=True)
class CrossingPair:
    """Top-1 experts of adjacent layers in different zones, and the tokens that go from one to the other.

    swap: what it would take to bring them together, the better of moving either; None: groups tie them to their hosts.
    """

    expert: int
    next_expert: int
    tokens: int
    devices: tuple[int, int]
    swap: Swap | None


@dataclass(frozen=True)
class Boundary:
    """Shares of tokens whose top-1 experts sit apart; pairs cross hosts (devices, where there is one host)."""

    layer: int
    cross_host: float
    cross_device: float
    pairs: tuple[CrossingPair, ...]


@dataclass(frozen=True)
class Fanout:
    """Mean number of distinct devices and hosts that a token's experts of a layer are on."""

    layer: int
    devices: float
    hosts: float


def device_of(placement: Placement) -> np.ndarray:
    """[L, E] the device of every expert; single copies only."""
    return np.stack([layer.share_matrix(placement.num_experts).argmax(axis=1) for layer in placement.layers])


def crossing(zone_of: np.ndarray, top1: np.ndarray) -> np.ndarray:
    """[L - 1, T] whether a token's top-1 experts sit in different zones; zone_of: [L, E], top1: [T, L]."""
    zone = np.take_along_axis(zone_of, top1.T, axis=1)
    return zone[1:] != zone[:-1]


def boundaries(placement: Placement, trace: Trace, over: np.ndarray, worst: int) -> tuple[Boundary, ...]:
    """Every boundary, the most crossing first; the ``worst`` of them with their heaviest pairs.

    over: [L, G] time of each device over ideal. Single copies and recorded tokens only.
    """
    top1, device = trace.expert_ids[:, :, 0].astype(np.int64), device_of(placement)
    by_host, by_device = crossing(placement.hosts[device], top1), crossing(device, top1)
    several = bool(placement.hosts.max())
    swaps = _Swaps(placement, placement.hosts[device] if several else device, device, top1, trace.expert_counts, over)
    apart = by_host if several else by_device
    order = sorted(range(len(apart)), key=lambda j: (-by_host[j].sum(), -by_device[j].sum(), j))
    found = []
    for rank, j in enumerate(order):
        pairs = _heaviest(swaps, j, apart[j]) if rank < worst else ()
        found.append(Boundary(j, float(by_host[j].mean()), float(by_device[j].mean()), pairs))
    return tuple(found)


def _heaviest(swaps: "_Swaps", j: int, apart: np.ndarray) -> tuple[CrossingPair, ...]:
    """The heaviest pairs of boundary j among the tokens that are ``apart`` [T]."""
    experts = swaps.zone.shape[1]
    seen, tokens = np.unique(swaps.top1[apart, j] * experts + swaps.top1[apart, j + 1], return_counts=True)
    pairs = []
    for i in np.argsort(-tokens, kind="stable")[:HEAVIEST].tolist():
        a, b = divmod(int(seen[i]), experts)
        both = (swaps.best(j + 1, b, int(swaps.zone[j, a])), swaps.best(j, a, int(swaps.zone[j + 1, b])))
        swap = min((s for s in both if s), key=lambda s: s.crossings, default=None)
        pairs.append(CrossingPair(a, b, int(tokens[i]), (int(swaps.device[j, a]), int(swaps.device[j + 1, b])), swap))
    return tuple(pairs)


@dataclass(frozen=True)
class _Swaps:
    """What swaps are judged by. zone, device: [L, E]; top1: [T, L]; counts: [L, E]; over: [L, G]."""

    placement: Placement
    zone: np.ndarray
    device: np.ndarray
    top1: np.ndarray
    counts: np.ndarray
    over: np.ndarray

    def drawn(self, layer: int) -> np.ndarray:
        """[E, Z] tokens of each expert of a layer whose top-1 expert before or after it is in a zone."""
        zones = int(self.zone.max()) + 1
        total = np.zeros(self.zone.shape[1] * zones, np.int64)
        for other in (layer - 1, layer + 1):
            if 0 <= other < len(self.zone):
                code = self.top1[:, layer] * zones + self.zone[other][self.top1[:, other]]
                total += np.bincount(code, minlength=len(total))
        return total.reshape(-1, zones)

    def best(self, layer: int, expert: int, target: int) -> Swap | None:
        """The exchange that brings an expert to zone ``target`` with the fewest crossings, of equal ones the coolest.

        None where a group of experts must stay on one host, or nothing is there to exchange.
        """
        partners = np.flatnonzero(self.zone[layer] == target)
        if (self.placement.groups > 1 and self.placement.hosts.max()) or not len(partners):
            return None
        drawn, home = self.drawn(layer), self.zone[layer, expert]
        change = drawn[expert, home] - drawn[expert, target] + drawn[partners, target] - drawn[partners, home]
        options = []
        for i in np.flatnonzero(change == change.min()).tolist():
            partner = int(partners[i])
            options.append((self._hottest_after(layer, expert, partner), partner))
        after, partner = min(options)
        return Swap(layer, expert, partner, int(change.min()), (float(self.over[layer].max()), after))

    def _hottest_after(self, layer: int, expert: int, partner: int) -> float:
        speed = np.array([device.speed for device in self.placement.devices])
        moved = (self.counts[layer, expert] - self.counts[layer, partner]) * speed.sum() / self.counts[layer].sum()
        after = self.over[layer].copy()
        for e, sign in ((expert, -1), (partner, 1)):
            after[self.device[layer, e]] += sign * moved / speed[self.device[layer, e]]
        return float(after.max())


def fanout(placement: Placement, ids: np.ndarray) -> tuple[Fanout, ...]:
    """Every layer, the widest first (hosts, then devices). ids: [T, L, K].

    Where experts have several copies a token takes each copy with its share, independently: what is given is the
    expectation, sum over zones of 1 - prod_k (1 - share of expert k there).
    """
    hosts = placement.hosts
    found = []
    for i, layer in enumerate(placement.layers):
        by_device = layer.share_matrix(placement.num_experts)
        by_host = np.stack([by_device[:, hosts == h].sum(axis=1) for h in range(hosts.max() + 1)], axis=1)
        found.append(Fanout(i, _distinct(by_device, ids[:, i]), _distinct(by_host, ids[:, i])))
    return tuple(sorted(found, key=lambda f: (-f.hosts, -f.devices, f.layer)))


def _distinct(share: np.ndarray, ids: np.ndarray) -> float:
    """Expected number of zones per token; share: [E, Z], ids: [T, K]."""
    step, total = max(1, CELLS // share.shape[1]), 0.0
    missed = 1.0 - np.minimum(share, 1.0)
    for first in range(0, len(ids), step):
        miss = np.ones((len(ids[first : first + step]), share.shape[1]))
        for experts in ids[first : first + step].T:
            miss *= missed[experts]
        total += (1.0 - miss).sum()
    return float(total / len(ids))
