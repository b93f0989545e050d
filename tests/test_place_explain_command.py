"""`moeplan explain` and `moeplan compare` as a user types them."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer

from moeplan.planner.place import explain as why
from moeplan.planner.place.compare import changed_experts
from moeplan.service.commands import compare as compare_command
from moeplan.service.commands import explain as explain_command
from moeplan.spec.errors import MoeplanError
from moeplan.spec.placement import (
    Placement,
    PlacementSolver,
    Score,
    Scores,
    TraceSource,
)
from moeplan.spec.trace import Trace
from moeplan.tests.explained import random_placement, random_trace

app = typer.Typer()
app.command(name="explain")(explain_command.explain)
app.command(name="compare")(compare_command.compare)

Run = Callable[..., str]


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command in an empty folder; what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")

    def run(*args: object) -> str:
        app([str(a) for a in args], standalone_mode=False)
        return capfd.readouterr().out

    return run


@pytest.fixture
def place(moeplan: Run) -> Path:
    """place.json of tiny-moe's shape with its trace beside it, fitted on the first half."""
    trace = random_trace(5, 8, 16)
    trace.write("trace.npz")
    placement = random_placement(5, 8, 16, 4, 2)
    source = TraceSource(path="trace.npz", digest=trace.digest(), fit=(0.0, 0.5), tokens=trace.tokens)
    fitted, rest = trace.part(0, 0.5), trace.part(0.5, 1)
    scores = {
        name: Scores(fit=why.measure(placement, fitted), held_out=why.measure(placement, rest))
        for name in ("placement", "linear", "eplb")
    }
    placement = placement.model_copy(update={"model": "tiny-moe", "trace": source, "scores": scores})
    return placement.write("place.json")


def test_the_page_says_why(moeplan: Run, place: Path) -> None:
    page = " ".join(moeplan("explain", place, "--picture", "place.png").split())  # however lines break
    for text in (
        "tiny-moe: 8 layers x 16 experts on 4 devices of 2 hosts, 16 slots per layer",
        "at most 20.0% could still be saved",
        "what limits it",
        "beside the usual placements",
        "hottest devices, on the fitted part",
        "Over all layers together device",
        "what still crosses",
        "widest fan-out",
        "what one more slot per device would buy",
        "on every device, all layers together",
        "wrote place.png",
    ):
        assert text in page
    assert Path("place.png").read_bytes().startswith(b"\x89PNG")


def test_the_json_is_complete(moeplan: Run, place: Path) -> None:
    body = json.loads(moeplan("explain", place, "--json"))
    found = body["explanation"]
    assert body["solver"]["bounds"] == {"spectral": 0.4}
    assert set(body["scores"]) == {"placement", "linear", "eplb"}
    assert np.array(found["load_over_ideal"]).shape == (8, 4)
    assert len(found["boundaries"]) == 7
    assert len(found["fanout"]) == 8
    assert found["fit"] == pytest.approx(body["scores"]["placement"]["fit"])
    assert found["held_out"] == pytest.approx(body["scores"]["placement"]["held_out"])
    assert found["one_more_slot"]["more_slots"] <= found["one_more_slot"]["same_slots"] <= found["one_more_slot"]["now"]
    assert json.loads(moeplan("explain", place, "--json")) == body  # the same again


@pytest.mark.parametrize(
    ("status", "bound", "text"),
    [
        ("optimal", 0.5, "proven optimal"),
        ("feasible", 0.0, "nothing is proven"),
        ("time_limit", 0.4, "stopped at its time limit"),
    ],
)
def test_the_verdict_as_text(moeplan: Run, place: Path, status: str, bound: float, text: str) -> None:
    solver = PlacementSolver(
        status=status, objective=0.5, bound=bound, gap=1 - bound / 0.5, seconds=1, minimised="moves"
    )
    Placement.read(place).model_copy(update={"solver": solver}).write("other.json")
    assert text in moeplan("explain", "other.json")


@pytest.mark.parametrize("kind", ["copies", "counts", "one host", "one layer"])
def test_every_kind_of_placement_has_a_page_and_a_picture(moeplan: Run, kind: str) -> None:
    layers, hosts = (1 if kind == "one layer" else 3), (1 if kind == "one host" else 2)
    placement = random_placement(1, layers, 8, 4, hosts, copies=2 if kind == "copies" else 0)
    trace = random_trace(1, layers, 8)
    if kind == "counts":
        trace = Trace.of_counts(trace.expert_counts)
    trace.write("trace.npz")
    placement.write("place.json")
    page = moeplan("explain", "place.json", "--trace", "trace.npz", "--picture", "place.png")
    assert ("what still crosses" in page) == (kind == "one host")
    assert ("widest fan-out" in page) == (kind != "counts")
    assert Path("place.png").read_bytes().startswith(b"\x89PNG")


