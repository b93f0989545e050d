"""Where the search of ``replication`` begins: copies for the heaviest, then the heaviest copies to the coolest devices.

Experts and devices belong to zones: a host each where groups of experts must stay on one, else all to one.
"""

# E experts, G devices, R slots, Z zones

import numpy as np

from ..jit import njit
from ..slots import EMPTY


@njit(cache=True, nogil=True)
def greedy(
    load: np.ndarray,
    speed: np.ndarray,
    first: np.ndarray,
    zone_of_expert: np.ndarray,
    zone_of_device: np.ndarray,
    relief: np.ndarray,
    full: bool,
) -> np.ndarray:
    """[R] a first placement: copies to the largest load * relief, then heaviest copies to where they end earliest.

    load: [E]; first: [G + 1] first slot of each device; relief: [Z, G] (``inf``: no more copies).
    """
    experts, devices, slots = len(load), len(speed), first[-1]
    spare = np.zeros(len(relief), np.int64)
    for g in range(devices):
        spare[zone_of_device[g]] += first[g + 1] - first[g]
    for e in range(experts):
        spare[zone_of_expert[e]] -= 1
    copies = np.ones(experts, np.int64)
    for z in range(len(relief)):
        while spare[z] > 0:
            best, chosen = -1.0, -1
            for e in range(experts):
                if zone_of_expert[e] == z and copies[e] < relief.shape[1] and np.isfinite(relief[z, copies[e]]):
                    value = load[e] * relief[z, copies[e] - 1]
                    if value > best:
                        best, chosen = value, e
            if chosen < 0:
                break
            copies[chosen] += 1
            spare[z] -= 1

    at = np.full(slots, EMPTY, np.int64)
    held = np.zeros(devices, np.int64)
    carried = np.zeros(devices)
    for e in np.argsort(-load / copies, kind="mergesort"):
        wanted = copies[e]
        for c in range(wanted):
            best, chosen = np.inf, -1
            for g in range(devices):
                if zone_of_device[g] != zone_of_expert[e] or first[g] + held[g] == first[g + 1]:
                    continue
                twice = False
                for r in range(first[g], first[g] + held[g]):
                    twice = twice or at[r] == e
                end = (carried[g] + load[e] / wanted) / speed[g]
                if not twice and end < best:
                    best, chosen = end, g
            if chosen < 0:  # only devices that hold the expert have free slots: do without this copy
                copies[e] = c
                break
            at[first[chosen] + held[chosen]] = e
            held[chosen] += 1
            carried[chosen] += load[e] / wanted
    if full:
        fill(at, load, copies, first, zone_of_expert, zone_of_device)
    return at


@njit(cache=True, nogil=True)
def fill(
    at: np.ndarray,
    load: np.ndarray,
    copies: np.ndarray,
    first: np.ndarray,
    zone_of_expert: np.ndarray,
    zone_of_device: np.ndarray,
) -> None:
    """Put into every empty slot the expert with the lightest further copy; at [R] and copies [E] change in place."""
    for g in range(len(first) - 1):
        for r in range(first[g], first[g + 1]):
            if at[r] != EMPTY:
                continue
            best, chosen = np.inf, -1
            for e in range(len(load)):
                if zone_of_expert[e] == zone_of_device[g] and load[e] / (copies[e] + 1) < best:
                    twice = False
                    for q in range(first[g], first[g + 1]):
                        twice = twice or at[q] == e
                    if not twice:
                        best, chosen = load[e] / (copies[e] + 1), e
            if chosen >= 0:
                at[r] = chosen
                copies[chosen] += 1
