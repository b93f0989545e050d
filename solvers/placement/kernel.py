"""The hot loop of ``annealing``: experts exchange slots under Metropolis' rule.

Three proposals, each of an expert a of some layer:
    exchange   a and what stands in a random slot of its layer, an expert or nothing, change places
    follow     the same, the slot being one of the device where a partner of a stands
    together   where that partner, of another layer, stands on a's device already: both move to the device of a random
               slot, each changing places with what stands there
A partner is an expert drawn in proportion to the tokens that a exchanges with it. Experts with much traffic between
them leave a device only together: one by one, the first step would cost more than a cold search ever accepts.

Shapes: L layers, E experts, G devices, H hosts, R slots of a layer, S samples of load in multiples of LANES. The tables
are explained in ``placement.tables``.
"""

import math

import numpy as np

from ..jit import njit
from .tables import FREE, LANES, PART, PARTNERS, UNIT, random_bits

FOLLOW = 0.5  # of the proposals begin with a partner
HOPELESS = 37.0  # times the temperature: no random number of 53 bits accepts more


@njit(cache=True, nogil=True, inline="always")
def _slot_on(first_slot, device, bits):
    """A random slot of the device, by 21 bits that no other choice of the proposal uses."""
    count = np.uint64(first_slot[device + 1] - first_slot[device])
    return first_slot[device] + np.int64((bits >> np.uint64(8) & PART) * count >> np.uint64(21))


@njit(cache=True, nogil=True, inline="always")
def _lost(near, between, layer, a, b, here, there):
    """Tokens that no longer stay on one device (or host) when expert a goes there from here, and b back or FREE."""
    lost = near[layer, here, a] - near[layer, there, a]
    if b != FREE:
        lost += near[layer, there, b] - near[layer, here, b] + 2 * between[layer, 1, a, b]
    return lost


@njit(cache=True, nogil=True, inline="always")
def _both(between, layer, a, b, other, f, d):
    """What the sum of two ``_lost`` of different layers counts wrong: the pairs of which both experts change places."""
    side = other - layer + 1
    extra = -2 * between[layer, side, a, f]
    if d != FREE:
        extra += 2 * between[layer, side, a, d]
    if b != FREE:
        extra += 2 * between[layer, side, b, f]
    if b != FREE and d != FREE:
        extra -= 2 * between[layer, side, b, d]
    return extra


@njit(cache=True, nogil=True, inline="always", fastmath={"reassoc", "nsz", "nnan"})
def _hottest(load, finish, inverse_speed, counted, after, layer, a, b, here, there):
    """Mean over samples of the layer's hottest finish, once a is there and b here; after: [LANES] scratch."""
    partner, kept = (b, np.float32(1.0)) if b != FREE else (a, np.float32(0.0))
    devices, chunks = finish.shape[1], finish.shape[2] // LANES
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
    return now / counted


@njit(cache=True, nogil=True, inline="always")
def _changes(placed, previous, layer, a, b, here, there):
    """How many more experts are elsewhere than before, once a is there and b here."""
    more = int(here == previous[layer, a]) - int(there == previous[layer, a])
    if b != FREE:
        more += int(there == previous[layer, b]) - int(here == previous[layer, b])
    return more


@njit(cache=True, nogil=True, inline="always", fastmath={"reassoc", "nsz", "nnan"})
def _exchange(tables, layer, a, b, here, there, target):
    """Expert a goes to slot ``target`` there, and b, or nothing, to its old one; all tables follow."""
    between, near, near_host = tables.between, tables.near, tables.near_host
    placed, slots, slot_of, host_of = tables.placed, tables.slots, tables.slot_of, tables.host_of
    load, inverse_speed, finish = tables.load, tables.inverse_speed, tables.finish
    layers, experts = placed.shape
    partner, kept = (b, np.float32(1.0)) if b != FREE else (a, np.float32(0.0))
    if tables.counted > 0:
        for s in range(finish.shape[2]):
            shift = load[layer, a, s] - kept * load[layer, partner, s]
            finish[layer, here, s] -= shift * inverse_speed[here]
            finish[layer, there, s] += shift * inverse_speed[there]
    source = slot_of[layer, a]
    slots[layer, source], slots[layer, target] = b, a
    placed[layer, a], slot_of[layer, a] = there, target
    if b != FREE:
        placed[layer, b], slot_of[layer, b] = here, source
    here_host, there_host = host_of[here], host_of[there]
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


