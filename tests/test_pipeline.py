"""Compiled clocks of collectives on lanes against the event simulation, on programs drawn at random."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.simulator import Operation, simulate
from moeplan.solvers.pipeline import CALL, START, WAIT, clocks

seconds = st.one_of(st.just(0.0), st.floats(0.01, 5.0))


@st.composite
def programs(draw):
    """Two lanes: all devices share the first, and those of a group the second; every collective once started."""
    devices, count = draw(st.integers(1, 4)), draw(st.integers(1, 6))

    def grouped():
        return draw(st.lists(st.integers(0, devices - 1), min_size=devices, max_size=devices))

    def table(values, *shape):
        flat = draw(st.lists(values, min_size=int(np.prod(shape)), max_size=int(np.prod(shape))))
        return np.array(flat, float).reshape(shape)

    lane = np.array(draw(st.lists(st.integers(0, 1), min_size=count, max_size=count)))
    sharing = np.array([[0] * devices, grouped()])
    across = grouped()
    group = np.array([across if on == 0 else sharing[1] for on in lane])
    steps = []
    under_way, left = [], list(range(count))
    while left or under_way:
        kind = draw(st.sampled_from([CALL, START, WAIT]))
        if kind == START and left:
            under_way.append(left.pop(0))
            steps.append((START, under_way[-1]))
        elif kind == WAIT and under_way:
            steps.append((WAIT, under_way.pop(draw(st.integers(0, len(under_way) - 1)))))
        elif len(steps) < 30:
            steps.append((CALL, 0))
        elif left:
            under_way.append(left.pop(0))
            steps.append((START, under_way[-1]))
        else:
            steps.append((WAIT, under_way.pop()))
    kinds, numbers = map(np.array, zip(*steps, strict=True))
    calls = table(seconds, len(steps), devices) * (kinds == CALL)[:, None]
    latency = np.repeat(table(seconds, count, 1), devices, axis=1)
    busy = table(st.sampled_from([0.0, 0.2, 0.7, 1.0]), count, devices)
    begin = table(seconds, devices)
    return kinds, numbers, calls, lane, group, sharing, latency, table(seconds, count, devices), busy, begin


def simulated(kinds, numbers, calls, lane, group, sharing, latency, work, busy, begin):
    """[N, G] ends of the steps, by the event simulation."""
    devices = len(begin)
    operations, chain, ends, transfers = [], [], np.zeros(calls.shape), {}

    def add(device, duration, after, demands=None, waits=0.0):
        operations.append(Operation("op", "expert", device, 0, duration, demands or {}, after, waits))
        return len(operations) - 1

    chain = [add(g, begin[g], ()) for g in range(devices)]
    found, last = {}, {}
    for step, (kind, k) in enumerate(zip(kinds, numbers, strict=True)):
        if kind == START:
            come, before = list(chain), dict(last)
            for g in range(devices):
                members = [m for m in range(devices) if group[k, m] == group[k, g]]
                sharers = [m for m in range(devices) if sharing[lane[k], m] == sharing[lane[k], g]]
                after = [come[m] for m in members]
                after += [before[lane[k], m] for m in sharers if (lane[k], m) in before]
                demands = {f"compute {g}": busy[k, g]} if busy[k, g] else {}
                whole = latency[k, g] + work[k, g]
                transfers[k, g] = last[lane[k], g] = add(g, whole, tuple(after), demands, latency[k, g])
        for g in range(devices):
            if kind == CALL:
                chain[g] = add(g, calls[step, g], (chain[g],), {f"compute {g}": 1.0})
            elif kind == WAIT:
                chain[g] = add(g, 0.0, (chain[g], transfers[k, g]))
            found[step, g] = chain[g]
    timeline = simulate(operations)
    for (step, g), operation in found.items():
        ends[step, g] = timeline.end[operation]
    return ends


@given(programs())
@settings(deadline=None, max_examples=200)
def test_clocks_are_those_of_the_simulation(program):
    kinds, numbers, calls, lane, group, sharing, *rest = program
    got = clocks(kinds, numbers, calls[None], lane, group, sharing, *(values[None] for values in rest))[0]
    assert got == pytest.approx(simulated(*program), rel=1e-9, abs=1e-12)


def test_two_lanes_and_a_call_by_hand():
    """A call of 2 s beside transfers that each take half of the device: all at half speed, then at their own."""
    kinds, numbers = np.array([START, START, CALL, WAIT, WAIT]), np.array([0, 1, 0, 0, 1])
    calls = np.array([[[0.0], [0.0], [2.0], [0.0], [0.0]]])
    one = np.zeros((1, 2, 1))
    arguments = np.array([0, 1]), np.zeros((2, 1), int), np.zeros((2, 1), int)
    busy, begin = np.full((1, 2, 1), 0.5), np.zeros((1, 1))
    ends = clocks(kinds, numbers, calls, *arguments, one, one + 1.0, busy, begin)
    assert ends[0, :, 0].tolist() == pytest.approx([0.0, 0.0, 3.0, 3.0, 3.0])


def test_one_lane_goes_in_turn_by_hand():
    """Two devices whose groups exchange by themselves: where they share the lane, the second waits for both."""
    kinds, numbers = np.array([START, START, WAIT, WAIT]), np.array([0, 1, 0, 1])
    calls, none = np.zeros((1, 4, 2)), np.zeros((1, 2, 2))
    work, begin = np.array([[[1.0, 3.0], [1.0, 1.0]]]), np.zeros((1, 2))
    alone = np.array([[0, 1], [0, 1]])
    for sharing, wanted in (([[0, 0]], [[1.0, 3.0], [4.0, 4.0]]), ([[0, 1]], [[1.0, 3.0], [2.0, 4.0]])):
        ends = clocks(kinds, numbers, calls, np.zeros(2, int), alone, np.array(sharing), none, work, none, begin)
        assert ends[0, 2:].tolist() == wanted
