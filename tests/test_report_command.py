"""`moeplan report`: one file that holds all it shows, loads nothing, and draws names as they are."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import typer

from moeplan.service.commands import report as report_command
from moeplan.spec.errors import MoeplanError
from moeplan.spec.placement import Placement
from moeplan.tests.web_documents import HOSTILE, written

pytest.importorskip("jinja2", reason="Jinja is in moeplan[service]")
app = typer.Typer()
app.command()(report_command.report)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return written(tmp_path_factory.mktemp("documents"))


def run(*arguments: object) -> None:
    app([str(argument) for argument in arguments], standalone_mode=False)


class Page(HTMLParser):
    """What a browser would load, run and draw."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.loads: list[str] = []
        self.elements: list[tuple[str, str, str]] = []  # tag, type, text
        self.texts: list[str] = []
        self.policy, self.handlers = "", list[str]()
        self._open: tuple[str, str] | None = None
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.loads += [f"{tag} {name}={value}" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        self.handlers += [f"{tag} {name}" for name in given if name.startswith("on") or name == "style"]
        if given.get("http-equiv") == "Content-Security-Policy":
            self.policy = given["content"] or ""
        if tag in ("script", "style"):
            self._open = tag, given.get("type") or ""

    def handle_endtag(self, tag: str) -> None:
        self._open = None

    def handle_data(self, data: str) -> None:
        if self._open:
            self.elements.append((*self._open, data))
        else:
            self.texts.append(data)


def looked_at(path: Path) -> Page:
    """The page, with everything that must be so of each."""
    page = Page(path.read_text(encoding="utf-8"))
    assert page.loads == ["a href=#main"]
    assert page.handlers == []
    assert page.policy.startswith("default-src 'none'; ")
    allowed = dict(part.split(" ", 1) for part in page.policy.split("; "))
    assert "unsafe" not in allowed["script-src"]
    assert allowed["img-src"] == "data: blob:"
    for tag, kind, text in page.elements:
        if tag == "script" and kind == "application/json":
            assert "<" not in text
            json.loads(text)
            continue
        if tag == "style":
            continue
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in allowed["script-src"]
    return page


def figures(path: Path) -> list[str]:
    return re.findall(r'id="figure-([a-z]+)"', path.read_text(encoding="utf-8"))


def test_a_placement(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    """Its trace lies beside it, as it says."""
    out = tmp_path / "out.html"
    run(files["place"], "--against", files["old"], "--cluster", files["cluster"], "-o", out)
    page = looked_at(out)
    assert figures(out) == ["moved", "loads", "load", "experts", "crossings", "topology"]
    assert "open it in a browser" in capfd.readouterr().out
    shown = " ".join(page.texts)
    assert "<script>alert(1)</script>" in shown  # as text
    assert "\x1b" not in shown
    assert "\u202e" not in shown


def test_a_plan_with_what_it_cost(files: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    out = tmp_path / "out.html"
    run(files["plan"], files["report"], "--cluster", files["cluster"], "-o", out, "--json")
    body = json.loads(capfd.readouterr().out)
    assert body["figures"] == figures(out)
    assert {"parts", "predicted", "timeline", "topology"} <= {*body["figures"]}
    assert body["bytes"] == out.stat().st_size
    looked_at(out)


def test_a_plan_alone(files: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out.html"
    run(files["plan"], "-o", out)
    looked_at(out)
    assert "timeline" not in figures(out)


def test_equal_documents_are_equal_files(files: dict[str, Path], tmp_path: Path) -> None:
    for name in ("a.html", "b.html"):
        run(files["place"], "-o", tmp_path / name)
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_without_its_trace_a_placement_says_so(files: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "place.json").write_bytes(files["place"].read_bytes())
    run(tmp_path / "place.json", "-o", tmp_path / "out.html")
    assert figures(tmp_path / "out.html") == ["experts"]
    assert "Without the trace" in (tmp_path / "out.html").read_text()


def test_a_front_that_place_printed(files: dict[str, Path], tmp_path: Path) -> None:
    scores = Placement.read(files["place"]).scores["placement"].model_dump(mode="json")
    points = [{"name": name, "cap": 1.5, "on_front": True, "scores": scores} for name in ("coolest", "placement")]
    rest = {"part": "held_out", "dropped": 0, "missed": [], "steps": 1, "seconds": 1.0}
    front = {"points": points, "host": "boundary_cross_host", "device": "boundary_cross_device", **rest}
    printed = tmp_path / "printed.json"
    printed.write_text(json.dumps({"pareto": front}))
    run(files["place"], "--front", printed, "-o", tmp_path / "out.html")
    assert "front" in figures(tmp_path / "out.html")
    for wrong in ({}, {"pareto": 3}, {"pareto": front | {"points": []}}, {"pareto": front | {"part": "all"}}):
        printed.write_text(json.dumps(wrong))
        with pytest.raises(MoeplanError, match=r"printed\.json: pareto: .*--pareto"):
            run(files["place"], "--front", printed, "-o", tmp_path / "other.html")
    assert not (tmp_path / "other.html").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("report",), "expected a plan or a placement"),
        (("place", "report"), "REPORT goes with a plan"),
        (("plan", "--against", "old"), "--against goes with a placement"),
        (("plan", "plan"), "kind: expected 'moeplan.report'"),
        (("place", "--against", "plan"), "kind: expected 'moeplan.placement'"),
        (("place", "--cluster", "trace"), "cannot be read as UTF-8"),
        (("trace",), "make one with `moeplan place`"),
    ],
)
def test_what_does_not_go_together_is_refused(
    arguments: tuple[str, ...], said: str, files: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MoeplanError) as caught:
        run(*(files.get(argument, argument) for argument in arguments), "-o", tmp_path / "out.html")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert not (tmp_path / "out.html").exists()


def test_without_the_extra_the_error_names_it(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moeplan.service.extra.find_spec", lambda name: None if name == "plotly" else name)
    with pytest.raises(MoeplanError, match=r"plotly is not installed: pip install 'moeplan\[service\]'"):
        run(files["place"], "-o", tmp_path / "out.html")
    assert not (tmp_path / "out.html").exists()


def test_names_are_hostile() -> None:
    """Or these tests show nothing."""
    assert "<script>" in HOSTILE
    assert not HOSTILE.isprintable()
