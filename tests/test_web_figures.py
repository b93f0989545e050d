"""Figures: what they draw is what the documents say, Plotly takes it, and names are drawn as they are."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.planner.place.compare import to_load
from moeplan.planner.place.explain import over_ideal
from moeplan.service.web.content import diff_section, placement_sections, plan_sections
from moeplan.service.web.figures.crossings import crossings_figure, traffic_figure
from moeplan.service.web.figures.diff import loads_figure, moved_figure
from moeplan.service.web.figures.figure import Figure, plain, safe_json
from moeplan.service.web.figures.front import PrintedFront, front_figure
from moeplan.service.web.figures.heat_map import experts_figure
from moeplan.service.web.figures.load import load_figure
from moeplan.service.web.figures.parts import compared_figure, predicted_figure
from moeplan.service.web.figures.progress import progress_figure
from moeplan.service.web.figures.timeline import timeline_figure
from moeplan.service.web.figures.topology import topology_figure
from moeplan.spec.trace import Trace
from moeplan.tests.web_documents import HOSTILE, by_hand, placed, planned, recorded, reported

graph_objects = pytest.importorskip("plotly.graph_objects", reason="Plotly is in moeplan[service]")


def check(figure: Figure) -> None:
    """Plotly's own validator takes every view; each has a table of the figure's columns and a sentence."""
    assert figure.views
    assert figure.says.endswith(".")
    content = json.loads(figure.to_json())
    for view, written in zip(figure.views, content["views"], strict=True):
        graph_objects.Figure({"data": written["data"], "layout": content["layout"]})
        assert view.rows
        assert {len(row) for row in view.rows} == {len(figure.columns)}
        assert all(not isinstance(cell, float) or math.isfinite(cell) for row in view.rows for cell in row)


def of_sections(sections) -> list[Figure]:
    return [figure for section in sections for figure in section.figures]


def test_plotly_takes_every_figure() -> None:
    trace, (plan, machines) = recorded(), planned()
    a, b = placed(1, trace), placed(2, trace)
    line = reported(plan, machines)
    figures = of_sections([*placement_sections(a, trace, machines), diff_section(a, b, trace)])
    figures += of_sections(plan_sections(plan, line, machines))
    names = [figure.name for figure in figures]
    assert {"load", "experts", "crossings", "topology", "moved", "loads", "parts", "predicted", "timeline"} <= {*names}
    for figure in figures:
        check(figure)


@pytest.mark.parametrize("copies", [0, 5])
def test_cells_of_a_device_add_up_to_its_load(copies: int) -> None:
    trace = recorded()
    placement = placed(4, trace, copies=copies)
    counts = trace.expert_counts
    figure = experts_figure(placement, counts)
    check(figure)
    assert [view.label for view in figure.views] == [str(i) for i in range(trace.layers)]
    over = over_ideal(placement, counts)
    for layer, view in enumerate(figure.views):
        shares = [sum(value or 0.0 for value in row) / 100 for row in view.data[0]["z"]]
        np.testing.assert_allclose(np.array(shares) * len(shares), over[layer], atol=1e-3)
        for g, held in enumerate(placement.layers[layer].slots):
            assert sum(value is not None for value in view.data[0]["z"][g]) == len(held)


def test_of_a_large_placement_the_hottest_layers_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = recorded()
    placement = placed(4, trace)
    monkeypatch.setattr("moeplan.service.web.figures.heat_map.MOST_SLOTS", 2 * trace.num_experts)
    over = over_ideal(placement, trace.expert_counts)
    figure = experts_figure(placement, trace.expert_counts, over)
    hottest = sorted(np.argsort(-over.max(axis=1), kind="stable")[:2].tolist())
    assert [view.label for view in figure.views] == [str(layer) for layer in hottest]
    assert f"{trace.layers - 2} are left out" in figure.says


def test_load_is_that_of_the_document() -> None:
    trace = recorded()
    placement = placed(1, trace)
    over = over_ideal(placement, trace.part(0, 0.5).expert_counts)
    figure = load_figure(placement, {"fitted part": over})
    heat, dots = figure.views[0].data
    np.testing.assert_allclose(np.array(heat["z"]).T, over, atol=1e-3)
    assert [heat["y"].index(name) for name in dots["y"]] == over.argmax(axis=1).tolist()
    assert f"{placement.scores['placement'].fit.balance_mean:.3f}" in figure.says


def test_moves_are_those_counted_one_by_one() -> None:
    trace = recorded()
    placement = placed(1, trace)
    figure = crossings_figure(placement, trace)
    assert figure is not None
    hosts, devices = figure.views
    moves = by_hand(placement, trace)
    shown = np.array([[np.nan if v is None else v for v in row] for row in devices.data[0]["z"]])
    apart = ~np.eye(len(moves), dtype=bool)
    np.testing.assert_allclose(shown[apart], 100 * moves[apart] / moves.sum(), atol=1e-3)
    assert np.isnan(np.diag(shown)).all()
    assert devices.rows[0][2] == pytest.approx(100 * np.trace(moves) / moves.sum(), abs=0.01)
    left = moves[:2, :2].sum() + moves[2:, 2:].sum()
    assert hosts.rows[0][2] == pytest.approx(100 * left / moves.sum(), abs=0.01)


def test_moves_of_copies_and_of_counts_are_not_made_up() -> None:
    trace = recorded()
    assert crossings_figure(placed(1, trace, copies=4), trace) is None
    assert crossings_figure(placed(1, trace), Trace.of_counts(trace.expert_counts)) is None


def test_what_moves_is_what_must_be_loaded() -> None:
    trace = recorded()
    a, b = placed(1, trace), placed(2, trace, copies=3)
    figure = moved_figure(a, b)
    np.testing.assert_array_equal(np.array(figure.views[0].data[0]["z"]).sum(axis=0), to_load(a, b))
    assert f"{to_load(a, b).sum()} copies" in figure.says
    assert int(np.sum(moved_figure(a, a).views[0].data[0]["z"])) == 0
    check(loads_figure(*(over_ideal(p, trace.expert_counts) for p in (a, b))))


def test_parts_are_those_of_plan_and_report() -> None:
    plan, machines = planned()
    report = reported(plan, machines)
    figure = compared_figure(report)
    predicted, measured = figure.views[0].data
    assert sum(predicted["y"]) == pytest.approx(1e3 * sum(row.predicted for row in report.parts), rel=1e-3)
    assert sum(measured["y"]) == pytest.approx(1.1 * sum(predicted["y"]), rel=1e-3)
    assert len(figure.views) == 1 + len({row.layer for row in report.parts})
    stacked = predicted_figure(plan)
    total = sum(sum(trace["y"]) for trace in stacked.views[0].data)
    assert total == pytest.approx(sum(predicted["y"]), rel=1e-3)
    traffic = traffic_figure(plan)
    assert traffic is not None
    assert traffic.layout["coloraxis"]["colorbar"]["title"]["text"] == "KiB"
    sent = np.nansum(np.array([[v or 0.0 for v in row] for row in traffic.views[0].data[0]["z"]]))
    assert sent == pytest.approx(sum(pair.bytes for pair in plan.predicted.traffic) / 2**10, rel=1e-3)


def test_the_timeline_holds_both_and_ends_where_they_end() -> None:
    from moeplan.planner.step import Step

    plan, machines = planned()
    line = Step.of(plan, machines, None).timeline(plan.layers)
    figure = timeline_figure(reported(plan, machines).timeline, line)
    assert figure is not None
    check(figure)
    ends = {"ran": 0.0, "predicted": 0.0}
    for trace in figure.views[0].data[1:]:
        for name, base, width in zip(trace["y"], trace["base"], trace["x"], strict=True):
            kind = name.split(", ")[1]
            ends[kind] = max(ends[kind], base + width)
    assert ends["predicted"] == pytest.approx(1e3 * line.makespan, rel=1e-3)
    assert ends["ran"] == pytest.approx(1.1e3 * line.makespan, rel=1e-3)
    assert timeline_figure((), None) is None


def test_the_topology_has_every_device_once() -> None:
    _, machines = planned()
    figure = topology_figure(machines)
    check(figure)
    devices = [text for trace in figure.views[0].data if "markers" in trace["mode"] for text in trace["text"]]
    assert sorted(name for name in devices if name.isdigit()) == [str(i) for i in range(len(machines.devices))]
    assert any(trace.get("name") == "limits an equal exchange" for trace in figure.views[0].data)


def test_progress_says_what_is_known() -> None:
    events = [
        {"seconds": 1, "incumbent": 4.0},
        {"seconds": 2, "incumbent": 3.0, "bound": 1.0},
        {"seconds": 5, "bound": 2.4},
    ]
    figure = progress_figure(events)
    check(figure)
    best, bound = figure.views[0].data
    assert (best["x"], best["y"]) == ([1, 2, 5], [4.0, 3.0, 3.0])
    assert (bound["x"], bound["y"]) == ([2, 5, 5], [1.0, 2.4, 2.4])
    assert "at most 20.0% could still be saved" in figure.says
    assert progress_figure([]).says == "Nothing is found yet."
    assert "at the end" in progress_figure(events[:1]).says


def test_a_front_has_a_row_for_each_point() -> None:
    trace = recorded()
    scores = placed(1, trace).scores["placement"].model_dump(mode="json")
    points = [{"name": name, "cap": None, "on_front": True, "scores": scores} for name in ("coolest", "placement")]
    rest = {"part": "held_out", "dropped": 0, "missed": [], "steps": 1, "seconds": 1.0}
    fields = {"host": "boundary_cross_host", "device": "boundary_cross_device"}
    figure = front_figure(PrintedFront.model_validate({"points": points, **rest, **fields}))
    check(figure)
    assert figure.picks
    assert [len(trace["x"]) for trace in figure.views[0].data] == [2]


@given(st.text(max_size=80))
def test_no_name_is_markup_or_a_placeholder(name: str) -> None:
    shown = plain(name)
    assert "<" not in shown
    assert ">" not in shown
    assert "%{" not in shown
    assert shown.isprintable()
    assert not {"<", ">", "&"} & {*safe_json({name: name})}
    assert json.loads(safe_json([name])) == [name]


def test_hostile_names_are_drawn_as_they_are() -> None:
    trace = recorded()
    placement = placed(1, trace)
    devices = tuple(device.model_copy(update={"host": HOSTILE}) for device in placement.devices)
    hostile = placement.model_copy(update={"model": HOSTILE, "devices": devices})
    figures = of_sections([*placement_sections(hostile, trace), diff_section(placement, hostile, trace)])
    for figure in figures:
        for view in figure.views:
            text = json.dumps(view.data) + json.dumps(figure.layout)
            assert "<script" not in text
            assert "<img" not in text
            assert "\\u001b" not in text
            assert "\\u202e" not in text


def test_of_many_devices_the_hottest_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.service.web.figures.figure.MOST_DEVICES", 2)
    trace = recorded()
    a, b = placed(1, trace), placed(2, trace)
    over = over_ideal(a, trace.expert_counts)
    hottest = sorted(np.argsort(-over.max(axis=0), kind="stable")[:2].tolist())
    for figure in (load_figure(a, {"all": over}), experts_figure(a, trace.expert_counts, over)):
        check(figure)
        assert [row[0] for row in figure.views[0].rows] == hottest
        assert "of 4 devices" in figure.says
    for figure in (moved_figure(a, b), loads_figure(over, over)):
        check(figure)
        assert len(figure.views[0].rows) == 2
        assert "of 4 devices" in figure.says
