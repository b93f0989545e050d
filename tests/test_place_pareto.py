"""The Pareto front of a placement: nothing on it is beaten, both ends, the table and the picture."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from moeplan.planner.budget import Budget
from moeplan.planner.place.fleet import even_fleet
from moeplan.planner.place.pareto import MARKED, Front, beaten, caps, check_front, pareto
from moeplan.planner.place.request import Request
from moeplan.planner.place.solve import place
from moeplan.service.pages.pareto import draw, page
from moeplan.spec.errors import MoeplanError
from moeplan.spec.placement import Placement
from moeplan.spec.trace import Trace
from moeplan.tests.routings import random_trace

Case = tuple[Trace, Request, Placement, Front]


def front_for(trace: Trace, hosts: int = 2, **options) -> Case:
    request = Request(even_fleet(4, hosts, 16, False), 16, time_limit=60.0, **({"steps": 40_000} | options))
    placement = place(trace, request)
    return trace, request, placement, pareto(trace, request, placement)


@pytest.fixture(scope="module")
def case() -> Case:
    return front_for(random_trace(1, 4, 16, 1000), fit=(0.0, 0.5))


@pytest.fixture(scope="module")
def fan_out() -> Case:
    return front_for(random_trace(2, 3, 16, 500, 3), movement="ep")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=12))
def test_beaten_points_are_those_that_another_one_makes_needless(costs):
    costs = [(float(a), float(b)) for a, b in costs]
    lost = beaten(costs)
    kept = [c for c, worse in zip(costs, lost, strict=True) if not worse]
    assert kept
    assert len(set(kept)) == len(kept)
    for i, worse in enumerate(lost):
        better = [c for c in kept if c[0] <= costs[i][0] and c[1] <= costs[i][1]]
        assert better == [costs[i]] if not worse else better


@given(st.floats(1, 2), st.floats(0, 2), st.integers(0, 9))
def test_caps_lie_inside_and_closer_where_balance_is_dear(least, span, count):
    found = caps(least, least + span, count)
    assert len(found) == count
    assert all(least <= cap <= least + span for cap in found)
    steps = np.diff([least, *found, least + span])
    assert (np.diff(steps) >= -1e-9).all()


@pytest.mark.parametrize("name", ["case", "fan_out"])
def test_no_point_of_the_front_is_beaten(name, request):
    _, _, _, front = request.getfixturevalue(name)
    on = [point for point in front.points if point.on_front]
    assert len(on) >= 3
    balance = [front.score(point).balance_mean for point in on]
    moved = [0.3 * front.moved(point)[1] + 1.0 * front.moved(point)[0] for point in on]
    assert balance == sorted(set(balance))
    assert moved == sorted(set(moved), reverse=True)
    assert all(point.on_front or point.name in MARKED for point in front.points)


def test_marked_points_are_the_placements_own_scores(case):
    _, _, placement, front = case
    marked = {point.name: point.scores for point in front.points if point.marked}
    assert marked == placement.scores
    assert front.part == "held_out"
    assert (front.host, front.device) == ("boundary_cross_host", "boundary_cross_device")


def test_the_front_reaches_from_cool_to_near():
    _, _, placement, front = front_for(random_trace(3, 4, 16, 1000), steps=200_000)
    assert front.part == "fit"
    on = [point for point in front.points if point.on_front]
    balance = [front.score(point).balance_mean for point in on]
    moved = [0.3 * front.moved(point)[1] + front.moved(point)[0] for point in on]
    marked = placement.scores.values()
    assert balance[0] <= min(both.fit.balance_mean for both in marked)
    assert moved[-1] <= placement.solver.objective + 1e-9
    assert balance[-1] > balance[0] + 0.3
    assert moved[-1] < 0.9 * moved[0]
    assert on[-1].name == "locality"


def test_fan_out_is_what_ep_shows(fan_out):
    _, _, _, front = fan_out
    assert (front.host, front.device) == ("fanout_host", "fanout_device")
    assert all(1 <= front.moved(point)[0] <= front.moved(point)[1] <= 3 for point in front.points)


def test_json_holds_every_point(case):
    front = case[-1]
    body = json.loads(json.dumps(front.to_dict(), allow_nan=False))
    assert [p["name"] for p in body["points"]] == [p.name for p in front.points]
    assert body["points"][0]["scores"]["held_out"]["balance_mean"] == front.score(front.points[0]).balance_mean
    assert body["steps"] == 40_000 // 7


@pytest.mark.parametrize("name", ["case", "fan_out"])
def test_table_and_picture(name, request, tmp_path):
    from matplotlib.image import imread

    front = request.getfixturevalue(name)[-1]
    console = Console(width=100)
    with console.capture() as captured:
        console.print(page(front))
    text = captured.get()
    for word in ("EPLB", "linear", "this", "held out" if name == "case" else "fit", "searched with at most"):
        assert word in text
    assert f"{front.score(front.points[0]).balance_mean:.3f}" in text
    draw(front, tmp_path / "front.png")
    image = imread(tmp_path / "front.png")
    assert image.shape[0] > 500
    draw(front, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").read_bytes()[:5] == b"<?xml"


def test_one_host_draws_devices_alone(tmp_path):
    front = front_for(random_trace(4, 2, 16), hosts=1, steps=4000)[-1]
    assert all(front.moved(point)[0] == 0 for point in front.points)
    draw(front, tmp_path / "front.svg")
    assert (tmp_path / "front.svg").stat().st_size > 5000


def test_stopped_front_has_what_is_known(case):
    trace, request, placement, _ = case
    budget = Budget.of(60.0)
    budget.stop.set()
    front = pareto(trace, request, placement, budget=budget)
    assert {point.name for point in front.points} >= set(MARKED)
    assert not front.missed
    assert front.seconds < 10


def test_fronts_that_make_no_sense_are_refused():
    trace = random_trace(0, 2, 8)
    with pytest.raises(MoeplanError, match="--pareto needs expert_ids per token"):
        check_front(Trace.of_counts(trace.expert_counts), Request(even_fleet(4, 2, 8, False), 8))
    with pytest.raises(MoeplanError, match="--pareto is for single copies"):
        check_front(trace, Request(even_fleet(4, 2, 12, False), 12))
    check_front(trace, Request(even_fleet(4, 2, 8, False), 8))
