"""Names from files are printed and drawn as they are: no markup, emoji or formula, nothing that steers a terminal."""

import io
import json
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table
from rich.text import Text

from moeplan.service import cli, console
from moeplan.service.commands.profile import cluster_table
from moeplan.service.report import draw_report, report_table
from moeplan.spec import Trace
from moeplan.spec.picture import save_picture
from moeplan.spec.placement import Score, Scores
from moeplan.spec.report import Comparison, PartComparison, Report
from moeplan.tests.exports import linear_placement
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

NAMES = [
    "[red]x[/]",
    "[/]",
    "[/red]",
    "[bold",
    "[link=http://x]y[/link]",
    "[@click=app.bell]x[/]",
    ":smile:",
    "a\\",
    "\\[red]",
    "$x^$",
    r"$\frac{$",
    r"\$5$",
    "<script>alert(1)</script>",
    "{0} %s {name}",
    "\x1b[31mred\x1b[0m",
    "\x9b31mred",
    "\u202eright to left",
]


def shown(name: str) -> str:
    """What is to be seen of a name."""
    return "".join(c if c.isprintable() else "?" for c in name)


@pytest.fixture
def wide(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Consoles that wrap no name, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    for one in (console.out, console.err):
        monkeypatch.setattr(one, "_width", 400)


def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *argv: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *argv])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, *capfd.readouterr()


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", NAMES)
def test_commands_print_names_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model = tiny_model(layers=2, experts=4).model_copy(update={"name": name})
    model.write("model.json")
    made = cluster(model, ((1.0, 0.5),))
    devices = tuple(device.model_copy(update={"host": name}) for device in made.devices)
    kinds = tuple(kind.model_copy(update={"product": name}) for kind in made.kinds)
    hosts = tuple(host.model_copy(update={"name": name}) for host in made.hosts)
    made.model_copy(update={"kinds": kinds, "devices": devices, "hosts": hosts}).write("cluster.json")
    routing = random_trace(0, 2, 4, 60)
    Trace.of(routing.expert_ids, 4, model=name, source=name).write("trace.npz")
    placement = linear_placement(model, 2)
    placement = placement.model_copy(
        update={
            "model": name,
            "notes": (name,),
            "devices": tuple(d.model_copy(update={"host": name}) for d in placement.devices),
            "solver": placement.solver.model_copy(update={"minimised": name, "bounds": {name: 0.5, "other": 0.2}}),
            "scores": {name: Scores(fit=Score(tokens=1, balance_mean=1.0, balance_max=1.0))},
        }
    )
    placement.write("place.json")
    timed = ["--workload", "decode:4@8", "--time-limit", "2"]
    for argv in (
        ["models", "model.json"],
        ["solve", "-m", "model.json", "--cluster", "cluster.json", *timed],
        ["place", "--trace", "trace.npz", "-m", "model.json", "--devices", "2", "--steps", "50", "--time-limit", "2"],
        ["place", "--trace", "trace.npz", "-m", "model.json", "--cluster", "cluster.json", "--steps", "50", *timed],
        ["explain", "place.json", "--trace", "trace.npz", "--picture", "place.svg"],
        ["compare", "place.json", "place.json", "--trace", "trace.npz"],
        ["trace", "stats", "trace.npz", "--devices", "2", "--picture", "stats.svg"],
    ):
        code, out, err = run(monkeypatch, capfd, *argv)
        assert code == 0, err
        assert "Traceback" not in err
        assert "Warning" not in err
        printed = out + err
        assert printed.isprintable() or all(c.isprintable() or c == "\n" for c in printed)
        if argv[0] not in ("place", "compare") or shown(name) in printed:
            assert shown(name) in printed, argv
    for picture in ("place.svg", "stats.svg"):
        text = Path(picture).read_text()
        xml.etree.ElementTree.fromstring(text)
        assert "<script" not in text


