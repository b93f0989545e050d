"""Clocks of devices that compute while collectives run beside them.

Formulation. All devices execute one program in order, each at its own pace:

    call          takes seconds[g] of the device's processors
    start k       hands collective k over and goes on
    wait k        goes on when collective k has ended on this device

Every collective has groups of devices, which exchange by themselves, and a lane. A group begins when all its members
have started the collective, and the one before it on the lane has ended on all devices that share the lane with it, in
the order in which they are started. Lanes go on beside each other. After its latency, in which it uses nothing,
collective k works for work[k, g] on device g and takes a part busy[k, g] of what g computes with. All that runs on g
and takes a part, its call and one transfer of each lane, goes at the speed 1 / max(1, load), where a call counts 1 and
a transfer its busy[k, g] (progressive filling, Bertsekas and Gallager, Data Networks, section 6.5.2).

Nothing is approximated: time goes from one event (a call or a collective's work or latency ends) to the next.
"""

# B programs of one form, N steps, K collectives, L lanes, G devices

import numpy as np

from .jit import njit

CALL, START, WAIT = 0, 1, 2
COMING, OPENING, WORKING, ENDED = 0, 1, 2, 3  # a device and the collective whose turn it is on a lane
LEFT = 1e-12  # of its seconds: what is left of something that has ended, for rounding
FULL = 1.0 + 1e-9  # of a device's processors, for sums of rounded parts
INFINITE = 1e300


def clocks(
    kinds: np.ndarray,
    numbers: np.ndarray,
    seconds: np.ndarray,
    lane: np.ndarray,
    group: np.ndarray,
    sharing: np.ndarray,
    latency: np.ndarray,
    work: np.ndarray,
    busy: np.ndarray,
    begin: np.ndarray,
) -> np.ndarray:
    """[B, N, G] when each device has ended each step, in seconds, from ``begin`` [B, G].

    kinds: [N] of CALL, START and WAIT; numbers: [N] collective of each start and wait, started in the order 0..K-1.
    lane: [K] of 0..L-1; group: [K, G] number of each device's group; sharing: [L, G], devices with one number share the
    lane: all members of a group. seconds: [B, N, G] of calls; latency, work, busy: [B, K, G]. All at least 0.
    """
    ends = np.zeros(seconds.shape)
    lines = np.full((len(sharing), len(lane) + 1), -1)  # collectives of each lane in their order, then -1
    for at, own in enumerate(lines):
        mine = np.flatnonzero(lane == at)
        own[: len(mine)] = mine
    for b in range(len(seconds)):
        _walk(kinds, numbers, seconds[b], lines, group, sharing, latency[b], work[b], busy[b], begin[b], ends[b])
    return ends


@njit(cache=True, nogil=True)
def _sizes(parts):
    """[rows, numbers] how many devices have each number in each row of [rows, G]."""
    found = np.zeros((len(parts), parts.max() + 1), np.int64)
    for row in range(len(parts)):
        for part in parts[row]:
            found[row, part] += 1
    return found


@njit(cache=True, nogil=True)
def _take_turns(now, group, members, arrived, latency, work, line, sharing, sharers, turn, done, state, opens, moving):
    """What takes no time on one lane; whether anything did."""
    changed = False
    for g in range(len(state)):
        k = line[turn[sharing[g]]]
        if k < 0:
            continue
        if state[g] == COMING and arrived[k, group[k, g]] == members[k, group[k, g]]:
            state[g], opens[g], changed = OPENING, now + latency[k, g], True
        if state[g] == OPENING and opens[g] <= now:
            state[g], moving[g], changed = WORKING, work[k, g], True
        if state[g] == WORKING and moving[g] <= 0.0:
            state[g], changed = ENDED, True
            done[sharing[g]] += 1
    for part in range(len(sharers)):
        if sharers[part] > 0 and done[part] == sharers[part]:
            turn[part], done[part], changed = turn[part] + 1, 0, True
            for g in range(len(state)):
                if sharing[g] == part:
                    state[g] = COMING
    return changed


