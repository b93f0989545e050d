"""The event simulator against closed forms and bounds."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.simulator import Operation, fill, simulate


def op(seconds, demands=None, after=(), latency=0.0, device=0):
    return Operation("op", "expert", device, 0, seconds, demands or {}, after, latency)


def test_operations_that_wait_for_each_other_add_up():
    timeline = simulate([op(1.0), op(2.0, after=(0,)), op(0.5, after=(1,))])
    assert timeline.start == [0.0, 1.0, 3.0]
    assert timeline.end == [1.0, 3.0, 3.5]


def test_independent_operations_overlap():
    assert simulate([op(1.0, {"a": 1.0}), op(2.0, {"b": 1.0})]).makespan == 2.0


def test_nothing_takes_no_time():
    assert simulate([]).makespan == 0.0
    assert simulate([op(0.0), op(0.0, after=(0,))]).end == [0.0, 0.0]


def test_two_flows_share_an_uplink():
    """Each asks for all of it: both at half speed until the shorter has ended, then the longer alone."""
    timeline = simulate([op(1.0, {"uplink": 1.0}), op(3.0, {"uplink": 1.0})])
    assert timeline.end == pytest.approx([2.0, 4.0])


def test_flows_that_fit_together_are_not_slowed():
    assert simulate([op(1.0, {"uplink": 0.5}), op(1.0, {"uplink": 0.5})]).end == [1.0, 1.0]


def test_unequal_demands_are_slowed_by_the_same_factor():
    """Relative speeds are levelled: 1.0 and 0.25 of a capacity together run at 1 / 1.25."""
    timeline = simulate([op(1.0, {"uplink": 1.0}), op(1.0, {"uplink": 0.25})])
    assert timeline.end == pytest.approx([1.25, 1.25])


def test_compute_loses_the_processor_time_of_a_transfer():
    """A transfer of 2 s that keeps 20 % of the processor busy beside 1 s of compute: speeds 1 / 1.2 until that ends."""
    timeline = simulate([op(1.0, {"compute": 1.0}), op(2.0, {"compute": 0.2, "link": 1.0})])
    assert timeline.end == pytest.approx([1.2, 2.2])


def test_a_frozen_operation_leaves_the_rest_to_others():
    """Three flows: a and b fill link one; c shares link two with b and takes what b, frozen at 1/2, leaves."""
    speed = fill({0: {"one": 1.0}, 1: {"one": 1.0, "two": 0.5}, 2: {"two": 1.0}})
    assert speed == pytest.approx({0: 0.5, 1: 0.5, 2: 0.75})


@pytest.mark.parametrize(
    ("others", "begin"), [([1.0, 1.0], 3.0), ([1.0, 2.5], 3.0), ([1.0, 7.0], 7.0), ([4.0, 1.0], 4.0)]
)
@pytest.mark.parametrize("latency", [0.0, 0.5])
def test_those_who_come_together_begin_late(others, begin, latency):
    late = replace(op(1.5, {"link": 1.0}, after=(0, 1), latency=latency), level=2.0)
    timeline = simulate([op(seconds, device=i) for i, seconds in enumerate(others)] + [late])
    assert timeline.start[2] == pytest.approx(begin)
    assert timeline.end[2] == pytest.approx(begin + 1.5)


def test_latency_uses_no_resource():
    timeline = simulate([op(1.0, {"link": 1.0}), op(1.0, {"link": 1.0}, latency=0.5)])
    # 0.5 alone, then both at half speed: 0.5 left of each takes 1.0.
    assert timeline.end == pytest.approx([1.5, 1.5])


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: op(float("nan")), "no duration"),
        (lambda: op(-1.0), "no duration"),
        (lambda: op(1.0, latency=2.0), "no duration"),
        (lambda: op(1.0, {"a": 1.5}), "not a fraction"),
        (lambda: simulate([op(1.0, after=(0,))]), "must come after"),
        (lambda: simulate([op(1.0, after=(1,)), op(1.0)]), "must come after"),
    ],
)
def test_malformed_operations_are_refused(make, named):
    with pytest.raises(ValueError, match=named):
        make()


@st.composite
def graphs(draw):
    operations = []
    for i in range(draw(st.integers(1, 14))):
        after = draw(st.sets(st.integers(0, i - 1), max_size=3)) if i else set()
        demands = draw(st.dictionaries(st.sampled_from("abc"), st.floats(0.05, 1.0), max_size=3))
        seconds = draw(st.just(0.0) | st.floats(1e-6, 5.0))
        latency = seconds * draw(st.sampled_from([0.0, 0.0, 0.3, 1.0]))
        operations.append(op(seconds, demands, tuple(sorted(after)), latency))
    return operations


@given(graphs())
@settings(deadline=None)
def test_makespan_lies_between_its_bounds(operations):
    timeline = simulate(operations)
    slack = 1e-6
    finish = []  # with nothing slowed
    for o in operations:
        finish.append(max((finish[j] for j in o.after), default=0.0) + o.seconds)
    assert timeline.makespan >= max(finish) * (1 - slack)
    for resource in "abc":
        work = sum((o.seconds - o.latency) * o.demands.get(resource, 0.0) for o in operations)
        assert timeline.makespan >= work * (1 - slack)
    assert timeline.makespan <= sum(o.seconds for o in operations) * (1 + slack)
    for i, o in enumerate(operations):
        assert timeline.end[i] - timeline.start[i] >= o.seconds * (1 - slack)
        assert all(timeline.start[i] >= timeline.end[j] * (1 - slack) for j in o.after)


@given(
    st.dictionaries(
        st.integers(0, 7), st.dictionaries(st.sampled_from("abcd"), st.floats(0.05, 1.0), max_size=4), min_size=1
    )
)
@settings(deadline=None)
def test_speeds_are_max_min_fair(demands):
    """Feasible, and work-conserving: who is not at full speed uses a full resource at which nobody is faster."""
    speed = fill(demands)
    used = {r: sum(speed[i] * d.get(r, 0.0) for i, d in demands.items()) for r in "abcd"}
    assert max(used.values()) <= 1 + 1e-9
    for i, wanted in demands.items():
        assert 0 < speed[i] <= 1
        if speed[i] < 1 - 1e-9:
            full = [r for r in wanted if used[r] > 1 - 1e-9]
            fastest = [max(speed[j] for j, d in demands.items() if r in d) for r in full]
            assert any(speed[i] >= best - 1e-9 for best in fastest)


def test_a_few_thousand_operations_are_quick():
    chain = [
        op(1e-3, {f"compute {d}": 1.0}, (i - 8,) if i >= 8 else (), device=d) for i, d in enumerate([*range(8)] * 500)
    ]
    assert simulate(chain).makespan == pytest.approx(0.5)
