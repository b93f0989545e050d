"""The service's page in a browser: a newcomer's path, the keyboard, narrow screens, and nothing from elsewhere."""

import json
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from moeplan.planner.export import export
from moeplan.spec.catalogue import load_model
from moeplan.spec.placement import Placement
from moeplan.tests.routings import chained_trace

BROWSER = "/usr/bin/chromium"
sync_api = pytest.importorskip("playwright.sync_api", reason="Playwright is in moeplan[dev]")
uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is in moeplan[service]")
if not os.path.exists(BROWSER):
    pytest.skip(f"needs a browser, {BROWSER}", allow_module_level=True)

from moeplan.service.http.app import create_app  # noqa: E402
from moeplan.service.jobs.settings import Settings  # noqa: E402
from moeplan.service.web import forms  # noqa: E402
from moeplan.service.web.content import Section  # noqa: E402
from moeplan.service.web.figures.front import PrintedFront, front_figure  # noqa: E402
from moeplan.service.web.report import report_html  # noqa: E402
from moeplan.tests.web_documents import placed, recorded  # noqa: E402

MODEL, LAYERS, EXPERTS, TOP_K = "deepseek-v2-lite", 26, 64, 6


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A service of its own on the loopback address; searches are short."""
    usual = dict(forms.PLACE)
    forms.PLACE["time_limit"] = "3"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    app = create_app(Settings(store=str(tmp_path_factory.mktemp("store") / "store"), port=port, workers=1))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="error"))
    thread = Thread(target=server.run, daemon=True)
    thread.start()
    for _ in range(600):
        if server.started or not thread.is_alive():
            break
        time.sleep(0.05)
    assert server.started
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(60)
    forms.PLACE.update(usual)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        # Chromium refuses its sandbox to root, as whom CI runs.
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = playwright.chromium.launch(executable_path=BROWSER, args=arguments)
        yield browser
        browser.close()


class Tab:
    """A page that notes what it loads and what goes wrong."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(accept_downloads=True, base_url=address, **options)
        self.context.set_default_timeout(30_000)
        self.page = self.context.new_page()
        self.wrong: list[str] = []
        self.page.on("console", lambda message: self._note(message.type, message.text))
        self.page.on("pageerror", lambda error: self.wrong.append(f"error: {error}"))
        self.page.on("request", lambda request: self._loads(request.url, address))

    def _note(self, kind: str, text: str) -> None:
        if kind in ("error", "warning") and "the server responded with a status of 4" not in text:
            self.wrong.append(f"{kind}: {text}")

    def _loads(self, url: str, address: str) -> None:
        if not url.startswith((address + "/", "data:", "blob:")):
            self.wrong.append(f"loads {url}")

    def fits(self) -> bool:
        """Whether nothing is wider than the screen."""
        return self.page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")

    def drawn(self) -> None:
        """Wait until every figure has its picture."""
        self.until("[...document.querySelectorAll('figure.drawing')].every(f => f.querySelector('.main-svg'))")

    def until(self, what: str) -> None:
        """Wait until an expression is true; the page's policy keeps Playwright from doing that in the page."""
        for _ in range(300):
            if self.page.evaluate(what):
                return
            self.page.wait_for_timeout(100)
        raise AssertionError(f"never {what}")


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Tab]:
    tab = Tab(browser, address)
    yield tab
    tab.context.close()
    assert tab.wrong == []


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trace") / "<b>recorded & named.npz"
    chained_trace(0, LAYERS, EXPERTS, 512, TOP_K).write(path)
    return path