@njit(cache=True, nogil=True)
def _walk(kinds, numbers, seconds, lines, group, sharing, latency, work, busy, begin, ends):
    steps, devices = seconds.shape
    lanes = len(lines)
    members, sharers = _sizes(group), _sizes(sharing)
    arrived = np.zeros(members.shape, np.int64)
    turn, done = np.zeros(sharers.shape, np.int64), np.zeros(sharers.shape, np.int64)
    state = np.zeros((lanes, devices), np.int64)
    opens, moving = np.zeros((lanes, devices)), np.zeros((lanes, devices))  # when its latency ends; work left
    place = np.zeros(len(group), np.int64)  # of each collective in its line
    home = np.zeros(len(group), np.int64)  # its lane
    for on in range(lanes):
        for i in range(lines.shape[1]):
            if lines[on, i] >= 0:
                place[lines[on, i]], home[lines[on, i]] = i, on
    at = np.full(devices, -1)  # step of each device; -1: it has not begun
    left = begin.copy()  # of its call
    load, taken = np.ones(devices), np.zeros((lanes, devices))  # of a device's processors, and by a transfer
    now, finished = 0.0, 0
    while finished < devices:
        again = True
        while again:  # what takes no time
            again = False
            for g in range(devices):
                while at[g] < steps and left[g] <= 0.0:
                    if at[g] >= 0 and kinds[at[g]] == WAIT:
                        k = numbers[at[g]]
                        on = home[k]
                        reached = turn[on, sharing[on, g]]
                        if reached < place[k] or (reached == place[k] and state[on, g] != ENDED):
                            break
                    if at[g] >= 0:
                        if kinds[at[g]] == START:
                            arrived[numbers[at[g]], group[numbers[at[g]], g]] += 1
                        ends[at[g], g] = now
                    at[g] += 1
                    again = True
                    if at[g] == steps:
                        finished += 1
                    elif kinds[at[g]] == CALL:
                        left[g] = seconds[at[g], g]
            for on in range(lanes):
                own = lines[on], sharing[on], sharers[on], turn[on], done[on], state[on], opens[on], moving[on]
                if _take_turns(now, group, members, arrived, latency, work, *own):
                    again = True
        for g in range(devices):
            load[g] = 1.0 if left[g] > 0.0 and at[g] >= 0 else 0.0
            for on in range(lanes):
                taken[on, g] = 0.0
                if state[on, g] == WORKING:
                    taken[on, g] = busy[lines[on, turn[on, sharing[on, g]]], g]
                    load[g] += taken[on, g]
            load[g] = load[g] if load[g] > FULL else 1.0
        least = INFINITE
        for g in range(devices):
            if left[g] > 0.0:
                least = min(least, left[g] * (load[g] if at[g] >= 0 else 1.0))
            for on in range(lanes):
                if state[on, g] == WORKING:
                    least = min(least, moving[on, g] * (load[g] if taken[on, g] > 0.0 else 1.0))
                elif state[on, g] == OPENING:
                    least = min(least, opens[on, g] - now)
        if least >= INFINITE:
            break
        now += least
        for g in range(devices):
            for on in range(lanes):
                if state[on, g] == WORKING:
                    moving[on, g] -= least / (load[g] if taken[on, g] > 0.0 else 1.0)
                    if moving[on, g] <= LEFT * work[lines[on, turn[on, sharing[on, g]]], g]:
                        moving[on, g] = 0.0
                elif state[on, g] == OPENING and opens[on, g] - now <= LEFT * opens[on, g]:
                    opens[on, g] = now
            if left[g] > 0.0:
                left[g] -= least / (load[g] if at[g] >= 0 else 1.0)
                whole = begin[g] if at[g] < 0 else seconds[at[g], g]
                if left[g] <= LEFT * whole:
                    left[g] = 0.0
