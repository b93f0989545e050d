"""What commands say of their progress."""

import io
import time

from moeplan.service import console


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    """Every so many seconds what was heard last, also where nothing is heard."""
    written = io.StringIO()
    monkeypatch.setattr(console, "err", console.literal_console(file=written))
    monkeypatch.setattr(console, "SECONDS_A_LINE", 0.2)

    def wait_for(text: str) -> None:
        until = time.monotonic() + 20
        while text not in written.getvalue() and time.monotonic() < until:
            time.sleep(0.02)
        assert text in written.getvalue()

    with console.progress("profiling") as show:
        wait_for("profiling, 0 s: starting\n")
        show({"done": 1, "of": 8, "what": "links"})
        show({"done": 2, "of": 8, "what": "[links]"})
        wait_for(" s: 25%, [links]\n")
        assert " 12%" not in written.getvalue()
        show({"done": 8, "of": 8})
        wait_for(" s: 100%\n")
    ended = written.getvalue()
    time.sleep(0.5)
    assert written.getvalue() == ended


def test_a_terminal_gets_a_bar(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "err", console.literal_console(file=written, force_terminal=True, width=80))
    with console.progress("placing") as show:
        show({"done": 1, "of": 2, "what": "epoch"})
    assert "placing" in written.getvalue()
    assert "%" not in written.getvalue()
