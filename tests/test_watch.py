"""The command ``moeplan watch``: follows recordings, moves what pays, goes on after a restart."""

import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplan.planner.export import read_back
from moeplan.service import cli, watch_folder, watching
from moeplan.service.commands import watch as command
from moeplan.spec.errors import DocumentError
from moeplan.spec.placement import Placement
from moeplan.tests.exports import placement_of, small_model

Run = Callable[..., tuple[int, str, str]]
LAYERS, EXPERTS = 2, 8
HOT = np.array([[0.3, 0.3, 0.1, 0.1, 0.05, 0.05, 0.05, 0.05]] * LAYERS)
OTHER = HOT[:, ::-1]


def record(seed: int, share: np.ndarray, files: int, start: int = 0) -> None:
    """SGLang's statistics, a file every minute."""
    rng = np.random.default_rng(seed)
    for i in range(start, start + files):
        counts = torch.tensor(np.stack([rng.multinomial(600, row) for row in share])[None].astype(np.int32))
        path = Path("recordings") / f"expert_distribution_recorder_{i}.pt"
        torch.save({"rank": 0, "logical_count": counts}, path)
        os.utime(path, (1e9 + 60 * i, 1e9 + 60 * i))


@pytest.fixture
def moeplan(capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run the command in a folder with recordings, model.json and place.json (experts by number, 4 devices)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(command, "SETTLE", 0.02)
    Path("recordings").mkdir()
    small_model(EXPERTS, LAYERS, dense=0).write("model.json")
    placement_of([[[0, 1], [2, 3], [4, 5], [6, 7]]] * LAYERS, EXPERTS).write("place.json")

    def run(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["moeplan", "watch", "recordings", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capfd.readouterr()
        assert isinstance(stopped.value.code, int)
        return stopped.value.code, captured.out, " ".join(captured.err.split())

    return run


USUAL = ("--placement", "place.json", "--model", "model.json", "--once")


def log() -> list[dict]:
    return [json.loads(line) for line in Path("watch/log.jsonl").read_text().splitlines()]


def test_it_moves_once_traffic_is_known_and_again_when_it_changes(moeplan: Run) -> None:
    record(0, HOT, 24)
    code, out, err = moeplan(*USUAL, "--engine", "sglang")
    assert code == 0
    assert "moved" in out
    assert "traffic is known" in out
    assert "assumed: experts are 50% of serving time" in err
    first = Placement.read("watch/place.json")
    assert all(not {0, 1} <= set(held) for layer in first.layers for held in layer.slots)
    text = Path("watch/sglang-expert-location.json").read_text()
    model = command.load_model("model.json")
    assert read_back("sglang", text, 4, model) == tuple(layer.slots for layer in first.layers)
    record(1, OTHER, 40, 24)
    code, out, _ = moeplan(*USUAL, "--engine", "sglang")
    assert code == 0
    assert "going on after batch 24, decision 1" in out
    lines = log()
    assert [line["reason"] for line in lines] == ["learned", "drift", "learned"]
    assert [line["decision"] for line in lines] == [1, 2, 3]
    assert all(line["gain_seconds"] > line["cost_seconds"] for line in lines if line["copies"])
    assert lines[1]["copies"] > 0
    assert lines[1]["balance_after"] < lines[1]["balance_before"]
    assert lines[-1]["placement"] == Placement.read("watch/place.json").digest()


def test_nothing_is_decided_twice(moeplan: Run) -> None:
    record(0, HOT, 24)
    assert moeplan(*USUAL)[0] == 0
    before = {path.name: path.read_bytes() for path in Path("watch").iterdir() if path.name != "state.npz"}
    code, out, _ = moeplan(*USUAL)
    assert code == 0
    assert "moved" not in out
    assert {path.name: path.read_bytes() for path in Path("watch").iterdir() if path.name != "state.npz"} == before
    record(2, HOT, 60, 24)
    assert moeplan(*USUAL)[0] == 0
    assert len(log()) == 1  # unchanged traffic


def test_in_one_go_or_with_a_restart_in_the_middle_it_decides_the_same(moeplan: Run) -> None:
    record(0, HOT, 24)
    record(1, OTHER, 40, 24)
    assert moeplan(*USUAL, "-o", "whole")[0] == 0
    later = [Path("recordings") / f"expert_distribution_recorder_{i}.pt" for i in range(28, 64)]
    for path in later:
        path.rename(path.name)
    assert moeplan(*USUAL, "-o", "parts")[0] == 0
    for path in later:
        Path(path.name).rename(path)
    assert moeplan(*USUAL, "-o", "parts")[0] == 0
    whole, parts = ([json.loads(x) | {"time": ""} for x in (Path(f) / "log.jsonl").open()] for f in ("whole", "parts"))
    assert whole == parts
    assert len(whole) == 3
    assert Path("whole/place.json").read_text() == Path("parts/place.json").read_text()


@pytest.mark.parametrize("dies", ["place.json", "state.npz", "log.jsonl"])
def test_whoever_dies_in_a_decision_tells_it_once(moeplan: Run, dies: str) -> None:
    """Before the placement is written, before the state, and before the log: as a full disk would end it."""
    record(0, HOT, 24)

    def fail(*_: object) -> None:
        raise DocumentError(f"watch/{dies}: cannot be written (No space left on device)")

    names = {
        "place.json": (watching.Watching, "write"),
        "state.npz": (watching, "save"),
        "log.jsonl": (watching, "tell"),
    }
    with pytest.MonkeyPatch.context() as broken:
        broken.setattr(*names[dies], fail)
        code, out, err = moeplan(*USUAL)
    assert code == 2
    assert "No space left on device" in err
    assert "moved" not in out
    assert not Path("watch/log.jsonl").exists()
    assert moeplan(*USUAL)[0] == 0
    (line,) = log()
    assert line["decision"] == 1
    assert line["placement"] == Placement.read("watch/place.json").digest()
    assert moeplan(*USUAL)[0] == 0
    assert len(log()) == 1


def test_a_full_disk_leaves_what_was_there(moeplan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    record(0, HOT, 24)
    assert moeplan(*USUAL, "--engine", "sglang")[0] == 0
    kept = {path.name: path.read_bytes() for path in Path("watch").iterdir()}
    record(1, OTHER, 40, 24)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    code, _, err = moeplan(*USUAL, "--engine", "sglang")
    assert code == 2
    assert "No space left on device" in err
    assert {path.name: path.read_bytes() for path in Path("watch").iterdir()} == kept


def test_half_a_line_of_the_log_is_left_and_the_next_begins_anew(moeplan: Run) -> None:
    record(0, HOT, 24)
    assert moeplan(*USUAL)[0] == 0
    path = Path("watch/log.jsonl")
    path.write_text(path.read_text() + '{"decision": 2, "ti')
    record(1, OTHER, 40, 24)
    assert moeplan(*USUAL)[0] == 0
    lines = path.read_text().splitlines()
    assert lines[1] == '{"decision": 2, "ti'
    assert [json.loads(line)["decision"] for line in (lines[0], *lines[2:])] == [1, 2, 3]


def test_a_second_watcher_of_one_output_is_refused(moeplan: Run) -> None:
    record(0, HOT, 2)
    with watch_folder.owned(Path("watch")):
        code, _, err = moeplan(*USUAL)
    assert code == 2
    assert err == "error: watch: another watch writes there: stop it, or name another --output"
    assert moeplan(*USUAL)[0] == 0


def test_foreign_files_are_said_once_and_stop_nothing(moeplan: Run) -> None:
    record(0, HOT, 3)
    (Path("recordings") / "notes.txt").write_text("x")
    (Path("recordings") / "broken.pt").write_bytes(b"PK")
    code, out, err = moeplan(*USUAL)
    assert code == 0
    assert "'notes.txt': no recording" in err
    assert "broken.pt" in err
    assert "read 3; balance now" in out
    assert "learning: 3 of 20 batches or more" in out
    assert "note: 'notes.txt'" not in moeplan(*USUAL)[2]


def test_json_is_a_line_for_each_decision(moeplan: Run) -> None:
    record(0, HOT, 24)
    code, out, _ = moeplan(*USUAL, "--json")
    assert code == 0
    (line,) = [json.loads(text) for text in out.splitlines()]
    assert line == log()[0]


def test_it_begins_with_experts_by_number_where_no_placement_is_named(moeplan: Run) -> None:
    record(0, HOT, 24)
    code, out, _ = moeplan("--devices", 4, "--model", "model.json", "--once")
    assert code == 0
    assert "moved" in out
    assert moeplan("--model", "model.json", "--once")[0] == 0  # the state knows


def test_max_moves_are_kept(moeplan: Run) -> None:
    record(0, HOT, 24)
    assert moeplan(*USUAL, "--max-moves", 2)[0] == 0
    (line,) = log()
    assert 1 <= line["copies"] <= 2
    moves = Placement.read("watch/place.json").moves
    assert moves is not None
    assert moves.copies == line["copies"]


def test_ctrl_c_ends_it_with_the_state_kept(moeplan: Run) -> None:
    record(0, HOT, 3)
    timer = threading.Timer(1.5, os.kill, (os.getpid(), 2))
    timer.start()
    code, out, _ = moeplan(*USUAL[:-1], "--interval", "0.1s")
    timer.join()
    assert code == 0
    assert "read 3; balance now" in out
    assert "going on after batch 3" in moeplan(*USUAL)[1]


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (("--once",), "name what serves now: --placement place.json, or --devices N with --model"),
        (("--devices", 4, "--once"), "--devices needs --model"),
        (("--placement", "place.json", "--once"), "does not know how large its experts are: give --model"),
        ((*USUAL, "--devices", 4), "--devices and --hosts do not go with --placement"),
        (("--placement", "place.json", "--engine", "sglang"), "--engine sglang needs --model"),
        ((*USUAL, "--engine", "megatron"), "its recordings are not followed; expected one of"),
        ((*USUAL, "--engine", "sgalng"), "unknown; nearest: sglang"),
        ((*USUAL, "--interval", "soon"), "--interval 'soon': expected a duration above 0"),
        ((*USUAL, "--horizon", "0"), "--horizon '0': expected a duration above 0"),
        ((*USUAL, "--link-rate", "fast"), "--link-rate 'fast': expected a positive number"),
        (("--devices", 3, "--model", "model.json"), "--devices 3: 8 experts do not divide over them"),
        (("--placement", "none.json", "--once"), "none.json: no such file"),
        (("--placement", "place.json", "--model", "mixtral", "--once"), "32 layers with experts, the placement has 2"),
    ],
)
def test_bad_input_is_one_line(moeplan: Run, args: tuple, says: str) -> None:
    code, _, err = moeplan(*args)
    assert code == 2
    assert says in err
    assert "Traceback" not in err
    assert not list(Path().glob("watch/place.json"))


def test_a_state_of_something_else_is_refused(moeplan: Run) -> None:
    record(0, HOT, 3)
    assert moeplan(*USUAL)[0] == 0
    placement_of([[[0, 2], [1, 3], [4, 5], [6, 7]]] * LAYERS, EXPERTS).write("other.json")
    code, _, err = moeplan("--placement", "other.json", *USUAL[2:])
    assert code == 2
    assert "its state began with another placement" in err
    state = Path("watch/state.npz")
    whole = state.read_bytes()
    for damaged in (whole[:200], b"", b"x" * 100):
        state.write_bytes(damaged)
        code, _, err = moeplan(*USUAL)
        assert code == 2
        assert err.startswith("error: watch/state.npz")
        assert "remove the folder to begin anew" in err
    np.savez(state, facts=np.frombuffer(b'{"version": 1}', np.uint8))
    code, _, err = moeplan(*USUAL)
    assert code == 2
    assert "damaged, or of another version" in err


def test_a_folder_of_recordings_that_is_missing_is_one_line(moeplan: Run) -> None:
    Path("recordings").rmdir()
    for _ in range(2):
        code, _, err = moeplan(*USUAL)
        assert code == 2
        assert err.startswith("error: ")
        assert "recordings': no such folder; name the one that the engine's recorder writes to" in err
        assert not Path("watch").exists()
        Path("recordings").unlink(missing_ok=True)
        Path("recordings").write_text("a file")


def test_a_look_that_finds_nothing_says_so(moeplan: Run) -> None:
    assert "recordings: holds no recording that has not been read" in moeplan(*USUAL)[2]
    record(0, HOT, 2)
    assert "has not been read" not in moeplan(*USUAL)[2]
    assert "has not been read" in moeplan(*USUAL)[2]