@pytest.mark.usefixtures("wide")
@pytest.mark.parametrize("name", NAMES)
def test_exports_and_refusals_print_names_as_they_are(
    name: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    model = tiny_model(layers=2, experts=4).model_copy(update={"name": name, "family": "mixtral"})
    model.write("model.json")
    linear_placement(model, 2).model_copy(update={"model": name}).write("place.json")
    code, _, err = run(monkeypatch, capfd, "export", "place.json", "--to", "vllm", "-m", "model.json")
    assert (code, "Traceback" in err) == (0, False)
    for argv in (
        ["models", name],
        ["solve", "-m", name],
        ["place", "--trace", name],
        ["place", "--trace", "x.npz", "--fit", name],
        ["export", "place.json", "--to", name, "-m", "model.json"],
        ["solve", "-m", "model.json", "--workload", name],
    ):
        code, _, err = run(monkeypatch, capfd, *argv)
        assert code == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert err.rstrip("\n").isprintable()
    code, _, err = run(monkeypatch, capfd, "place", "--trace", "x.npz", "--shares", name)
    assert code == 2
    assert "Traceback" not in err


@pytest.mark.parametrize("name", NAMES)
def test_reports_and_clusters_show_names_as_they_are(name: str, tmp_path: Path) -> None:
    compared = {"predicted": 1.0, "measured": 1.0, "spread": 0.0}
    report = Report(
        plan="", model=name, workload="decode:4@8", step=Comparison(**compared), repetitions=1, tolerance=0.5,
        passed=True, parts=(PartComparison(layer=0, part="expert", **compared),), memory=(1,),
        check=None, environment={}, notes=(name,),
    )  # fmt: skip
    made = cluster(tiny_model())
    kinds = tuple(kind.model_copy(update={"product": name}) for kind in made.kinds)
    device = made.devices[0].model_copy(update={"host": name})
    hosts = (*made.hosts, made.hosts[0].model_copy(update={"name": name}))
    made = made.model_copy(update={"kinds": kinds, "devices": (device, *made.devices[1:]), "hosts": hosts})
    written = io.StringIO()
    wide = console.literal_console(file=written, width=400)
    wide.print(report_table(report), cluster_table(made))
    assert written.getvalue().count(shown(name)) >= 3
    draw_report(report, tmp_path / "report.svg")
    xml.etree.ElementTree.parse(tmp_path / "report.svg")


def test_styles_stay() -> None:
    """What the program itself colours is still coloured, and no markup of its own is left in what it prints."""
    written = io.StringIO()
    terminal = console.literal_console(file=written, force_terminal=True, color_system="standard")
    terminal.print(Text.assemble(("note:", "yellow"), " [red]x[/]"))
    assert written.getvalue() == "\x1b[33mnote:\x1b[0m [red]x[/]\n"


@given(st.text(max_size=30))
def test_any_text_is_printed_as_it_is(text: str) -> None:
    """In a line, a table's cell, title and heading."""
    written = io.StringIO()
    wide = console.literal_console(file=written, width=1000)
    flat = "".join(c if c.isprintable() else " " for c in text)  # what breaks lines or has no width is not compared
    table = Table(title=f"title {flat}|")
    table.add_column(f"heading {flat}|", no_wrap=True)
    table.add_row(f"cell {flat}|")
    wide.print(f"line {text}|", table)
    assert all(c.isprintable() or c == "\n" for c in written.getvalue())
    for what in ("title", "heading", "cell"):
        assert f"{what} {flat}|" in written.getvalue()


@given(st.text(max_size=30))
def test_any_text_is_drawn(text: str) -> None:
    from matplotlib.figure import Figure

    from moeplan.spec.picture import plain

    figure = Figure(figsize=(1, 1))
    drawn = figure.suptitle(plain(text))
    written, _ = drawn._preprocess_math(drawn.get_text())
    assert written == shown(text)


def test_signs_that_no_font_has_are_drawn_without_a_word(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1, 1))
    figure.suptitle("模型")
    save_picture(figure, tmp_path / "x.png")
    assert not recwarn.list


def test_a_document_of_such_names_is_read_back(tmp_path: Path) -> None:
    for name in NAMES:
        path = tiny_model().model_copy(update={"name": name}).write(tmp_path / "model.json")
        assert json.loads(path.read_text())["name"] == name
