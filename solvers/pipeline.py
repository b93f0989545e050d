"""Clocks of devices that compute while collectives run beside them.

Formulation. All devices execute one program in order, each at its own pace:

    call          takes seconds[g] of the device's processors
    start k       hands collective k over and goes on
    wait k        goes on when collective k has ended on this device

Collectives run one at a time, in the order in which they are started: the next one begins when every device has
started it and the one before has ended on all. After its latency, in which it uses nothing, collective k works for
work[k, g] on device g and takes a part busy[k, g] of what g computes with: while g computes and k works there, both go
at the speed 1 / (1 + busy[k, g]) (progressive filling, Bertsekas and Gallager, Data Networks, section 6.5.2).

Nothing is approximated: time goes from one event (a call or a collective's work or latency ends) to the next.
"""

# B programs of one form, N steps, K collectives, G devices

import numpy as np

from .jit import njit

CALL, START, WAIT = 0, 1, 2
ENDED = 1e-12  # of its seconds: what is left of something that has ended, for rounding
INFINITE = 1e300


def clocks(
    kinds: np.ndarray,
    numbers: np.ndarray,
    seconds: np.ndarray,
    latency: np.ndarray,
    work: np.ndarray,
    busy: np.ndarray,
    begin: np.ndarray,
) -> np.ndarray:
    """[B, N, G] when each device has ended each step, in seconds, from ``begin`` [B, G].

    kinds: [N] of CALL, START and WAIT; numbers: [N] collective of each start and wait, started in the order 0..K-1.
    seconds: [B, N, G] of calls; latency: [B, K]; work, busy: [B, K, G]. All at least 0.
    """
    ends = np.zeros(seconds.shape)
    for b in range(len(seconds)):
        _walk(kinds, numbers, seconds[b], latency[b], work[b], busy[b], begin[b], ends[b])
    return ends


@njit(cache=True, nogil=True)
def _walk(kinds, numbers, seconds, latency, work, busy, begin, ends):
    steps, devices = seconds.shape
    collectives = len(latency)
    at = np.full(devices, -1)  # step of each device; -1: it has not begun
    left = begin.copy()  # of its call
    arrived = np.zeros(collectives, np.int64)
    ended = np.zeros((collectives, devices), np.bool_)
    moving = np.zeros(devices)  # work left of the collective under way
    now, current, opens, finished = 0.0, 0, -1.0, 0  # opens: when its latency ends, -1 where it has not begun
    working = False
    while finished < devices:
        again = True
        while again:  # what takes no time
            again = False
            for g in range(devices):
                while at[g] < steps and left[g] <= 0.0:
                    if at[g] >= 0 and kinds[at[g]] == WAIT and not ended[numbers[at[g]], g]:
                        break
                    if at[g] >= 0:
                        if kinds[at[g]] == START:
                            arrived[numbers[at[g]]] += 1
                        ends[at[g], g] = now
                    at[g] += 1
                    again = True
                    if at[g] == steps:
                        finished += 1
                    elif kinds[at[g]] == CALL:
                        left[g] = seconds[at[g], g]
            if current < collectives and opens < 0.0 and arrived[current] == devices:
                opens, again = now + latency[current], True
            if current < collectives and opens >= 0.0 and not working and opens <= now:
                working, again = True, True
                moving[:] = work[current]
            if working:
                rest = 0
                for g in range(devices):
                    if moving[g] > 0.0:
                        rest += 1
                    elif not ended[current, g]:
                        ended[current, g] = again = True
                if rest == 0:
                    working, opens, again = False, -1.0, True
                    current += 1
        least = INFINITE
        for g in range(devices):
            slow = 1.0
            if left[g] > 0.0 and working and moving[g] > 0.0 and at[g] >= 0:
                slow = 1.0 + busy[current, g]
            if left[g] > 0.0:
                least = min(least, left[g] * slow)
            if working and moving[g] > 0.0:
                least = min(least, moving[g] * slow)
        if opens >= 0.0 and not working:
            least = min(least, opens - now)
        if least >= INFINITE:
            break
        now += least
        if opens >= 0.0 and not working and opens - now <= ENDED * opens:
            opens = now
        for g in range(devices):
            slow, computing = 1.0, left[g] > 0.0
            if computing and working and moving[g] > 0.0 and at[g] >= 0:
                slow = 1.0 + busy[current, g]
            if working and moving[g] > 0.0:
                moving[g] -= least / slow
                if moving[g] <= ENDED * work[current, g]:
                    moving[g] = 0.0
            if computing:
                left[g] -= least / slow
                whole = begin[g] if at[g] < 0 else seconds[at[g], g]
                if left[g] <= ENDED * whole:
                    left[g] = 0.0
