"""The order in which chunks travel: CP-SAT proves that no other is faster, so that only their number is to choose."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.clock import run
from moeplan.planner.costs import Costs
from moeplan.planner.layout import Layout
from moeplan.planner.step import Step
from moeplan.planner.strategies import ep
from moeplan.spec import Workload
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.plans import even_slots
from moeplan.tests.synthetic import cluster, tiny_model
from moeplan.tests.yardsticks.chunk_order import best_makespan

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
