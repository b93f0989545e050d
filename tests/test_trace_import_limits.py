"""Files that unfold to more than they are, or hold no arrays: refused with a reason, before memory or time is spent."""

import io
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from moeplan.profiler.traces import import_trace
from moeplan.profiler.traces.importers import files, json_files
from moeplan.spec.errors import MoeplanError

MEMORY = 2**30  # of a process, beside what importing torch takes


def refused(pattern: str, path: Path, kind: str | None = None, **options: int) -> None:
    with pytest.raises(MoeplanError, match=pattern) as stopped:
        import_trace(path, kind, **options)
    assert "\n" not in str(stopped.value)


def opcodes(path: Path, count: int, compressed: bool = False) -> Path:
    """A torch.save file whose pickle is a list of ``count`` empty lists: one byte each, 64 in memory."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02](" + b"]" * count + b"e.")
        archive.writestr("archive/version", b"3\n")
    return path


def header(shape: tuple[int, ...], dtype: str = "<i4") -> bytes:
    np.lib.format.write_array_header_1_0(
        buffer := io.BytesIO(), {"descr": dtype, "fortran_order": False, "shape": shape}
    )
    return buffer.getvalue()


def archive(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as out:
        for name, content in members.items():
            out.writestr(name, content)
    return path


def test_opcodes_are_limited_and_torch_files_are_not_compressed(tmp_path: Path) -> None:
    refused("2.4 MiB of opcodes beside its tensors, refused", opcodes(tmp_path / "a.pt", 2_500_000))
    refused("a compressed archive, which torch.save does not write", opcodes(tmp_path / "a.pt", 1_000_000, True))
    refused("not SGLang's recorder", opcodes(tmp_path / "a.pt", 1000), "sglang")


@pytest.mark.parametrize(
    ("members", "pattern"),
    [
        ({"expert_ids": b"abc"}, "'expert_ids': expected an array, named 'expert_ids.npy'"),
        ({"expert_ids.npy": b"abc"}, "'expert_ids': no array: its header is missing"),
        ({"expert_ids.npy": b""}, "header is missing|not a readable npz"),
        ({"expert_ids.npy": b"\x93NUMPY\x01\x00"}, "header is missing|not a readable npz"),
        ({"expert_ids.npy": b"\x93NUMPY\x01\x00\x08\x00garbage!"}, "header is missing|not a readable npz"),
        ({"expert_ids.npy": header((2**40, 8, 8))}, "needs .* bytes"),
        ({"expert_ids.npy": header((4, 2, 1)) + bytes(31)}, "not a readable npz"),
        ({"expert_ids.npy": header((0, 2**40))}, "neither|expected integers|empty"),
        ({"a/expert_ids.npy": header((1, 1, 1)) + bytes(4)}, "neither|expected integers"),
    ],
)
def test_members_that_are_no_arrays(members: dict[str, bytes], pattern: str, tmp_path: Path) -> None:
    path = archive(tmp_path / "a.npz", members)
    refused(pattern, path, "npz")
    for kind in (None, "vllm"):
        with pytest.raises(MoeplanError):
            import_trace(path, kind)


def test_members_found_twice_and_long_lists_of_members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as out:
        out.writestr("expert_ids.npy", header((1, 1, 1)) + bytes(4))
        with pytest.warns(UserWarning, match="Duplicate"):
            out.writestr("expert_ids.npy", header((1, 1, 1)) + bytes(4))
    refused("is there twice", tmp_path / "a.npz")
    monkeypatch.setattr(files, "MAX_DIRECTORY_BYTES", 1000)
    refused("a list of members of", archive(tmp_path / "a.npz", {f"{i}.npy": b"" for i in range(30)}))


def test_json_is_measured_before_it_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_files, "MAX_PARSED_BYTES", 100_000)
    (tmp_path / "a.json").write_text("[" + ",".join(["[]"] * 5000) + "]")
    refused("4999 values in one piece of JSON, refused: write JSON lines", tmp_path / "a.json")
    row = json.dumps([[0, 1], [2, 3]])
    (tmp_path / "a.jsonl").write_text("\n".join([row] * 5000))  # each line by itself is small
    assert import_trace(tmp_path / "a.jsonl")[0].tokens == 5000
    monkeypatch.setattr(json_files, "MAX_TEXT_BYTES", 1000)
    (tmp_path / "a.json").write_text(json.dumps(["x" * 2000], indent=1))
    refused("in one piece, refused|a line of more than", tmp_path / "a.json")


# What 1 GiB must hold, as bytes on the disk that unfold to far more.


def many_tokens(folder: Path) -> Path:
    """128 MiB of ids, 16.8 M tokens, in an npz of 130 kB."""
    return archive(folder / "a.npz", {"expert_ids.npy": header((2**24, 1, 8), "|u1") + bytes(2**27)})


def many_layers(folder: Path) -> Path:
    return archive(folder / "a.npz", {"expert_ids.npy": header((4, 100_000, 2), "|u1") + bytes([0, 1]) * 400_000})


def many_experts(folder: Path) -> Path:
    ids = np.zeros((2, 4000, 1), np.int32)
    ids[0, 0] = 65_000
    np.savez_compressed(folder / "a.npz", expert_ids=ids)
    return folder / "a.npz"


def repeated_tensor(folder: Path) -> Path:
    torch.save({"logical_count": torch.ones(1).expand(2**10, 2**10, 2**10)}, folder / "a.pt")
    return folder / "a.pt"


def many_logits(folder: Path) -> Path:
    torch.save([torch.zeros(1, 2)] * 5000, folder / "a.pt")
    return folder / "a.pt"


def plain_bomb(folder: Path) -> Path:
    return archive(folder / "a.npz", {"expert_counts.npy": header((2**13, 2**13), "<f8") + bytes(2**29)})


MAKERS = (many_tokens, many_layers, many_experts, repeated_tensor, many_logits, plain_bomb)
IN_A_LIMITED_PROCESS = f"""
import resource, sys
import moeplan.profiler.traces
from moeplan.service import cli
pages = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (pages + {MEMORY},) * 2)
for path in sys.argv[1:]:
    sys.argv = ["moeplan", "trace", "import", path, "-o", path + ".trace.npz"]
    try:
        cli.main()
    except SystemExit as ended:
        print(path, ended.code)
"""


def test_small_files_that_unfold_stay_within_memory(tmp_path: Path) -> None:
    """Exit 2 and one line each, in a process whose memory is limited."""
    paths = []
    for make in MAKERS:
        (folder := tmp_path / make.__name__).mkdir()
        paths.append(make(folder))
        assert paths[-1].stat().st_size < 2**21
    command = [sys.executable, "-c", IN_A_LIMITED_PROCESS, *map(str, paths)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == [f"{path} 2" for path in paths]
    assert len(ended.stderr.splitlines()) == len(paths), ended.stderr
    assert "more memory than there is" not in ended.stderr
    assert not list(tmp_path.glob("*/*.trace.npz"))
