"""What commands say of their progress."""

import io

from moeplan.service import console


def test_a_log_gets_a_line_now_and_then(monkeypatch):
    """The first after ten seconds, none within ten of the last."""
    written, now = io.StringIO(), [100.0]
    monkeypatch.setattr(console, "err", console.literal_console(file=written))
    monkeypatch.setattr(console, "monotonic", lambda: now[0])
    with console.progress("profiling") as show:
        for seconds, event in [
            (4, {"done": 1, "of": 8, "what": "links"}),
            (12, {"done": 2, "of": 8, "what": "[links]"}),
            (20, {"done": 3, "of": 8, "what": "links"}),
            (23, {"what": "the rest"}),
            (40, {"done": 8, "of": 8}),
        ]:
            now[0] = 100.0 + seconds
            show(event)
    assert written.getvalue().splitlines() == [
        "profiling, 12 s: 25%, [links]",
        "profiling, 23 s: the rest",
        "profiling, 40 s: 100%",
    ]


def test_a_terminal_gets_a_bar(monkeypatch):
    written = io.StringIO()
    monkeypatch.setattr(console, "err", console.literal_console(file=written, force_terminal=True, width=80))
    with console.progress("placing") as show:
        show({"done": 1, "of": 2, "what": "epoch"})
    assert "placing" in written.getvalue()
    assert "%" not in written.getvalue()
