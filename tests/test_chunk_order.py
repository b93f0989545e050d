"""The order in which chunks travel: CP-SAT proves that no other is faster on one network, so that only their number is
to choose, and how much faster another may be in two levels, on three streams."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.clock import run
from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.step import Step
from moeplan.planner.strategies import ep, hierarchical
from moeplan.spec import Workload
from moeplan.spec.chunk_order import calls
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.plans import even_slots
from moeplan.tests.synthetic import cluster, tiny_model
from moeplan.tests.yardsticks.chunk_order import LEVELS, best_makespan, every_order, played

durations = st.lists(st.integers(1, 9), min_size=1, max_size=5)


def in_the_runtime_s_order(dispatch, compute, combine) -> int:
    """All chunks are dispatched, in turn; each is computed as it comes; each travels back when it is computed and the
    network has done what was begun before."""
    there, free, done, back = 0, sum(dispatch), 0, 0
    for d, x, c in zip(dispatch, compute, combine, strict=True):
        there += d
        done = max(done, there) + x
        back = max(back, done, free) + c
    return back


@given(st.data(), durations)
@settings(max_examples=150, deadline=None)
def test_no_order_of_chunks_is_faster(data, dispatch):
    """Of chunks that are alike, as ``spec.layout.even`` makes them: then it does not matter which one comes first."""
    count = len(dispatch)
    d, x, c = (data.draw(st.integers(0, 9)) for _ in range(3))
    alike = [d] * count, [x] * count, [c] * count
    assert in_the_runtime_s_order(*alike) == best_makespan(*alike)
    # Of unlike chunks the order of their numbers may be worse; the bound that no order beats still holds.
    unlike = [data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)) for _ in range(3)]
    assert in_the_runtime_s_order(*unlike) >= best_makespan(*unlike)


def test_the_predicted_chunks_are_in_the_best_order():
    """What the planner predicts for r chunks is CP-SAT's optimum for the durations that it reads, for every r; so
    enumerating r finds what choosing order and r together would."""
    model, unit = tiny_model(layers=1, hidden=256, ffn=512), 1e-8
    machines = cluster(model, ((1.0,), (1.0,)), uplink=3e8, busy=0.0)
    workload = Workload.from_text("prefill:2048@32")
    step = Step(
        Costs(machines, model, "f32"), model, Layout.of(workload, 1, (32, 32)), draw_routing(None, model, workload, 0)
    )
    layer, found = step.layer([0]), {}
    for count in (1, 2, 4, 8):
        plan = LayerPlan(strategy="ep", slots=even_slots(8, 2), chunks=count)
        starts, computed, ends = ep.flight(layer, [plan])
        predicted = run(step.costs, [*starts, *computed, *ends], np.zeros((1, 2))).max()
        sums = sum(float(stage.seconds.max()) for stage in ends if stage.kind == "compute")
        slowest = [
            [float(stage.seconds.max()) for stage in stages if stage.kind == "start"] for stages in (starts, computed)
        ]
        calls = (
            np.array([stage.seconds.max() for stage in computed if stage.kind == "compute"]).reshape(count, -1).sum(1)
        )
        best = best_makespan(
            *(np.round(np.array(part) / unit).astype(int).tolist() for part in (slowest[0], calls, slowest[1]))
        )
        # The sums of what came back follow the last way home, or hide behind it.
        assert best * unit <= predicted * (1 + 1e-3)
        assert predicted <= best * unit + sums + 1e-5
        found[count] = predicted, best
    assert min(found, key=lambda r: found[r][0]) == min(found, key=lambda r: found[r][1])


def in_levels(numbers):
    """Durations of a chunk in two levels: there and back alike across hosts, and alike inside them."""
    across, inside, experts, relay = numbers
    return across, relay, inside, experts, inside, relay, across


@given(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.integers(0, 1)), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_how_far_the_order_in_two_levels_is_from_the_best(numbers, count):
    """Of chunks that are alike: no order beats CP-SAT's optimum; the runtime's takes at most half as long again in two
    chunks, a third in three. Of all durations drawn here these are the worst."""
    steps = in_levels(numbers)
    best = best_makespan(*([step] * count for step in steps), streams=LEVELS)
    fixed = played(calls(count), lambda chunk: steps)
    assert best <= min(played(order, lambda chunk: steps) for order in every_order(count)) <= fixed
    assert fixed <= {1: 1.0, 2: 1.5, 3: 4 / 3, 4: 1.3}[count] * best + 1e-9


@given(st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 9), st.just(0)), st.integers(3, 6))
@settings(max_examples=60, deadline=None)
def test_where_one_stream_limits_the_order_is_the_best(numbers, count):
    """Of three chunks or more whose one stream takes longer than the other two together, to the ends of the first and
    last chunk: that stream does not wait in between."""
    across, inside, experts, _ = numbers
    steps = in_levels(numbers)
    streams = [2 * across, 2 * inside, experts]
    longest = max(streams)
    alone = sum(steps) - longest  # of one chunk, what the others do
    assert played(calls(count), lambda chunk: steps) <= count * longest + alone + max(steps)


def test_the_predicted_order_of_two_levels_is_that_of_the_streams():
    """Hosts and devices that are alike: every order of the calls is predicted to take what it takes on three streams,
    and the order of the runtime is within 2 % of the fastest of them all in three chunks."""
    model = tiny_model(layers=1, hidden=256, ffn=512, top_k=4)
    machines = cluster(model, ((1.0, 1.0), (1.0, 1.0)), uplink=3e9, busy=0.0)
    workload = Workload.from_text("prefill:4096@64")
    step = Step(
        Costs(machines, model, "f32"), model, Layout.of(workload, 1, (16,) * 4), draw_routing(None, model, workload, 0)
    )
    layer, fixed = step.layer([0]), calls
    for count in (2, 3):
        plan = LayerPlan(strategy="hierarchical", slots=even_slots(8, 4), chunks=count)
        found = {}
        for order in every_order(count):
            stages = hierarchical.Flight.of(layer, [plan]).stages(tuple(call for call, _ in order))
            found[order] = float(run(step.costs, stages, np.zeros((1, 4))).max())
        least, most = durations(stages, np.min), durations(stages, np.max)
        last = sum(float(stage.seconds.max()) for stage in stages if stage.name == "hierarchical_combine")
        for order, seconds in found.items():
            assert played(order, least.__getitem__) <= seconds * (1 + 1e-9)
            assert seconds <= (played(order, most.__getitem__) + last) * (1 + 1e-9)
        assert fixed(count) in found
        assert found[fixed(count)] <= {2: 1.15, 3: 1.02}[count] * min(found.values())


def durations(stages, pick) -> list[tuple[float, ...]]:
    """Of each chunk, those of ``LEVELS``; pick: of the devices' seconds."""

    def of(*names):
        each = [[float(pick(stage.seconds)) for stage in stages if stage.name == name] for name in names]
        return np.sum(each, axis=0)

    there = of("across hosts"), of("hierarchical_relay"), of("inside hosts"), of("ep_unpack", "expert_ffn")
    back = of("back inside hosts"), of("hierarchical_add"), of("back across hosts")
    return list(zip(*there, *back, strict=True))
