"""Two levels of an exchange, between hosts and inside them: the one rule of who passes rows on.

A row for a host goes from the device with local index i (the i-th of its own host) to the device there with local index
i modulo the number of that host's devices, its relay, which passes it on inside the host. On its own host a device is
its own relay. The planner predicts by this rule and the runtime executes it; hosts may have unequal numbers of devices.
"""

# G devices, H hosts

from collections import Counter
from collections.abc import Sequence

import numpy as np

Groups = tuple[tuple[int, ...], ...]
"""Disjoint groups of devices that together are all of them, each in order."""


def host_numbers(hosts: Sequence[object] | np.ndarray) -> np.ndarray:
    """[G] hosts numbered as they first come; hosts: a name or number for each device."""
    number = {host: i for i, host in enumerate(dict.fromkeys(hosts))}
    return np.array([number[host] for host in hosts], int)


def local_indices(hosts: Sequence[object] | np.ndarray) -> np.ndarray:
    """[G] place of each device among those of its host."""
    seen: Counter[object] = Counter()
    index = np.zeros(len(hosts), int)
    for device, host in enumerate(hosts):
        index[device] = seen[host]
        seen[host] += 1
    return index


def relays(hosts: Sequence[object] | np.ndarray) -> np.ndarray:
    """[G, H] device of each host, in the order of ``host_numbers``, that takes the rows of each device for it."""
    number, index = host_numbers(hosts), local_indices(hosts)
    members = [np.flatnonzero(number == host) for host in range(int(number.max()) + 1)]
    return np.stack([own[index % len(own)] for own in members], axis=1)


def across_groups(hosts: Sequence[object] | np.ndarray) -> Groups:
    """Devices that pass rows to each other between hosts, directly or by others: with hosts of one size those of one
    local index, one on each host."""
    table = relays(hosts)
    label = np.arange(len(table))
    while True:
        least = np.minimum(label, label[table].min(1))
        for column in table.T:
            np.minimum.at(least, column, label)
        if (least == label).all():
            return _groups(label)
        label = least


def inside_groups(hosts: Sequence[object] | np.ndarray) -> Groups:
    """The devices of each host."""
    return _groups(host_numbers(hosts))


def two_levels(hosts: Sequence[object] | np.ndarray) -> bool:
    """Whether there are several hosts, one of them with several devices; else one of the levels moves nothing."""
    count = len(set(hosts))
    return 1 < count < len(hosts)


def _groups(label: np.ndarray) -> Groups:
    found: dict[int, list[int]] = {}
    for device, own in enumerate(label.tolist()):
        found.setdefault(own, []).append(device)
    return tuple(map(tuple, found.values()))
