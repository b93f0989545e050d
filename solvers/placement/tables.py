"""The tables that ``placement.kernel`` reads costs from in constant time, and its random numbers.

    near[l, g, e]       tokens that expert e of layer l exchanges with the experts on device g of its own and the
                        adjacent layers (``near_host``: on the hosts)
    finish[l, g, s]     load of device g over its speed in sample s
    partners[l, e, i]   experts drawn in proportion to the tokens that e exchanges with them
    flows[l, g, k]      tokens from device g in layer l to device k in layer l + 1

Counts are whole numbers below 2**24, exact in float32, so that tables that follow every change never drift.
"""

# L layers, E experts, G devices, S samples in multiples of LANES

from typing import NamedTuple

import numpy as np

from ..jit import njit

FREE = -1  # a slot without expert
PARTNERS = 64  # drawn for every expert; a power of two
LANES = 16  # samples are a multiple of this, by empty ones: loops of a known length become vector instructions
PART = np.uint64(2**21 - 1)
UNIT = 2.0**-53


class Tables(NamedTuple):
    """What a walk reads and changes; the fields before ``placed`` are the problem, the rest follows it.

    between: [L, 3, E, E] tokens, float32; partners: [L, E, PARTNERS]; previous: [L, E] devices, which moves are counted
    against; load: [L, E, S] over the ideal, of which ``counted`` samples are real; inverse_speed: [G]; host_of: [G];
    first_slot: [G + 1]; device_of_slot: [R].
    placed: [L, E] devices; slots: [L, R] experts or FREE; slot_of: [L, E]; near: [L, G, E]; near_host: [L, H, E];
    finish: [L, G, S]. For a walk to fill: hottest [L], mean over samples of a layer's hottest finish; after [LANES].
    """

    between: np.ndarray
    partners: np.ndarray
    previous: np.ndarray
    load: np.ndarray
    counted: int
    inverse_speed: np.ndarray
    host_of: np.ndarray
    first_slot: np.ndarray
    device_of_slot: np.ndarray
    placed: np.ndarray
    slots: np.ndarray
    slot_of: np.ndarray
    near: np.ndarray
    near_host: np.ndarray
    finish: np.ndarray
    hottest: np.ndarray
    after: np.ndarray


class Rules(NamedTuple):
    """What a move costs, and what it may not break.

    device_cost, host_cost: energy of a token between devices, and between hosts besides; price: of one unit of a
    layer's mean hottest finish; cap: the largest sum over layers of it, which ``hard`` makes a rule; max_moves: -1 for
    no limit; fixed_hosts: experts stay on their hosts.
    """

    device_cost: float
    host_cost: float
    price: float
    cap: float
    hard: bool
    max_moves: int
    fixed_hosts: bool


@njit(cache=True, nogil=True)
def random_bits(state):
    """The next 64 bits of xorshift64*; state: [1] uint64, never 0."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(2685821657736338717)


@njit(cache=True, nogil=True)
def fill_near(between, placed, near, stale):
    """near: [L, G, E] out, for the layers that are stale [L]; between: [L, 3, E, E] tokens that expert e exchanges with
    experts of layer l - 1, l, l + 1; placed: [L, E] devices (or hosts)."""
    layers, experts = placed.shape
    for layer in range(layers):
        if not stale[layer]:
            continue
        near[layer] = 0
        for side in range(3):
            other = layer + side - 1
            if 0 <= other < layers:
                for f in range(experts):
                    there = near[layer, placed[other, f]]
                    row = between[other, 2 - side, f]
                    for e in range(experts):
                        there[e] += row[e]


@njit(cache=True, nogil=True)
def fill_finish(load, placed, inverse_speed, finish):
    """finish: [L, G, S] out, load over speed of each device; load: [L, E, S]; placed: [L, E]; inverse_speed: [G]."""
    finish[:] = 0
    layers, experts, samples = load.shape
    for layer in range(layers):
        for e in range(experts):
            g = placed[layer, e]
            for s in range(samples):
                finish[layer, g, s] += load[layer, e, s] * inverse_speed[g]


@njit(cache=True, nogil=True)
def fill_partners(between, partners):
    """partners: [L, E, PARTNERS] out, side * E + f for expert f of layer l - 1 + side; -1 where there is no traffic."""
    layers, experts = partners.shape[:2]
    for layer in range(layers):
        for e in range(experts):
            partners[layer, e] = -1
            every = between[layer, :, e].sum()
            if every <= 0:
                continue
            seen, drawn = 0.0, 0
            for side in range(3):
                for f in range(experts):
                    seen += between[layer, side, e, f]
                    while drawn < PARTNERS and (drawn + 0.5) * every <= seen * PARTNERS:
                        partners[layer, e, drawn] = side * experts + f
                        drawn += 1


@njit(cache=True, nogil=True)
def fill_flows(between, placed, flows):
    """flows: [L-1, G, G] out."""
    layers, experts = placed.shape
    flows[:] = 0
    for layer in range(layers - 1):
        for e in range(experts):
            for f in range(experts):
                flows[layer, placed[layer, e], placed[layer + 1, f]] += between[layer, 2, e, f]
