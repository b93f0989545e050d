"""Pictures of the page for the documents: ``python -m moeplan.benchmarks.page_pictures docs/page``.

A service of its own places the example's trace twice; the page is looked at in light and dark, wide and narrow. Needs
the extra ``service``, Playwright and /usr/bin/chromium.
"""

import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread
from typing import Any

import uvicorn
from playwright.sync_api import Page, sync_playwright

from moeplan.service.http.app import create_app
from moeplan.service.jobs.settings import Settings

TRACE = Path(__file__).parents[1] / "examples" / "tiny_moe" / "trace.npz"
WIDE, NARROW = {"width": 1000, "height": 760}, {"width": 360, "height": 740}
SECONDS = 20  # of a search


@contextmanager
def service() -> Iterator[str]:
    """Its address."""
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        app = create_app(Settings(store=f"{folder}/store", port=port, workers=1))
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning"))
        thread = Thread(target=server.run)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.05)
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.should_exit = True
            thread.join()


@contextmanager
def page_of(browser: Any, address: str, size: dict[str, int], scheme: str = "light") -> Iterator[Page]:
    context = browser.new_context(viewport=size, color_scheme=scheme, base_url=address)
    try:
        yield context.new_page()
    finally:
        context.close()


def place(page: Page, hosts: int, folder: Path | None = None) -> str:
    """Ask for a placement on eight devices and wait for it; its path. folder: for a picture of the form."""
    page.goto("/")
    page.set_input_files("#trace", TRACE)
    page.fill("#hosts", str(hosts))
    page.click("text=More options")
    page.fill("#time_limit", str(SECONDS))
    if folder is not None:
        page.screenshot(path=folder / "place.png")
    page.click("main button[type=submit]")
    page.wait_for_url("**/jobs/*")
    page.wait_for_selector("#take", timeout=120_000)
    return page.url


def drawn(page: Page, path: str) -> None:
    page.goto(path)
    if page.locator("figure.drawing").count():
        page.wait_for_selector("figure.drawing .main-svg")
    page.wait_for_timeout(1500)


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with service() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=arguments)
        with page_of(browser, address, WIDE) as page:
            first = place(page, 2, folder)
            second = place(page, 4)
            drawn(page, first)
            page.screenshot(path=folder / "result.png")
            page.evaluate("document.querySelector('#section-where').scrollIntoView()")
            page.locator("#figure-progress").screenshot(path=folder / "search.png")
            drawn(page, f"/compare?a={first.rsplit('/', 1)[-1]}&b={second.rsplit('/', 1)[-1]}")
            page.evaluate("document.querySelector('#figure-moved').scrollIntoView()")
            page.screenshot(path=folder / "compare.png")
        with page_of(browser, address, WIDE, "dark") as page:
            drawn(page, first)
            page.evaluate("document.querySelector('#section-where').scrollIntoView()")
            page.screenshot(path=folder / "dark.png")
        with page_of(browser, address, NARROW, "dark") as page:
            drawn(page, first)
            page.evaluate("document.querySelector('#section-where').scrollIntoView()")
            page.screenshot(path=folder / "narrow.png")
        browser.close()
    for path in sorted(folder.glob("*.png")):
        print(f"{path}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
