"""Importers: damaged and hostile files are refused with a reason; the command."""

import io
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeplan.profiler.traces import import_trace
from moeplan.service import cli
from moeplan.spec import Trace
from moeplan.spec.errors import MoeplanError
from moeplan.tests.recordings import (
    FIRST,
    FIRST_LOGICAL,
    LOGITS,
    A,
    B,
    per_token,
    refused,
    save_records,
    save_statistics,
)


class Harm:
    """Unpickles by running code."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str, str]]:
        return open, (str(Harm.mark), "w")

    mark = Path()


def test_code_in_a_file_is_never_run(tmp_path: Path) -> None:
    Harm.mark = tmp_path / "mark"
    torch.save({"records": [Harm()]}, tmp_path / "a.pt")
    refused("could run code, refused", tmp_path / "a.pt")
    torch.save({"logical_count": Harm()}, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    refused("not a torch.save file", tmp_path / "a.pt")
    refused("not a torch.save file", tmp_path / "a.pt", "sglang")
    np.save(tmp_path / "a.npy", np.array([Harm()], dtype=object), allow_pickle=True)
    refused("not a readable npy", tmp_path / "a.npy")
    assert not Harm.mark.exists()


def test_bombs_and_broken_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_records(tmp_path / "whole.pt", [per_token(7, 0, [5, 6, 7], [3], FIRST)])
    raw = (tmp_path / "whole.pt").read_bytes()
    path = tmp_path / "a.pt"
    for size in (0, 1, 30, len(raw) // 2, len(raw) - 20):
        path.write_bytes(raw[:size])
        refused("a.pt: ", path)
        refused("a.pt: ", path, "sglang")
    with zipfile.ZipFile(tmp_path / "whole.pt") as archive:  # a tensor that claims more bytes than its record has
        parts = {item.filename: archive.read(item) for item in archive.infolist()}
    name = next(name for name in parts if name.endswith("data.pkl"))
    claim = FIRST.numel()
    parts[name] = parts[name].replace(b"K" + bytes([claim]) + b"t", b"J" + (2**30).to_bytes(4, "little") + b"t")
    with zipfile.ZipFile(path, "w") as archive:
        for part, content in parts.items():
            archive.writestr(part, content)
    refused("not a readable torch.save", path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("data/0", bytes(2**21))
    with monkeypatch.context() as patch:
        patch.setattr("moeplan.profiler.traces.importers.files.MAX_TRACE_BYTES", 2**20)
        assert path.stat().st_size < 2**20
        refused("2 MiB( .unpacked.)?, refused", path)
        path.rename(tmp_path / "bomb.npz")
        refused("unpacks to 2 MiB, refused", tmp_path / "bomb.npz")
        patch.setattr("moeplan.profiler.traces.importers.files.MAX_TRACE_BYTES", 1000)
        refused("refused .limit", tmp_path / "whole.pt")
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "<i4", "fortran_order": False, "shape": (2**40, 8, 8)})
    (tmp_path / "a.npy").write_bytes(header.getvalue() + bytes(100))
    refused("not a readable npy", tmp_path / "a.npy")
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("expert_ids.npy", header.getvalue())
    refused("not a readable npz", tmp_path / "a.npz")


@settings(max_examples=60)
@given(st.data())
def test_damaged_files_are_imported_or_refused_in_words(data: st.DataObject) -> None:
    """Whatever bytes change, there is a valid trace or one line."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        form = data.draw(st.sampled_from(["pt", "npz", "npy", "json", "safetensors"]))
        path = folder / f"a.{form}"
        if form == "pt":
            save_records(path, [per_token(7, 0, [5, 6, 7], [2, 1], FIRST)])
        elif form == "npz":
            np.savez(path, expert_ids=A, seq_len=[1, 1], num_experts=4)
        elif form == "npy":
            np.save(path, A)
        elif form == "json":
            path.write_text(json.dumps({"prompt_routed_experts": A.tolist(), "routed_experts": B.tolist()}))
        else:
            save_file({"layer_0": LOGITS[0], "layer_1": LOGITS[1]}, path)
        raw = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 4))):
            raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
        path.write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))] if data.draw(st.booleans()) else raw)
        message = ""
        try:
            trace, notes = import_trace(path, top_k=2)
        except MoeplanError as error:
            message = str(error)
        assert "\n" not in message
        assert message or (notes and trace.expert_counts.sum() > 0)


def test_no_file_at_all(tmp_path: Path) -> None:
    refused("no such file", tmp_path / "none")
    for kind in ("sglang", "vllm", "transformers", "npz"):
        refused("no such file", tmp_path / "none", kind)
    refused("TensorRT-LLM's statistics folder", tmp_path / "none", "tensorrt-llm")
    refused("empty recording", tmp_path)
    refused("empty recording", tmp_path, "sglang")
    refused("empty recording", tmp_path, "vllm")
    refused("not a regular file", tmp_path, "npz")
    refused("no importer 'x'", tmp_path, "x")
    refused("no such file", Path("a\0b"))
    refused("must be at least 1", tmp_path, top_k=0)
    (tmp_path / "notes.txt").write_text("hello")
    refused("say which with --from", tmp_path / "notes.txt")
    (tmp_path / "notes.json").write_bytes(b"\xff\xfe")
    refused("UTF-8", tmp_path / "notes.json")


# --- command line ---


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capfd.readouterr()
    code = stopped.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def test_command_writes_a_trace_and_says_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    recorded = save_records(tmp_path / "r.pt", [per_token(7, 0, [5, 6, 7], [2, 1], FIRST)])
    output = tmp_path / "out" / "trace.npz"
    code, out, _ = moeplan(monkeypatch, capfd, "trace", "import", recorded, "-o", output)
    assert code == 0
    assert "3 tokens x 2 layers, top-2 of 4" in out
    assert "layer 0 without experts: dropped" in out
    assert Trace.read(output).expert_ids.tolist() == FIRST_LOGICAL
    code, out, _ = moeplan(monkeypatch, capfd, "trace", "import", recorded, "--from", "sglang", "-o", output, "--json")
    body = json.loads(out)
    assert code == 0
    shape = (body["tokens"], body["layers"], body["top_k"], body["num_experts"], body["sequences"])
    assert shape == (3, 2, 2, 4, 2)
    assert body["counts_only"] is False
    assert body["notes"]
    counted = save_statistics(tmp_path / "s", [{"0_1": [1, 2, 3, 4]}])
    code, out, _ = moeplan(monkeypatch, capfd, "trace", "import", counted, "-o", output)
    assert code == 0
    assert "counts of 1 layers x 4 experts" in out
    assert "balance" in out
    assert Trace.read(output).counts_only


def test_command_refuses_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.pt").write_bytes(b"PK\x03\x04 no archive")
    output = tmp_path / "trace.npz"
    for arguments, pattern in (
        ([tmp_path / "bad.pt"], "torch.save"),
        ([tmp_path / "none"], "no such file"),
        ([tmp_path / "bad.pt", "--from", "sglang"], "torch.save"),
    ):
        code, _, error = moeplan(monkeypatch, capfd, "trace", "import", *arguments, "-o", output)
        assert code == 2
        assert re.search(pattern, error)
        assert "Traceback" not in error
        assert error.strip().count("\n") == 0
        assert not output.exists()
    code, _, error = moeplan(monkeypatch, capfd, "trace", "import", tmp_path, "--from", "triton")
    assert code == 2
    assert "tensorrt-llm" in error