@pytest.fixture(scope="module")
def result(browser: Any, address: str, trace: Path) -> str:
    """Path of a finished placement, reached as a newcomer does; the clicks are counted."""
    tab, clicks = Tab(browser, address), 0
    tab.page.goto("/")
    tab.page.set_input_files("#trace", trace)  # the first click opens the browser's own dialogue
    clicks += 1
    tab.page.fill("#model", MODEL)
    tab.page.click("main button[type=submit]")
    clicks += 1
    tab.page.wait_for_url("**/jobs/*")
    tab.page.wait_for_selector("#take", timeout=90_000)
    with tab.page.expect_download() as download:
        tab.page.click("#take button[type=submit]")
        clicks += 1
    assert clicks <= 5
    path = Path(download.value.path())
    job = re.search(r"/jobs/([0-9a-f]{32})", tab.page.url)
    assert job is not None
    with tab.page.expect_download() as document:
        tab.page.click("text=place.json")
    placement = Placement.read(document.value.path())
    files = export(placement, "sglang", load_model(MODEL)).files
    assert download.value.suggested_filename in files
    assert path.read_text() == files[download.value.suggested_filename]
    assert tab.wrong == []
    tab.context.close()
    return f"/jobs/{job[1]}"


def test_five_clicks_from_a_trace_to_an_engines_file(result: str, tab: Tab) -> None:
    """What is counted and compared is in the fixture; here the page that it ends on."""
    tab.page.goto(result)
    tab.drawn()
    said = tab.page.inner_text("main")
    assert "linear" in said
    assert "EPLB" in said
    assert MODEL in said
    assert tab.page.locator("#figure-experts").count() == 1
    tab.page.wait_for_selector("#engine pre")
    assert "--init-expert-location" in tab.page.inner_text("#engine")
    tab.page.select_option("#figure-experts select", "3")
    rows = tab.page.locator("#figure-experts table.numbers tbody tr")
    assert rows.count() == 8


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_do_not_scroll_sideways(scheme: str, result: str, browser: Any, address: str) -> None:
    tab = Tab(browser, address, viewport={"width": 360, "height": 740}, color_scheme=scheme)
    for path in ("/", "/solve", "/jobs", "/compare", result):
        tab.page.goto(path)
        tab.drawn()
        assert tab.fits(), path
    back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
    light = sum(map(int, re.findall(r"\d+", back)[:3])) > 384
    assert light == (scheme == "light")
    assert tab.wrong == []
    tab.context.close()


def test_with_the_keyboard_alone(result: str, tab: Tab, trace: Path) -> None:
    """Tab reaches every control in order, and Enter sends the form. Only the file is given as its dialogue would."""
    tab.page.goto("/")
    reached = []
    for _ in range(14):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
    wanted = ["To the content", "moeplan", "Place", "Solve", "Jobs", "Compare", "trace"]
    assert reached[: len(wanted)] == wanted
    assert reached.index("devices") < reached.index("hosts") < reached.index("model")
    tab.page.set_input_files("#trace", trace)
    tab.page.focus("#devices")
    tab.page.keyboard.press("Control+A")
    tab.page.keyboard.type("4")
    tab.page.keyboard.press("Enter")
    tab.page.wait_for_url("**/jobs/*")
    tab.page.focus("main form button")
    tab.page.keyboard.press("Enter")  # cancel: it ends with the best found, or had ended before
    tab.page.wait_for_selector("#take, [role=alert]", timeout=60_000)


def test_tables_open_with_the_keyboard(tab: Tab, result: str) -> None:
    tab.page.goto(result)
    tab.drawn()
    tab.page.focus("#figure-load summary")
    tab.page.keyboard.press("Enter")
    assert tab.page.locator("#figure-load table.numbers tbody tr").count() == 8
    assert tab.page.locator("#figure-load table.numbers").is_visible()


