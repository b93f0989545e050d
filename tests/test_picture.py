"""Pictures: their kinds, the same bytes again, and bad endings refused before any work."""

import sys
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from moeplan.service import cli
from moeplan.spec.errors import MoeplanError
from moeplan.spec.picture import picture_kind, save_picture

STARTS = {"a.png": b"\x89PNG", "a.svg": b"<?xml", "a.pdf": b"%PDF", "a.PNG": b"\x89PNG", "a": b"\x89PNG"}


def figure() -> Figure:
    drawn = Figure(figsize=(1, 1))
    drawn.subplots().plot([0, 1])
    return drawn


@pytest.mark.parametrize("name", STARTS)
def test_the_ending_is_the_kind(tmp_path: Path, name: str) -> None:
    first = save_picture(figure(), tmp_path / name).read_bytes()
    assert first.startswith(STARTS[name])
    assert save_picture(figure(), tmp_path / name).read_bytes() == first


@pytest.mark.parametrize("name", ["a.html", "b.png.txt", "c.jpeg"])
def test_other_kinds_are_refused_and_nothing_is_written(tmp_path: Path, name: str) -> None:
    for act in (picture_kind, lambda path: save_picture(figure(), path)):
        with pytest.raises(MoeplanError, match=r"no picture of kind '\.\w+': use \.png, \.svg or \.pdf"):
            act(tmp_path / name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "command",
    [
        ["place", "--trace", "missing.npz", "--pareto", "front.html"],
        ["run", "missing.json", "--picture", "r.html"],
        ["explain", "missing.json", "--picture", "r.html"],
        ["trace", "stats", "missing.npz", "--picture", "r.html"],
    ],
)
def test_commands_refuse_before_they_work(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, command: list[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["moeplan", *command])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "no picture of kind '.html'" in " ".join(capfd.readouterr().err.split())
