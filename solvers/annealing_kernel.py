"""The hot loop of ``annealing``: swaps of two experts, or moves of one to a free slot, under Metropolis' rule.

Shapes: L layers, E experts, G devices, H hosts, R slots of a layer, S samples of load in multiples of LANES.

Costs are read in constant time from two tables that an accepted change updates: ``near[l, g, e]`` (``near_host``) is
how many tokens expert e of layer l exchanges with the experts on device g (host h) of its own and the adjacent layers.
Counts are whole numbers below 2**24, exact in float32, so that the tables never drift.
"""

import math

import numba
import numpy as np

FREE = -1  # a slot without expert
PART = np.uint64(2**21 - 1)
UNIT = 2.0**-53
HOPELESS = 37.0  # times the temperature: no random number of 53 bits accepts more
LANES = 16  # samples are a multiple of this, by empty ones: loops of a known length become vector instructions


@numba.njit(cache=True, nogil=True)
def fill_near(between, placed, near):
    """near: [L, G, E] out; between: [L, 3, E, E] tokens that expert e exchanges with experts of layer l - 1, l, l + 1;
    placed: [L, E] devices (or hosts)."""
    layers, experts = placed.shape
    near[:] = 0
    for layer in range(layers):
        for side in range(3):
            other = layer + side - 1
            if 0 <= other < layers:
                for e in range(experts):
                    for f in range(experts):
                        near[layer, placed[other, f], e] += between[layer, side, e, f]


@numba.njit(cache=True, nogil=True)
def fill_finish(load, placed, inverse_speed, finish):
    """finish: [L, G, S] out, load over speed of each device; load: [L, E, S]; placed: [L, E]; inverse_speed: [G]."""
    finish[:] = 0
    layers, experts, samples = load.shape
    for layer in range(layers):
        for e in range(experts):
            g = placed[layer, e]
            for s in range(samples):
                finish[layer, g, s] += load[layer, e, s] * inverse_speed[g]


@numba.njit(cache=True, nogil=True)
def _random(state):
    """The next 64 bits of xorshift64*; state: [1] uint64, never 0."""
    x = state[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    state[0] = x
    return x * np.uint64(2685821657736338717)


@numba.njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "nnan"})
def walk(
    between,
    near,
    near_host,
    placed,
    slots,
    slot_of,
    device_of_slot,
    host_of,
    load,
    inverse_speed,
    finish,
    counted,
    previous,
    device_cost,
    host_cost,
    price,
    cap,
    hard,
    moved,
    max_moves,
    fixed_hosts,
    warm,
    cold,
    steps,
    state,
):
    """``steps`` proposals while the temperature falls from ``warm`` to ``cold``; all arrays are changed in place.

    placed: [L, E] devices; slots: [L, R] experts or FREE; slot_of: [L, E]; load: [L, E, S], of which finish [L, G, S]
    follows; counted: how many of the samples are real; previous: [L, E] devices that ``moved`` counts changes against.
    price: energy of one unit of a layer's mean hottest finish; cap: the largest sum over layers of it, which ``hard``
    makes a rule. Returns (energy difference of the crossings, moved).
    """
    layers, experts = placed.shape
    room = slots.shape[1]
    devices, chunks = finish.shape[1], finish.shape[2] // LANES
    hottest = np.zeros(layers)  # the mean over samples
    for i in range(layers):
        for s in range(counted):
            hottest[i] += finish[i, :, s].max() / counted
    total = hottest.sum()
    after = np.empty(LANES, np.float32)
    gained = 0.0
    cooling = (cold / warm) ** (1.0 / max(steps, 1))
    temperature = warm
    for _ in range(steps):
        temperature *= cooling
        bits = _random(state)  # 21 of them for each choice
        layer = np.int64((bits >> np.uint64(43)) * np.uint64(layers) >> np.uint64(21))
        a = np.int64((bits >> np.uint64(22) & PART) * np.uint64(experts) >> np.uint64(21))
        target = np.int64((bits & PART) * np.uint64(room) >> np.uint64(21))
        here, there = placed[layer, a], device_of_slot[target]
        if here == there:
            continue
        b = slots[layer, target]
        here_host, there_host = host_of[here], host_of[there]
        if fixed_hosts and here_host != there_host:
            continue

        stays = near[layer, here, a] - near[layer, there, a]
        if b != FREE:
            stays += near[layer, there, b] - near[layer, here, b] + 2 * between[layer, 1, a, b]
        energy = device_cost * stays
        if here_host != there_host:
            stays = near_host[layer, here_host, a] - near_host[layer, there_host, a]
            if b != FREE:
                stays += near_host[layer, there_host, b] - near_host[layer, here_host, b]
                stays += 2 * between[layer, 1, a, b]
            energy += host_cost * stays
        most = energy
        if counted > 0:
            # The hottest device can at best become as cool as the ideal one.
            most -= price * (hottest[layer] - 1.0)
        if most > HOPELESS * temperature:
            continue
        allowed = -temperature * math.log(((_random(state) >> np.uint64(11)) + np.uint64(1)) * UNIT)
        if most > allowed:
            continue

        partner, kept = (b, np.float32(1.0)) if b != FREE else (a, np.float32(0.0))
        change = 0
        if max_moves >= 0:
            change = int(placed[layer, a] == previous[layer, a]) - int(there == previous[layer, a])
            if b != FREE:
                change += int(there == previous[layer, b]) - int(here == previous[layer, b])
            if moved + change > max_moves and change > 0:
                continue

        if counted > 0:
            speed_here, speed_there, now = inverse_speed[here], inverse_speed[there], np.float32(0.0)
            for chunk in range(chunks):
                low = chunk * LANES
                for s in range(LANES):
                    shift = load[layer, a, low + s] - kept * load[layer, partner, low + s]
                    cooler = finish[layer, here, low + s] - shift * speed_here
                    hotter = finish[layer, there, low + s] + shift * speed_there
                    after[s] = max(cooler, hotter)
                for g in range(devices):
                    if g != here and g != there:
                        for s in range(LANES):
                            after[s] = max(after[s], finish[layer, g, low + s])
                for s in range(LANES):
                    now += after[s]
            rise = now / counted - hottest[layer]
            if energy + price * rise > allowed:
                continue
            if hard and rise > 0 and total + rise > cap:
                continue
            total += rise
            hottest[layer] += rise
            for s in range(chunks * LANES):
                shift = load[layer, a, s] - kept * load[layer, partner, s]
                finish[layer, here, s] -= shift * speed_here
                finish[layer, there, s] += shift * speed_there

        gained += energy
        moved += change
        source = slot_of[layer, a]
        slots[layer, source], slots[layer, target] = b, a
        placed[layer, a], slot_of[layer, a] = there, target
        if b != FREE:
            placed[layer, b], slot_of[layer, b] = here, source
        for side in range(3):
            other = layer + side - 1
            if other < 0 or other >= layers:
                continue
            for e in range(experts):
                tokens = between[layer, side, a, e] - kept * between[layer, side, partner, e]
                near[other, here, e] -= tokens
                near[other, there, e] += tokens
            if here_host != there_host:
                for e in range(experts):
                    tokens = between[layer, side, a, e] - kept * between[layer, side, partner, e]
                    near_host[other, here_host, e] -= tokens
                    near_host[other, there_host, e] += tokens
    return gained, moved
