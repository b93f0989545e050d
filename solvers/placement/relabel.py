"""Moves of whole devices for ``annealing``: in a run of layers, devices exchange all their experts.

Annealing single experts finds good groups early, but in different layers the same group may end up on different
devices: between the two, everything crosses, and no exchange of one expert or two mends it. Here groups change
places as a whole, by Metropolis' rule: two alike devices of a host, or two alike hosts, in a run of adjacent layers.
Only the boundaries at both ends of the run count, because inside everything moves alike. Balance does not change.
"""

# L layers, G devices, H hosts, R devices of a host

import math
from typing import NamedTuple

import numpy as np

from ..jit import njit
from .tables import UNIT, random_bits

HOSTS = np.uint64(4)  # one proposal in so many is of hosts
FIELD = np.uint64(2**20 - 1)


class Groups(NamedTuple):
    """What may change places.

    members: [H, R] devices of each host, -1 where it has fewer; host_of: [G]; kind: [G], equal for devices alike in
    slots and speed; host_kind: [H], equal for hosts of alike devices in order.
    """

    members: np.ndarray
    host_of: np.ndarray
    kind: np.ndarray
    host_kind: np.ndarray

    @classmethod
    def of(cls, slots: np.ndarray, speed: np.ndarray, host_of: np.ndarray) -> "Groups":
        """slots, speed, host_of: [G]."""
        _, kind = np.unique(np.stack([slots, speed]), axis=1, return_inverse=True)
        of_host = [np.flatnonzero(host_of == h) for h in range(int(host_of.max()) + 1)]
        members = np.full((len(of_host), max(map(len, of_host))), -1)
        kinds = np.full(members.shape, -1)
        for host, mine in enumerate(of_host):
            members[host, : len(mine)] = mine
            kinds[host, : len(mine)] = kind[mine]
        _, host_kind = np.unique(kinds, axis=0, return_inverse=True)
        return cls(members, host_of, kind, host_kind)


@njit(cache=True, nogil=True)
def _more(flows, layer, right, new, host_of, device_cost, host_cost):
    """Energy gained when on one side of a boundary every device g becomes new[g]; flows: [L-1, G, G]; new: [G]."""
    more = 0.0
    for g in range(len(new)):
        k = new[g]
        if k != g:
            for o in range(len(new)):
                tokens = flows[layer, o, g] if right else flows[layer, g, o]
                apart = int(o != k) - int(o != g)
                far = int(host_of[o] != host_of[k]) - int(host_of[o] != host_of[g])
                more += tokens * (device_cost * apart + host_cost * far)
    return more


@njit(cache=True, nogil=True)
def _swap(flows, label, layer, new):
    """Layer by new devices: label [L, G] and both boundaries of flows follow."""
    layers, devices = label.shape
    for g in range(devices):
        label[layer, g] = new[label[layer, g]]
    for g in range(devices):
        k = new[g]
        if k > g:
            for o in range(devices):
                if layer < layers - 1:
                    flows[layer, g, o], flows[layer, k, o] = flows[layer, k, o], flows[layer, g, o]
                if layer > 0:
                    flows[layer - 1, o, g], flows[layer - 1, o, k] = flows[layer - 1, o, k], flows[layer - 1, o, g]


@njit(cache=True, nogil=True)
def relabel(flows, label, groups, rules, temperature, proposals, state):
    """``proposals`` of whole devices or hosts; label [L, G], at first the devices themselves, says what each became.

    flows: [L-1, G, G] tokens between devices, which follow; rules: ``placement.tables.Rules``; state: [1] of the random
    numbers. Returns the energy gained.
    """
    members, host_of, kind, host_kind = groups.members, groups.host_of, groups.kind, groups.host_kind
    device_cost, host_cost, fixed_hosts = rules.device_cost, rules.host_cost, rules.fixed_hosts
    layers, devices = label.shape
    hosts, gained = np.uint64(len(members)), 0.0
    new = np.arange(devices)
    for _ in range(proposals):
        first, last = random_bits(state), random_bits(state)
        one, two = first >> np.uint64(20) & FIELD, first & FIELD
        low = np.int64((first >> np.uint64(43)) % np.uint64(layers))
        high = np.int64((last >> np.uint64(43)) % np.uint64(layers))
        run = last % np.uint64(3)
        if run == 0:
            high = layers - 1
        elif run == 1:
            high = low
        low, high = min(low, high), max(low, high)
        new[:] = np.arange(devices)
        if hosts > 1 and not fixed_hosts and (last >> np.uint64(8)) % HOSTS == 0:
            a, b = np.int64(one % hosts), np.int64(two % hosts)
            if a == b or host_kind[a] != host_kind[b]:
                continue
            for i in range(members.shape[1]):
                if members[a, i] >= 0:
                    new[members[a, i]], new[members[b, i]] = members[b, i], members[a, i]
        else:
            g = np.int64(one % np.uint64(devices))
            k = members[host_of[g], np.int64(two % np.uint64(members.shape[1]))]
            if k < 0 or k == g or kind[k] != kind[g]:
                continue
            new[g], new[k] = k, g
        energy = 0.0
        if low > 0:
            energy += _more(flows, low - 1, True, new, host_of, device_cost, host_cost)
        if high < layers - 1:
            energy += _more(flows, high, False, new, host_of, device_cost, host_cost)
        chance = ((random_bits(state) >> np.uint64(11)) + np.uint64(1)) * UNIT
        if energy > -temperature * math.log(chance):
            continue
        gained += energy
        for layer in range(low, high + 1):
            _swap(flows, label, layer, new)
    return gained