def test_a_trace_that_is_missing_other_or_of_another_shape(
    moeplan: Run, place: Path, capfd: pytest.CaptureFixture
) -> None:
    Path("trace.npz").rename("elsewhere.npz")
    with pytest.raises(MoeplanError, match=r"its trace trace\.npz is not here; pass one with --trace"):
        moeplan("explain", place)
    moeplan("explain", place, "--trace", "elsewhere.npz")
    random_trace(6, 8, 16).write("other.npz")
    app(["explain", "place.json", "--trace", "other.npz"], standalone_mode=False)
    out, err = capfd.readouterr()
    assert "the placement was fitted on another trace" in err
    assert "the whole trace, of which nothing was fitted" in out
    random_trace(6, 7, 16).write("short.npz")
    with pytest.raises(MoeplanError, match="the trace has 7 layers x 16 experts, the placement 8 x 16"):
        moeplan("explain", place, "--trace", "short.npz")
    Placement.read(place).model_copy(update={"trace": TraceSource()}).write("unnamed.json")
    with pytest.raises(MoeplanError, match="it names no trace; pass one with --trace"):
        moeplan("explain", "unnamed.json")


def test_documents_of_other_kinds_are_refused_with_a_hint(moeplan: Run, place: Path) -> None:
    Path("plan.json").write_text('{"kind": "moeplan.plan", "version": 1}')
    for args in (("explain", "plan.json"), ("compare", place, "plan.json"), ("compare", "plan.json", place)):
        with pytest.raises(MoeplanError, match=r"expected 'moeplan.placement', got 'moeplan.plan'; make one with"):
            moeplan(*args)
    with pytest.raises(MoeplanError, match=r"none\.json: no such file; make one with `moeplan place`"):
        moeplan("explain", "none.json")


def test_compare_rescores_on_the_trace_that_both_name(moeplan: Run, place: Path) -> None:
    other = random_placement(9, 8, 16, 4, 2)
    own = Placement.read(place)
    own.model_copy(update={"layers": other.layers, "scores": {}}).write("other.json")
    body = json.loads(moeplan("compare", place, "other.json", "--json"))
    assert body["rescored"]
    assert body["a"]["held_out"] == pytest.approx(own.scores["placement"].held_out.model_dump())
    assert body["documents"]["b"]["file"] == "other.json"
    assert body["documents"]["a"]["solver"] == own.solver.model_dump()
    assert (body["documents"]["a"]["devices"], body["documents"]["a"]["slots"]) == (4, 16)
    assert body["changed_in_all"] == sum(body["changed"]) == int(changed_experts(own, other).sum())
    assert body["copies_in_all"] == body["changed_in_all"]  # single copies
    assert body["bytes"] == body["copies_in_all"] * why.expert_bytes(own)[0][0]
    assert {d["part"] for d in body["differences"]} == {"fit", "held_out"}
    page = moeplan("compare", place, "other.json")
    assert f"From A to B the devices load {body['copies_in_all']} copies" in page
    assert "better" in page
    assert "A and B hold the same experts on the same devices" in moeplan("compare", place, place)
    Path("trace.npz").unlink()
    assert not json.loads(moeplan("compare", place, "other.json", "--json"))["rescored"]


def test_names_with_markup_are_printed_as_they_are(moeplan: Run) -> None:
    placement = random_placement(1, 2, 8, 4, 1)
    odd = [device.model_copy(update={"host": "[red]$h_{$[/]"}) for device in placement.devices]
    scores = {"[/] odd": Scores(fit=Score(tokens=1, balance_mean=1, balance_max=1))}
    bounds = placement.solver.model_copy(update={"minimised": "[/]", "bounds": {"[/a]": 0.1, "[/b]": 0.2}})
    update = {"devices": tuple(odd), "scores": scores, "solver": bounds, "model": "[/model]$_$"}
    placement.model_copy(update=update).write("odd.json")
    random_trace(1, 2, 8).write("trace.npz")
    page = moeplan("explain", "odd.json", "--trace", "trace.npz", "--picture", "odd.png")
    for text in ("on [red]$h_{$[/]", "[/] odd", "[/b]", "[/model]$_$"):
        assert text in page
    assert "[/model]$_$" in moeplan("compare", "odd.json", "odd.json", "--trace", "trace.npz")


def test_a_picture_of_an_unknown_kind_is_refused(moeplan: Run, place: Path) -> None:
    with pytest.raises(MoeplanError, match=r"place\.xyz: no picture of kind '\.xyz': use \.png"):
        moeplan("explain", place, "--picture", "place.xyz")
    assert not Path("place.xyz").exists()