# Without ``_nrt``, numba's memory management, references to arrays are not counted at every step, which takes time; so
# nothing here may allocate an array.
@njit(cache=True, nogil=True, _nrt=False, fastmath={"reassoc", "nsz", "nnan"})  # type: ignore[call-overload]
def walk(tables, rules, moved, warm, cold, steps, state):
    """``steps`` proposals while the temperature falls from ``warm`` to ``cold``; the tables are changed in place.

    moved: how many experts are not where ``tables.previous`` has them; state: [1] of the random numbers. Returns (the
    energy that the crossings gained, moved).
    """
    # Names of their own: arrays that are taken out of a tuple again and again are slower.
    between, near, near_host, partners = tables.between, tables.near, tables.near_host, tables.partners
    placed, slots, first_slot, device_of_slot = tables.placed, tables.slots, tables.first_slot, tables.device_of_slot
    load, inverse_speed, finish, counted = tables.load, tables.inverse_speed, tables.finish, tables.counted
    hottest, after = tables.hottest, tables.after
    previous, host_of = tables.previous, tables.host_of
    device_cost, host_cost, price, max_moves = rules.device_cost, rules.host_cost, rules.price, rules.max_moves
    fixed_hosts, hard, cap = rules.fixed_hosts, rules.hard, rules.cap
    layers, experts = placed.shape
    count = slots.shape[1]
    total = 0.0
    for i in range(layers):
        hottest[i] = 0.0
        for s in range(counted):
            most_busy = finish[i, 0, s]
            for g in range(1, finish.shape[1]):
                most_busy = max(most_busy, finish[i, g, s])
            hottest[i] += most_busy / counted
        total += hottest[i]
    gained = 0.0
    cooling = (cold / warm) ** (1.0 / max(steps, 1))
    temperature = warm
    for _ in range(steps):
        temperature *= cooling
        bits = random_bits(state)  # 21 of them for each choice
        layer = np.int64((bits >> np.uint64(43)) * np.uint64(layers) >> np.uint64(21))
        a = np.int64((bits >> np.uint64(22) & PART) * np.uint64(experts) >> np.uint64(21))
        target = np.int64((bits & PART) * np.uint64(count) >> np.uint64(21))
        here = placed[layer, a]
        bits = random_bits(state)
        other, f = np.int64(-1), np.int64(0)  # the layer of a partner that moves as well, and the partner
        if (bits >> np.uint64(40)) * 2.0**-24 < FOLLOW:
            partner = partners[layer, a, np.int64(bits & np.uint64(PARTNERS - 1))]
            if partner >= 0:
                with_layer, f = layer + np.int64(partner // experts) - 1, np.int64(partner % experts)
                g = placed[with_layer, f]
                if g != here:
                    target = _slot_on(first_slot, g, bits)
                elif with_layer != layer:
                    other = with_layer
        there = device_of_slot[target]
        if here == there:
            continue
        here_host, there_host = host_of[here], host_of[there]
        if fixed_hosts and here_host != there_host:
            continue

        b, d, second = slots[layer, target], FREE, np.int64(0)
        lost = _lost(near, between, layer, a, b, here, there)
        if other >= 0:
            second = _slot_on(first_slot, there, bits)
            d = slots[other, second]
            lost += _lost(near, between, other, f, d, here, there) + _both(between, layer, a, b, other, f, d)
        energy = device_cost * lost
        if here_host != there_host:
            lost = _lost(near_host, between, layer, a, b, here_host, there_host)
            if other >= 0:
                lost += _lost(near_host, between, other, f, d, here_host, there_host)
                lost += _both(between, layer, a, b, other, f, d)
            energy += host_cost * lost
        most = energy
        if counted > 0:
            # The hottest device can at best become as cool as the ideal one.
            most -= price * (hottest[layer] - 1.0)
            if other >= 0:
                most -= price * (hottest[other] - 1.0)
        if most > HOPELESS * temperature:
            continue
        allowed = -temperature * math.log(((random_bits(state) >> np.uint64(11)) + np.uint64(1)) * UNIT)
        if most > allowed:
            continue

        change = 0
        if max_moves >= 0:
            change = _changes(placed, previous, layer, a, b, here, there)
            if other >= 0:
                change += _changes(placed, previous, other, f, d, here, there)
            if moved + change > max_moves and change > 0:
                continue

        if counted > 0:
            rise, second_rise = -hottest[layer], 0.0
            rise += _hottest(load, finish, inverse_speed, counted, after, layer, a, b, here, there)
            if other >= 0:
                second_rise = -hottest[other]
                second_rise += _hottest(load, finish, inverse_speed, counted, after, other, f, d, here, there)
            both = rise + second_rise
            if energy + price * both > allowed:
                continue
            if hard and both > 0 and total + both > cap:
                continue
            total += both
            hottest[layer] += rise
            if other >= 0:
                hottest[other] += second_rise

        gained += energy
        moved += change
        for turn in range(1 if other < 0 else 2):
            if turn == 1:
                layer, a, b, target = other, f, d, second
            _exchange(tables, layer, a, b, here, there, target)
    return gained, moved
