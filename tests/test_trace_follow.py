"""Following a folder of recordings: each is read once and whole, whatever else lies there."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplan.profiler.traces import follow
from moeplan.profiler.traces.follow import Follower, Recorded, Refused
from moeplan.spec.errors import DocumentError
from moeplan.spec.trace import Trace
from moeplan.tests.recordings import FIRST, FIRST_LOGICAL, MAP, E, per_token, save_records
from moeplan.tests.routings import random_trace

SHAPE = (2, 8)


def write(folder: Path, name: str, seed: int, when: float = 1e9) -> Trace:
    trace = random_trace(seed, *SHAPE, tokens=80)
    path = trace.write(folder / name)
    os.utime(path, (when, when))
    return trace


def twice(follower: Follower) -> list[Recorded | Refused]:
    """What two looks bring: a recording that does not grow is complete at the second."""
    return [*follower.look(), *follower.look()]


def refusals(found: list[Recorded | Refused]) -> list[str]:
    lines = [one.why for one in found if isinstance(one, Refused)]
    assert all("\n" not in line and len(line) < 700 and line.isprintable() for line in lines)
    return lines


def test_a_recording_is_read_once_when_it_has_stopped_growing(tmp_path: Path) -> None:
    trace = write(tmp_path, "a.npz", 0)
    follower = Follower(tmp_path, None, SHAPE)
    assert list(follower.look()) == []
    assert follower.waiting
    (found,) = follower.look()
    assert isinstance(found, Recorded)
    assert (found.name, found.when) == ("a.npz", 1e9)
    assert (sum(found.counts) == trace.expert_counts).all()
    assert len(found.counts) == follow.PARTS
    assert twice(follower) == []
    assert not follower.waiting


def test_the_oldest_comes_first(tmp_path: Path) -> None:
    for seed, (name, when) in enumerate([("b.npz", 1e9), ("c.npz", 1.1e9), ("a.npz", 1.2e9)]):
        write(tmp_path, name, seed, when)
    assert [one.name for one in twice(Follower(tmp_path, None, SHAPE))] == ["b.npz", "c.npz", "a.npz"]


def test_what_grows_waits_and_half_a_file_is_read_when_it_is_whole(tmp_path: Path) -> None:
    write(tmp_path, "whole.npz", 0)
    content = (tmp_path / "whole.npz").read_bytes()
    (tmp_path / "whole.npz").unlink()
    follower, path = Follower(tmp_path, None, SHAPE), tmp_path / "a.npz"
    for end in (100, 200, 300):
        path.write_bytes(content[:end])
        assert list(follower.look()) == []
    # The writer pauses in the middle: told once, not again.
    (line,) = refusals(list(follower.look()))
    assert "a.npz" in line
    assert twice(follower) == []
    path.write_bytes(content)
    assert [type(one) for one in twice(follower)] == [Recorded]


def test_foreign_damaged_and_hostile_files_are_a_line_each(tmp_path: Path) -> None:
    write(tmp_path, "good.npz", 0)
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "noise.npz").write_bytes(os.urandom(500))
    (tmp_path / "broken.json").write_text('{"logical_count": [[1, 2')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "nan.json").write_text('{"logical_count": [[NaN, 2, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1]]}')
    torch.save({"logical_count": torch.nn.Linear(1, 1)}, tmp_path / "code.pt")  # a class: loading it would run code
    random_trace(1, 3, 8, tokens=80).write(tmp_path / "layers.npz")
    (tmp_path / "bad\nname.pt").write_bytes(b"x")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe.pt")
    (tmp_path / "dangling.pt").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden.pt").write_bytes(b"x")
    (tmp_path / "later.npz.tmp").write_bytes(b"x")
    follower = Follower(tmp_path, None, SHAPE)
    found = twice(follower)
    assert [one.name for one in found if isinstance(one, Recorded)] == ["good.npz"]
    named = {one.name for one in found if isinstance(one, Refused)}
    assert named == {
        "notes.txt", "empty.pt", "noise.npz", "broken.json", "deep.json", "nan.json", "code.pt", "layers.npz",
        "bad\nname.pt", "folder", "pipe.pt",
    }  # fmt: skip
    lines = refusals(found)
    assert any("3 layers x 8 experts, left out: the placement has 2 x 8" in line for line in lines)
    assert any("loading it could run code" in line for line in lines)
    assert twice(follower) == []


def test_what_vanishes_is_forgotten_and_may_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "a.npz", 0)
    write(tmp_path, "b.npz", 1)
    follower = Follower(tmp_path, None, SHAPE)
    assert list(follower.look()) == []
    real = follow.import_trace

    def gone(path: Path, kind: str | None) -> object:
        path.unlink()  # between the look and the reading
        return real(path, kind)

    monkeypatch.setattr(follow, "import_trace", gone)
    assert list(follower.look()) == []
    monkeypatch.undo()
    assert twice(follower) == []
    assert not follower.read
    assert not follower.refused
    write(tmp_path, "a.npz", 0)
    assert [one.name for one in twice(follower)] == ["a.npz"]


def test_a_recording_that_changes_after_it_was_read_is_not_counted_again(tmp_path: Path) -> None:
    write(tmp_path, "a.npz", 0)
    follower = Follower(tmp_path, None, SHAPE)
    assert len(twice(follower)) == 1
    write(tmp_path, "a.npz", 1, 1.5e9)
    (line,) = refusals(twice(follower))
    assert "changed after it was read" in line
    assert twice(follower) == []


def test_ranks_with_the_same_counts_count_once(tmp_path: Path) -> None:
    counts = torch.arange(1, 17, dtype=torch.int32).reshape(1, 2, 8)
    for rank in range(3):
        torch.save({"rank": rank, "logical_count": counts}, tmp_path / f"recorder_{rank}.pt")
    found = twice(Follower(tmp_path, "sglang", SHAPE))
    assert [type(one) for one in found] == [Recorded, Refused, Refused]
    assert "counted once" in refusals(found)[0]


def test_a_folder_is_one_recording_of_several_ranks(tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    for rank in (0, 1):
        save_records(tmp_path / "first" / f"r_{rank}.pt", [per_token(7, rank, [5, 6, 7], [3], FIRST)], MAP)
    (found,) = twice(Follower(tmp_path, "sglang", (2, E)))
    assert isinstance(found, Recorded)
    expected = Trace.of(np.array(FIRST_LOGICAL), E).expert_counts
    assert (sum(found.counts) == expected).all()


def test_statistics_of_tensorrt_llm_are_folders(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    part = tmp_path / "one"
    part.mkdir()
    (part / "meta_info.json").write_text(json.dumps({"num_experts": 8, "num_experts_per_token": 2}))
    save_file({f"0_{layer}": torch.arange(8) + layer + 1 for layer in (3, 4)}, part / "rank0.safetensors")
    (found,) = twice(Follower(tmp_path, "tensorrt-llm", SHAPE))
    assert isinstance(found, Recorded)
    assert found.counts[0].tolist() == [list(range(4, 12)), list(range(5, 13))]
    with pytest.raises(DocumentError, match="name the folder that recordings are made in"):
        list(Follower(part, "tensorrt-llm", SHAPE).look())


def test_too_many_at_once_wait_for_the_next_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "MOST_READ", 2)
    for seed in range(5):
        write(tmp_path, f"{seed}.npz", seed, 1e9 + seed)
    follower = Follower(tmp_path, None, SHAPE)
    looks = [[one.name for one in follower.look()] for _ in range(4)]
    assert looks == [[], ["0.npz", "1.npz"], ["2.npz", "3.npz"], ["4.npz"]]


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in (tmp_path / "none", tmp_path / "file", Path("a\0b")):
        if path.name == "file":
            path.write_text("x")
        with pytest.raises(DocumentError, match="cannot be read"):
            list(Follower(path, None, SHAPE).look())
    monkeypatch.setattr(follow, "MOST_ENTRIES", 3)
    for seed in range(4):
        (tmp_path / f"{seed}.pt").write_text("x")
    with pytest.raises(DocumentError, match="move old recordings away"):
        list(Follower(tmp_path, None, SHAPE).look())


def test_a_time_in_the_future_counts_as_now(tmp_path: Path) -> None:
    write(tmp_path, "a.npz", 0, 9e9)
    (found,) = twice(Follower(tmp_path, None, SHAPE))
    assert isinstance(found, Recorded)
    assert found.when < 8e9


def test_a_restart_goes_on_where_it_was(tmp_path: Path) -> None:
    write(tmp_path, "a.npz", 0)
    (tmp_path / "x.txt").write_text("x")
    first = Follower(tmp_path, None, SHAPE)
    assert len(twice(first)) == 2
    second = Follower(tmp_path, None, SHAPE, first.read, first.refused, first.counted)
    assert twice(second) == []
    write(tmp_path, "b.npz", 1)
    assert [one.name for one in twice(second)] == ["b.npz"]
