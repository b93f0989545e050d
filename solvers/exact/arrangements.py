"""Arrangements: every way to put the experts of one layer on devices, one copy each, where there are few.

at[n, e]     device of expert e in arrangement n

(1) slots:   #{e: at[n, e] = g} <= capacity[g]
(2) groups:  the experts of a group, adjacent ones, are on one host, and every host has groups / hosts of the
             groups (groups > 1 only)
"""

# N arrangements, E experts, G devices, S samples, K groups, X hosts

import numpy as np

MOST = 20_000  # arrangements
CELLS = 1 << 22  # of an array of samples x arrangements x devices at a time


def arrangements(
    experts: int, capacity: np.ndarray, hosts: np.ndarray, groups: int = 1, most: int = MOST
) -> np.ndarray | None:
    """[N, E] devices, or None where there are more than ``most``, or none at all.

    capacity: [G] slots; hosts: [G] number of each device's host, from 0. groups must divide the experts, and hosts the
    groups.
    """
    devices, count = len(capacity), int(hosts.max()) + 1
    found = np.zeros((1, 0), np.int64)
    held = np.zeros((1, devices), np.int64)  # experts on each device
    taken = np.zeros((1, count), np.int64)  # groups on each host
    size = experts // groups
    for e in range(experts):
        parts = []
        for g in range(devices):
            fits = held[:, g] < capacity[g]
            if groups > 1:
                opens = e % size == 0
                fits &= taken[:, hosts[g]] < groups // count if opens else hosts[found[:, -1]] == hosts[g]
            rows = np.flatnonzero(fits)
            more = held[rows]
            more[:, g] += 1
            on = taken[rows]
            if groups > 1 and opens:
                on[:, hosts[g]] += 1
            parts.append((np.column_stack([found[rows], np.full(len(rows), g)]), more, on))
        found, held, taken = (np.concatenate(part) for part in zip(*parts, strict=True))
        if not 0 < len(found) <= most:
            return None
    return found


def hottest(at: np.ndarray, load: np.ndarray, speed: np.ndarray) -> np.ndarray:
    """[N] mean over samples of the hottest device's load over speed; at: [N, E], load: [S, E], speed: [G]."""
    on = at[:, :, None] == np.arange(len(speed))  # [N, E, G]
    step = max(1, CELLS // max(1, load.shape[0] * len(speed)))
    found = np.empty(len(at))
    for first in range(0, len(at), step):
        finish = np.einsum("se,neg->nsg", load, on[first : first + step] / speed, optimize=True)
        found[first : first + step] = finish.max(axis=2).mean(axis=1)
    return found


def classes(
    at: np.ndarray, capacity: np.ndarray, speed: np.ndarray, hosts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(first [C] one arrangement of each class, of_class [N]): those of a class differ by names of alike places only.

    Alike are devices of one host with equal slots and speed, and hosts with equal devices. In the common name of a
    class the first of alike places holds the lowest expert, and so on.
    """
    count, (number, experts) = len(capacity), at.shape
    lowest = np.stack([np.where(at == g, np.arange(experts), experts).min(axis=1) for g in range(count)], axis=1)
    name = np.tile(np.arange(count), (number, 1))  # [N, G] the common name of each device
    kinds: dict[tuple[tuple[int, float], ...], list[np.ndarray]] = {}
    for x in range(int(hosts.max()) + 1):
        members = np.flatnonzero(hosts == x)
        members = members[np.lexsort((speed[members], capacity[members]))]
        kind = tuple((int(capacity[g]), float(speed[g])) for g in members)
        kinds.setdefault(kind, []).append(members)
        for pair in dict.fromkeys(kind):
            alike = members[[i for i, own in enumerate(kind) if own == pair]]
            rank = lowest[:, alike].argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
            name[:, alike] = alike[rank]
    for hosts_alike in kinds.values():
        seat = np.full(count, -1)
        for members in hosts_alike:
            seat[members] = np.arange(len(members))
        first = np.stack([lowest[:, members].min(axis=1) for members in hosts_alike], axis=1)
        rank = first.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
        table = np.stack(hosts_alike)  # [hosts, devices]
        for i, members in enumerate(hosts_alike):
            name[:, members] = table[rank[:, i, None], seat[name[:, members]]]
    common = np.take_along_axis(name, at, axis=1)
    code = common @ (count ** np.arange(experts, dtype=object)).astype(np.int64) if count**experts < 2**62 else None
    if code is None:
        code = np.unique(common, axis=0, return_inverse=True)[1].ravel()
    _, first_of, of_class = np.unique(code, return_index=True, return_inverse=True)
    return first_of, of_class.ravel()
