"""Shares of copies decided for every batch: which copy takes how much, so that the last device ends first (as LPLB).

    x[e, g] >= 0   rows of expert e that device g computes, for the devices g that hold it
    minimise max_g sum_e x[e, g] / speed[g]   with   sum_g x[e, g] = load[e]

Copies are fixed. One expert after the other is poured over its copies, those with the lowest level (rows over speed)
first, with all others as they are, until a round changes nothing: each pouring minimises the convex sum over devices of
rows^2 / speed, and where that is least, the highest level is lowest, too. Every device computes the same from the same
counts, so that nobody tells anybody.
"""

from collections.abc import Sequence

import numpy as np

ROUNDS = 20
CHANGE = 1e-3  # of the highest level, in a round: then it is the last


class BatchShares:
    """slots: the experts of each device; speeds: [G], of which only their ratios count.

    copied: [R] the experts of which there are several copies.
    """

    def __init__(self, slots: Sequence[Sequence[int]], speeds: Sequence[float], experts: int) -> None:
        self._speeds = list(speeds)
        held: list[list[int]] = [[] for _ in range(experts)]
        for device, own in enumerate(slots):
            for expert in own:
                held[expert].append(device)
        self.copied = np.array([e for e, devices in enumerate(held) if len(devices) > 1], int)
        self._copies = [held[e] for e in self.copied]
        single = [(e, devices[0]) for e, devices in enumerate(held) if len(devices) == 1]
        self._single = np.array([e for e, _ in single], int)
        self._home = np.array([device for _, device in single], int)

    def weights(self, load: np.ndarray) -> np.ndarray:
        """[R, G] rows of each copied expert that each device computes; load: [E] rows of the batch."""
        speeds = self._speeds
        level = np.bincount(self._home, load[self._single], len(speeds)).tolist()  # rows, so far
        rows = load[self.copied].tolist()
        order = sorted(range(len(rows)), key=lambda r: (-rows[r], r))
        taken = [[0.0] * len(devices) for devices in self._copies]
        for _ in range(ROUNDS):
            before = max(n / s for n, s in zip(level, speeds, strict=True))
            moved = 0.0
            for r in order:
                devices, own = self._copies[r], taken[r]
                for device, n in zip(devices, own, strict=True):
                    level[device] -= n
                new = poured(rows[r], [level[g] for g in devices], [speeds[g] for g in devices])
                for device, n in zip(devices, new, strict=True):
                    level[device] += n
                moved = max(moved, *(abs(a - b) for a, b in zip(own, new, strict=True)))
                taken[r] = new
            if moved <= CHANGE * max(before, 1.0):
                break
        found = np.zeros((len(rows), len(speeds)))
        for r, (devices, own) in enumerate(zip(self._copies, taken, strict=True)):
            found[r, devices] = own if rows[r] else 1.0
        return found


def poured(rows: float, held: Sequence[float], speeds: Sequence[float]) -> list[float]:
    """Of so many rows what each device takes, so that those that take any end at one level, above which the others are.

    held: rows that each device has already.
    """
    order = sorted(range(len(held)), key=lambda i: held[i] / speeds[i])
    there, speed, level = 0.0, 0.0, 0.0
    for k, i in enumerate(order):
        there, speed = there + held[i], speed + speeds[i]
        level = (there + rows) / speed
        if k + 1 == len(order) or level <= held[order[k + 1]] / speeds[order[k + 1]]:
            break
    return [max(level * speeds[i] - held[i], 0.0) for i in range(len(held))]
