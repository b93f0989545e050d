"""What no placement can beat: the floor of ``ep`` against random placements, on curves that noise has bent."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.columns import Column
from moeplan.planner.costs import Costs
from moeplan.planner.floors import placed_floor
from moeplan.planner.layout import Layout
from moeplan.planner.options import Classes
from moeplan.planner.search import solve
from moeplan.planner.step import Step
from moeplan.spec import Cluster, Workload
from moeplan.spec.errors import InfeasibleError
from moeplan.spec.plan import LayerPlan
from moeplan.spec.routing import draw_routing
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model(layers=2)
WORKLOAD = Workload.from_text("prefill:64@16")
MACHINES = {late: cluster(MODEL, ((1.0, 0.5), (1.0, 1.0)), late=late) for late in (0.0, 1e-3)}
ROUTING = draw_routing(None, MODEL, WORKLOAD, 0)


def bent(machines: Cluster, factors: np.ndarray) -> Cluster:
    """The same, collectives multiplied point by point, the same factors for each."""

    def times(curve):
        return curve and curve.model_copy(
            update={"median": tuple((np.array(curve.median) * np.resize(factors, len(curve.median))).tolist())}
        )

    def curve(entry):
        return entry.model_copy(update={"curve": times(entry.curve), "last": times(entry.last)})

    return machines.model_copy(update={"collectives": tuple(map(curve, machines.collectives))})


@given(
    st.lists(st.floats(0.1, 8.0), min_size=8, max_size=8),
    st.sampled_from([("ep", 1), ("ep", 2), ("ep", 4), ("hierarchical", 4)]),
    st.integers(0, 2**20),
    st.booleans(),
    st.sampled_from(sorted(MACHINES)),
)
@settings(max_examples=60, deadline=None)
def test_no_placement_is_below_the_floor(factors, kind, seed, copies, late):
    strategy, degree = kind
    rng = np.random.default_rng(seed)
    step = Step(
        Costs(bent(MACHINES[late], np.array(factors)), MODEL, "f32"),
        MODEL,
        Layout.of(WORKLOAD, 1, (1, 1, 1, 1)),
        ROUTING,
    )
    floor = placed_floor(step, strategy, degree, copies=degree == 4)
    device_of = rng.integers(0, degree, (2, 8))
    plans = []
    for row in device_of:
        slots = [set(np.flatnonzero(row == d).tolist()) for d in range(degree)] * (4 // degree)
        if copies and degree == 4:
            for d in range(4):
                slots[d] = slots[d] | set(rng.integers(0, 8, 2).tolist())
        plans.append(LayerPlan(strategy=strategy, slots=tuple(tuple(sorted(held)) for held in slots)))
    column = Column.of(step, Classes.of(MODEL.moe_layers, len(MODEL.layers)), plans)
    assert (floor <= column.arrival * (1 + 1e-9)).all()


@pytest.mark.parametrize("bytes_there", [100_000, 200_000])
def test_a_device_without_memory_for_what_all_hold_is_no_device(bytes_there):
    """Where not even the replicated weights fit, nothing does, though it gets no tokens and no experts."""
    machines = cluster(MODEL, ((1.0, 1.0), (1.0, 1.0)), memory=[2**30, 2**30, 2**30, bytes_there])
    with pytest.raises(InfeasibleError, match="device 3 lacks"):
        solve(MODEL, machines, Workload.from_text("decode:1@64"))
