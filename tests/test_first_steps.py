"""What people meet in their first hour: a file of the wrong kind, a plan of another folder, a verdict."""

from pathlib import Path

import numpy as np
import pytest

from moeplan.runtime.run import assemble
from moeplan.service.commands.run import _recorded
from moeplan.service.pages.report import verdict
from moeplan.spec import MoeplanError, Plan, Trace
from moeplan.spec.plan import LayerPlan, RoutingSource
from moeplan.tests.plans import hand_made_plan
from moeplan.tests.synthetic import tiny_model

MODEL = tiny_model(layers=1)
EP = LayerPlan(strategy="ep", slots=((0, 1, 2, 3), (4, 5, 6, 7)))


def plan(**changes) -> Plan:
    return hand_made_plan(MODEL, "prefill:8", [EP], tokens=(8, 0), predicted=0.2, **changes)


@pytest.mark.parametrize(
    ("measured", "tolerance", "text", "passed"),
    [
        (0.5, 1.0, "within tolerance: the predicted step is off by 60.0%, 100% are allowed (--tolerance)", True),
        (0.5, 0.5, "beyond tolerance: the predicted step is off by 60.0%, 50% are allowed (--tolerance)", False),
        (0.2, 0.5, "within tolerance: the predicted step is off by 0.0%, 50% are allowed (--tolerance)", True),
    ],
)
def test_the_verdict_says_what_was_compared(measured, tolerance, text, passed):
    load = {"seconds": 3.0, "foreign": 0.0}
    result = {"memory": 5, "environment": {}, "check": None, "parts": [], "steps": [measured], "laps": [], "reads": []}
    found = assemble(plan(), [result | {"load": load, "probes": []}] * 2, tolerance)
    assert (verdict(found), found.passed) == (text, passed)
    check = {"layers": 1, "tokens": 8, "tolerance": 1e-4, "relative_error": 0.5, "passed": False}
    differs = found.model_copy(update={"passed": False, "check": check})
    assert ("what was computed differs" in verdict(differs)) is passed


def test_a_document_where_a_trace_is_wanted_is_named(tmp_path: Path):
    path = plan().write(tmp_path / "plan.json")
    with pytest.raises(MoeplanError) as refused:
        Trace.read(path)
    assert str(refused.value) == (
        f"{path}: a document of kind 'moeplan.plan', where an npz was expected; record one with `moeplan trace capture`"
    )
    (tmp_path / "picture.npz").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(MoeplanError, match=r"not a readable npz \(File is not a zip file\); record one with"):
        Trace.read(tmp_path / "picture.npz")


def test_a_document_of_another_kind_says_what_makes_the_right_one(tmp_path: Path):
    path = tmp_path / "place.json"
    path.write_text('{"kind": "moeplan.placement", "version": 1}')
    with pytest.raises(
        MoeplanError, match=r"expected 'moeplan\.plan', got 'moeplan\.placement'; make one with `moeplan solve`"
    ):
        Plan.read(path)


def test_a_plans_trace_is_found_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "made").mkdir()
    trace = Trace.of(np.array([[[0, 1]]]), 8).write(tmp_path / "trace.npz")
    source = RoutingSource(kind="trace", path="../trace.npz", digest=Trace.read(trace).digest(), seed=4)
    path = plan(routing=source).write(tmp_path / "made/plan.json")
    monkeypatch.chdir(tmp_path / "made")
    assert _recorded(Plan.read(path), Path("plan.json")) is None  # where the plan says
    monkeypatch.chdir(tmp_path)
    assert _recorded(Plan.read(path), Path("made/plan.json")) == Path("made/../trace.npz")
    trace.unlink()
    assert _recorded(Plan.read(path), Path("made/plan.json")) is None  # and the error names what the plan says
    assert _recorded(plan(), Path("made/plan.json")) is None
