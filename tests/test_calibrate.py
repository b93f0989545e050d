"""Calibration: the least squares against an independent minimiser, and what must hold for any points."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from moeplan.planner.calibrate.calibrate import calibrate, distance
from moeplan.planner.calibrate.fit import Factors, Pairs, Prior, fit, left_out
from moeplan.planner.calibrate.of_plan import of_plan
from moeplan.spec.calibration import Calibration, ServedTimes
from moeplan.spec.errors import MoeplanError
from moeplan.spec.plan import Plan
from moeplan.tests.documents import plan_body

times = st.floats(0.5, 5000)
NONE = (np.zeros(0), np.zeros(0))


def served(isl: int = 1024, osl: int = 1024, concurrency: int = 16, **ms: float) -> ServedTimes:
    return ServedTimes(isl=isl, osl=osl, concurrency=concurrency, **ms)


def pairs(*points: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    predicted, measured = zip(*points, strict=True)
    return np.array(predicted), np.array(measured)


def cost(x: np.ndarray, both: tuple[np.ndarray, np.ndarray], prior: Prior) -> float:
    """The formula of the module, written out point by point."""
    predicted, measured = both
    total = (x[0] / prior.tpot_scale) ** 2 + (x[1] / (prior.overhead * predicted.min())) ** 2
    for p, m in zip(predicted, measured, strict=True):
        total += ((np.log(np.exp(x[0]) * p + x[1]) - np.log(m)) / prior.tpot_spread) ** 2
    return total


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.floats(2, 200), st.floats(-0.7, 0.7)), min_size=1, max_size=4))
def test_the_fit_is_the_least_of_its_formula(points):
    both = pairs(*((p, p * np.exp(off)) for p, off in points))
    found = fit(Pairs(both, NONE))
    mine = cost(np.array([np.log(found.compute_scale), found.step_overhead_ms]), both, Prior())
    other = min(
        minimize(cost, [a, o], args=(both, Prior()), method="L-BFGS-B", bounds=[(None, None), (0, None)]).fun
        for a in (-0.5, 0.0, 0.5)
        for o in (0.0, 0.5)
    )
    assert mine <= other + 1e-5 * (1 + other)


def test_the_prefill_scale_is_the_least_of_its_formula():
    both = pairs((100, 320), (200, 380), (50, 90))
    prior = Prior()

    def off(b: float) -> float:
        squares = [((b + np.log(p) - np.log(m)) / prior.ttft_spread) ** 2 for p, m in zip(*both, strict=True)]
        return sum(squares) + (b / prior.ttft_scale) ** 2

    found = np.log(fit(Pairs(NONE, both)).prefill_scale)
    assert off(found) <= min(off(found + step) for step in (-1e-3, 1e-3))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(times, times), min_size=1, max_size=4))
def test_a_correction_is_positive_and_keeps_the_order(points):
    found = fit(Pairs(pairs(*points), pairs(*points)))
    assert found.step_overhead_ms >= 0
    probe = np.array([0.1, 1.0, 10.0, 1e4])
    assert (np.diff(found.tpot(probe)) > 0).all()
    assert (np.diff(found.ttft(probe)) > 0).all()
    assert (found.tpot(probe) > 0).all()


@given(times, st.floats(0.2, 5))
@settings(max_examples=40, deadline=None)
def test_one_point_moves_the_prediction_toward_it_but_not_beyond(predicted, factor):
    both = pairs((predicted, predicted * factor))
    found = fit(Pairs(both, both))
    for corrected in (found.tpot(both[0])[0], found.ttft(both[0])[0]):
        low, high = sorted((predicted, predicted * factor))
        assert low * (1 - 1e-6) <= corrected <= high * (1 + 1e-6)
    assert abs(np.log(found.prefill_scale)) < 0.67 * abs(np.log(factor)) + 1e-9


def test_right_predictions_stay_as_they_are():
    both = pairs((10, 10), (20, 20), (40, 40))
    found = fit(Pairs(both, both))
    assert found.compute_scale == pytest.approx(1, abs=1e-3)
    assert found.step_overhead_ms == pytest.approx(0, abs=0.02)
    assert found.prefill_scale == pytest.approx(1)
    assert fit(Pairs(NONE, NONE)) == Factors()


def test_overhead_is_told_from_a_scale():
    """Where small loads are far off and large ones are not, it is the overhead; where all alike are, the scale."""
    small = fit(Pairs(pairs((4, 5.2), (10, 11), (40, 41), (160, 161)), NONE))
    scale = fit(Pairs(pairs((4, 5.2), (10, 13), (40, 52), (160, 208)), NONE))
    assert small.step_overhead_ms > 2 * scale.step_overhead_ms
    assert scale.compute_scale > small.compute_scale + 0.1


def test_left_out_is_what_the_others_alone_give():
    both = pairs((10, 14), (20, 24), (40, 50))
    found = left_out(Pairs(both, both))
    alone = fit(Pairs(pairs((20, 24), (40, 50)), pairs((20, 24), (40, 50))))
    assert found.tpot[0][0] == pytest.approx(alone.tpot(np.array([10.0]))[0])
    assert found.ttft[0][0] == pytest.approx(alone.ttft(np.array([10.0]))[0])
    assert len(left_out(Pairs(pairs((1, 2)), NONE)).tpot[0]) == 0


def test_points_belong_to_the_prediction_of_their_load(tmp_path):
    predictions = [served(tpot_ms=10, ttft_ms=100), served(concurrency=64, tpot_ms=20, ttft_ms=300)]
    measurements = [
        served(isl=1020, osl=1010, tpot_ms=12, ttft_ms=200),  # lengths as an engine reports them
        served(concurrency=64, tpot_ms=22),
        served(concurrency=256, tpot_ms=50),
    ]
    found = calibrate(predictions, measurements, source="p.csv")
    assert [p.predicted.concurrency for p in found.points] == [16, 64]
    assert found.skipped == 1
    assert found.error_before.tpot == pytest.approx((abs(10 / 12 - 1) + abs(20 / 22 - 1)) / 2)
    assert found.error_before.ttft == pytest.approx(0.5)
    assert found.error_left_out.ttft is None
    assert Calibration.read(found.write(tmp_path / "c.json")) == found
    mended = found.corrected(predictions[1])
    assert mended.tpot_ms == pytest.approx(found.compute_scale * 20 + found.step_overhead_ms)
    assert mended.ttft_ms == pytest.approx(found.prefill_scale * 300)


def test_no_point_of_a_predicted_load_is_an_error_that_names_the_nearest():
    with pytest.raises(MoeplanError, match=r"concurrency 256, the nearest prediction of .* concurrency 16;"):
        calibrate([served(tpot_ms=1)], [served(concurrency=256, tpot_ms=1)])
    with pytest.raises(MoeplanError, match="with the same time"):
        calibrate([served(tpot_ms=1)], [served(ttft_ms=1)])
    with pytest.raises(MoeplanError, match="0 predictions and 1 measurements"):
        calibrate([], [served(ttft_ms=1)])
    assert distance(served(tpot_ms=1), served(concurrency=32, tpot_ms=1)) == pytest.approx(np.log(2))


def test_a_plan_is_the_prediction_of_its_own_load():
    plan = Plan.model_validate(plan_body())  # decode:6@3, a step of 0.1 s
    found = of_plan(plan, [served(2, 2, 6, tpot_ms=90), served(2, 2, 7, tpot_ms=90)])
    assert [(p.concurrency, p.tpot_ms, p.ttft_ms) for p in found] == [(6, 100, None)]
    with pytest.raises(
        MoeplanError, match=r"the plan is for decode:6@3: no measurement has a concurrency of 6 and isl"
    ):
        of_plan(plan, [served(tpot_ms=1)])
