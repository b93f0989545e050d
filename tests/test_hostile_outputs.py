"""Outputs: what a path stands for decides what is written, before the work; two writers add up."""

import errno
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import IO

import pytest

from moeplan import MoeplanError, Workload
from moeplan.service import cli
from moeplan.service.commands import profile as profile_command
from moeplan.spec import Cluster
from moeplan.spec.output import check_output, write_atomically
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

DOCUMENT = Workload.from_text("decode:4")


def command(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    """Exit code and standard error of a command in this process."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, argv)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, capfd.readouterr().err


def unwritable(folder: Path) -> list[tuple[Path, str]]:
    """Paths that no document can be written to, and what is said of each."""
    os.mkfifo(folder / "fifo")
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "to-fifo").symlink_to("fifo")
    return [
        (folder, "a folder"),
        (folder / "fifo", "a FIFO"),
        (folder / "to-fifo", "a FIFO"),
        (folder / "file" / "x.json", "Not a directory"),
        (folder / "loop", ""),
        (folder / ("x" * 300), "too long"),
        (Path("/proc/x"), ""),
        (Path("/proc/sys/kernel/x.json"), ""),
        (Path("/dev/mem"), "a device"),
        (Path("/dev/fd/0"), ""),
        (Path("a\0b"), "null"),
    ]


def test_what_cannot_be_written_is_refused_before_and_at_the_write(tmp_path: Path) -> None:
    for path, reason in unwritable(tmp_path):
        if str(path).startswith("/dev/mem") and not path.exists():
            continue
        before = sorted(os.listdir(tmp_path))
        for act in (check_output, DOCUMENT.write):
            with pytest.raises(MoeplanError, match=f"cannot be written .*{reason}") as refused:
                act(path)
            assert str(refused.value).isprintable()
        assert sorted(os.listdir(tmp_path)) == before
    assert stat.S_ISFIFO((tmp_path / "fifo").lstat().st_mode)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    "argv",
    [
        ["run", "missing.json", "-o"],
        ["run", "missing.json", "--picture"],
        ["solve", "-m", "mixtral", "-o"],
        ["place", "--trace", "missing.npz", "-o"],
        ["place", "--trace", "missing.npz", "--pareto"],
        ["profile", "-m", "tiny-moe", "-o"],
        ["explain", "missing.json", "--picture"],
        ["trace", "import", "missing.npz", "-o"],
        ["trace", "capture", "-m", "none", "--text", "none", "-o"],
        ["trace", "stats", "missing.npz", "--picture"],
    ],
    ids=lambda argv: " ".join(argv),
)
def test_every_command_looks_at_its_outputs_first(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The inputs are missing, which is not what is complained of: the output is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    for path in ("folder.png", "/proc/x.png"):
        code, err = command(monkeypatch, capfd, *argv, path)
        assert code == 2
        assert err.startswith(f"error: {path}: cannot be written")
        assert err.count("\n") == 1


def test_a_full_disk_is_seen_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(MoeplanError, match="No space left"):
        check_output(tmp_path / "w.json")
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_meanwhile_leaves_no_half_file(tmp_path: Path) -> None:
    def fill(file: IO[bytes]) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(MoeplanError, match=r"w.json: cannot be written \(No space left on device\)"):
        write_atomically(tmp_path / "w.json", fill)
    assert not list(tmp_path.iterdir())


def test_links_are_followed_and_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    for name, target in (("new", "real/new.json"), ("old", "real/old.json")):
        (tmp_path / name).symlink_to(target)
    (tmp_path / "real" / "old.json").write_text("before")
    (tmp_path / "real" / "old.json").chmod(0o640)
    for name in ("new", "old"):
        check_output(tmp_path / name)
        DOCUMENT.write(tmp_path / name)
        assert (tmp_path / name).is_symlink()
        assert Workload.read(tmp_path / "real" / f"{name}.json") == DOCUMENT
    assert stat.S_IMODE((tmp_path / "real" / "old.json").stat().st_mode) == 0o640
    assert len(os.listdir(tmp_path / "real")) == 2


def test_devices_and_open_files_are_written_into(tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    check_output("/dev/null")
    DOCUMENT.write("/dev/null")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert os.stat("/dev/null").st_ino == before.st_ino
    with pytest.raises(MoeplanError, match="No space left"):
        DOCUMENT.write("/dev/full")
    read, write = os.pipe()
    for path in (f"/dev/fd/{write}", f"/proc/self/fd/{write}"):
        check_output(path)
        DOCUMENT.write(path)
        assert os.read(read, 10_000).decode() == DOCUMENT.to_json()
    random_trace(0, 2, 4).write(f"/dev/fd/{write}")  # an npz, which is not written front to back
    assert os.read(read, 2) == b"PK"
    with open(tmp_path / "redirected", "wb") as file:  # as `-o /dev/stdout > redirected`: the file stays the same
        DOCUMENT.write(f"/dev/fd/{file.fileno()}")
        assert os.fstat(file.fileno()).st_ino == (tmp_path / "redirected").stat().st_ino
    assert Workload.read(tmp_path / "redirected") == DOCUMENT


def test_two_outputs_in_one_place_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.png").symlink_to("x.png")
    code, err = command(monkeypatch, capfd, "run", "missing.json", "-o", "x.png", "--picture", "link.png")
    assert code == 2
    assert "two outputs of this command would go there" in err


def test_a_new_document_keeps_to_the_umask(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import os, moeplan; os.umask(0o077); "
         f"moeplan.Workload.from_text('decode:4').write({str(tmp_path / 'w.json')!r})"],
        check=False,
    )  # fmt: skip
    assert done.returncode == 0
    assert stat.S_IMODE((tmp_path / "w.json").stat().st_mode) == 0o600


# Two profiles in one directory


def measured(name: str) -> Cluster:
    """A cluster of the same two devices, measured for a model of that name."""
    model = tiny_model(hidden=64 if name == "a" else 128).model_copy(update={"name": name})
    made = cluster(model)
    return made.model_copy(update={"provenance": made.provenance.model_copy(update={"models": (name,)})})


def test_profiles_that_end_together_are_all_kept(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    start = threading.Barrier(2)

    def end(name: str) -> None:
        start.wait()
        profile_command._add(measured(name), path, None)

    threads = [threading.Thread(target=end, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    kept = Cluster.read(path)
    assert sorted(kept.provenance.models) == ["a", "b"]
    wanted = {(e.operator, str(e.shape)) for name in "ab" for e in measured(name).kinds[0].operators}
    assert {(e.operator, str(e.shape)) for e in kept.kinds[0].operators} == wanted
    assert os.listdir(tmp_path) == ["cluster.json"]


def test_fresh_replaces_what_was_there_not_what_came_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    measured("old").write(path)
    mark = profile_command._mark(path)
    profile_command._add(measured("a"), path, mark)
    assert Cluster.read(path).provenance.models == ("a",)
    profile_command._add(measured("b"), path, mark)
    assert sorted(Cluster.read(path).provenance.models) == ["a", "b"]


def test_a_profile_that_does_not_go_with_the_file_is_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    measured("a").write(path)
    other = cluster(tiny_model(), ((1.0, 1.0, 1.0),))
    with pytest.raises(MoeplanError, match=r"cannot add to a profile of 4 devices.*it is in .*cluster-2\.json"):
        profile_command._add(other, path, None)
    assert Cluster.read(tmp_path / "cluster-2.json") == other
    assert Cluster.read(path) == measured("a")


def test_folders_that_are_made_are_told_of_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    random_trace(0, 2, 4).write("t.npz")
    argv = ["place", "--trace", "t.npz", "--devices", "2", "--time-limit", "1", "--steps", "10", "--json", "-o"]
    for made in (1, 0):
        code, err = command(monkeypatch, capfd, *argv, "new/folder/p.json")
        assert code == 0
        assert err.count(f"note: made the folder {tmp_path / 'new' / 'folder'}\n") == made
    assert (tmp_path / "new" / "folder" / "p.json").exists()