def test_points_of_a_front_are_picked_with_mouse_and_keyboard(browser: Any, tmp_path: Path) -> None:
    scores = placed(1, recorded()).scores["placement"].model_dump(mode="json")
    moved = {"boundary_cross_host": 0.2, "boundary_cross_device": 0.5}
    points = [
        {"name": "cap", "cap": None, "on_front": True, "scores": {"fit": scores["fit"] | moved | {"balance_mean": x}}}
        for x in (1.1, 1.2, 1.4)
    ]
    rest = {"part": "fit", "dropped": 0, "missed": [], "steps": 1, "seconds": 1.0}
    fields = {"host": "boundary_cross_host", "device": "boundary_cross_device"}
    front = PrintedFront.model_validate({"points": points, **rest, **fields})
    path = tmp_path / "front.html"
    path.write_text(report_html("front", [], [Section("front", "Front", figures=[front_figure(front)])]))
    tab = Tab(browser, f"file://{tmp_path}")
    tab.page.goto(f"file://{path}")
    tab.drawn()
    rows = tab.page.locator("table.numbers tbody tr")
    assert rows.count() == 3
    tab.page.focus("summary")
    tab.page.keyboard.press("Enter")
    rows.nth(1).focus()
    tab.page.keyboard.press("Enter")
    chosen = [rows.nth(i).get_attribute("aria-selected") for i in range(3)]
    assert chosen == ["false", "true", "false"]
    tab.page.locator(".points path.point").nth(2).click(force=True)
    tab.until("document.querySelectorAll('tbody tr')[2].getAttribute('aria-selected') === 'true'")
    assert tab.wrong == []
    tab.context.close()


def test_two_results_are_compared(tab: Tab, result: str, trace: Path) -> None:
    tab.page.goto("/")
    tab.page.set_input_files("#trace", trace)
    tab.page.fill("#hosts", "2")
    tab.page.click("main button[type=submit]")
    tab.page.wait_for_selector("#take", timeout=90_000)
    tab.page.click("text=Compare with another")
    tab.page.select_option("#a", result.rsplit("/", 1)[-1])
    tab.page.click("main button[type=submit]")
    tab.drawn()
    assert tab.page.locator("#figure-moved").count() == 1
    assert "From A to B the devices load" in tab.page.inner_text("main")


def test_errors_come_back_in_one_line_beside_the_form(tab: Tab, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.npz"
    wrong.write_bytes(b"no archive")
    tab.page.goto("/")
    tab.page.set_input_files("#trace", wrong)
    tab.page.fill("#devices", "6")
    tab.page.click("main button[type=submit]")
    alert = tab.page.wait_for_selector("[role=alert]")
    assert "wrong.npz" in alert.inner_text()
    assert tab.page.input_value("#devices") == "6"
    tab.page.goto("/jobs/" + "0" * 32)
    assert "unknown" in tab.page.inner_text("[role=alert]")


def test_names_of_files_are_drawn_as_they_are(tab: Tab, result: str) -> None:
    tab.page.goto("/")
    options = tab.page.locator("#trace-known option").all_inner_texts()
    assert any("recorded" in text for text in options)
    assert tab.page.locator("#trace-known b").count() == 0


def test_the_report_is_whole(tab: Tab, result: str, tmp_path: Path, browser: Any) -> None:
    tab.page.goto(result)
    with tab.page.expect_download() as download:
        tab.page.click("text=This page as one file")
    path = tmp_path / "report.html"
    download.value.save_as(path)
    alone = Tab(browser, f"file://{tmp_path}")
    alone.page.goto(f"file://{path}")
    alone.drawn()
    assert alone.page.locator("figure.drawing").count() >= 3
    assert alone.wrong == []
    alone.context.close()


def test_other_sites_cannot_send_forms(address: str) -> None:
    import httpx

    with httpx.Client(base_url=address) as client:
        for origin in ({}, {"origin": "http://evil.example"}, {"origin": "null"}, {"sec-fetch-site": "cross-site"}):
            for path in ("/place", "/solve", "/login", f"/jobs/{'0' * 32}/cancel"):
                answer = client.post(path, headers=origin, data={"devices": "2"})
                assert answer.status_code == 403, (origin, path)
        start = client.get("/")
        policy = start.headers["content-security-policy"]
        assert "script-src 'self';" in policy
        assert "frame-ancestors 'none'" in policy
        assert "<script>" not in start.text
        assert not re.search(r"\son[a-z]+=", start.text)
        assert client.get("/static/..%2froutes.py").status_code == 404
        assert client.get("/static/routes.py").status_code == 404
        assert client.get("/static/plotly.min.js").status_code == 200
        assert json.loads(client.get("/healthz").text)["status"] == "ok"
