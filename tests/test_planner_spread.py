"""Traffic in product form against the same flows one by one."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.planner.flows import FlowModel
from moeplan.planner.spread import Spread
from moeplan.planner.traffic import Traffic
from moeplan.tests.synthetic import cluster, tiny_model

MODEL = tiny_model()
FLOW = FlowModel(cluster(MODEL, ((1.0,) * 3, (0.5,) * 3, (1.0,) * 3, (2.0,) * 3)), tuple(range(12)))
NUMBERS = st.lists(st.sampled_from([0.0, 1.0, 3e3, 2e5, 7e6]) | st.floats(0, 1e7), min_size=24, max_size=24)


def test_the_fleet_is_regular():
    assert FLOW.regular
    assert not FlowModel(cluster(MODEL, ((1.0, 1.0), (1.0,))), (0, 1, 2)).regular


@given(NUMBERS, NUMBERS)
@settings(deadline=None, max_examples=60)
def test_products_are_the_flows_that_they_stand_for(a, c):
    a, c = np.array(a).reshape(2, 12), np.array(c).reshape(2, 12) / 1e3
    spread, listed = Spread.of(a, c, 4), Traffic.of(a[:, :, None] * c[:, None, :])
    assert spread.sent() == pytest.approx(listed.sent(), rel=1e-9, abs=1e-3)
    assert spread.received() == pytest.approx(listed.received(), rel=1e-9, abs=1e-3)
    for mine, others in zip(spread.across(FLOW.host), listed.across(FLOW.host), strict=True):
        assert mine == pytest.approx(others, rel=1e-9, abs=1e-3)
    assert FLOW.seconds(spread) == pytest.approx(FLOW.seconds(listed), rel=1e-6)
    for of in (np.arange(12), np.arange(12) // 3, np.arange(12) // 6, np.zeros(12, int)):
        assert spread.between(of) == pytest.approx(listed.between(of), rel=1e-6, abs=1.0)
