"""Answers of requests with routed experts (SGLang, vLLM): every form, checked value by value."""

import base64
import io
import json
from pathlib import Path

import numpy as np
import pytest

from moeplan.profiler.traces import import_trace
from moeplan.profiler.traces.importers import recognise
from moeplan.tests.recordings import UNROUTED, A, B, refused, told


def test_sglang_base64_needs_top_k_and_finds_the_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.permuted(np.tile(np.arange(8), (t, 5, 1)), axis=2)[:, :, :2].astype("<i4") for t in (7, 4)]
    for array in arrays:
        array[:, 0] = 0  # a dense layer
    lines = [
        {
            "text": "…",
            "meta_info": {
                "prompt_tokens": 3,
                "completion_tokens": len(array) - 2,
                "routed_experts": base64.b64encode(array.tobytes()).decode(),
            },
        }
        for array in arrays
    ]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    assert recognise(path) == "sglang"
    trace, notes = import_trace(path, top_k=2, num_experts=8)
    assert trace.expert_ids.tolist() == np.concatenate(arrays)[:, 1:].tolist()
    assert trace.seq_len.tolist() == [7, 4]
    assert trace.num_experts == 8
    told(notes, "layer 0 without experts")
    refused("give --top-k", path)
    refused("no number of layers fits", path, top_k=3)
    refused("no multiple of 3 x 2", path, top_k=2, layers=3)
    refused("--from sglang", path, "vllm", top_k=2)
    for line in lines:
        del line["meta_info"]["prompt_tokens"]  # type: ignore[attr-defined]
    path.write_text(json.dumps(lines))
    refused("give --layers", path, top_k=2)
    assert import_trace(path, top_k=2, layers=5, num_experts=8)[0].digest() == trace.digest()
    for text, pattern in (("%%", "expected base64"), ("AAA=", "no int32"), ("", "no int32")):
        path.write_text(json.dumps({"meta_info": {"routed_experts": text}}))
        refused(pattern, path, top_k=2)


@pytest.mark.parametrize("form", ["npz", "whole", "npy", "folder", "outputs", "choices", "bare", "bare list", "jsonl"])
def test_vllm_forms_agree(form: str, tmp_path: Path) -> None:
    path = tmp_path / "routed.json"
    padded = np.concatenate([B, UNROUTED])
    if form == "npz":
        np.savez(path := tmp_path / "r.npz", r0=A, r1=padded)
    elif form == "whole":
        np.savez(path := tmp_path / "r.npz", routed_experts=np.concatenate([A, padded]), seq_len=[2, 2])
    elif form == "npy":
        np.save(path := tmp_path / "r.npy", np.concatenate([A, padded]))
    elif form == "folder":
        (path := tmp_path / "folder").mkdir()
        np.save(path / "request_2.npy", A)
        np.save(path / "request_10.npy", padded)
    elif form == "outputs":
        one = {"prompt_routed_experts": A[:1].tolist(), "outputs": [{"routed_experts": A[1:].tolist()}]}
        two = {"prompt_routed_experts": None, "outputs": [{"routed_experts": padded.tolist()}]}
        path.write_text(json.dumps([one, two]))
    elif form == "choices":
        encoded = []
        for array in (A, padded):
            np.save(buffer := io.BytesIO(), array)
            encoded.append(base64.b64encode(buffer.getvalue()).decode())
        path.write_text(json.dumps({"choices": [{"routed_experts": text} for text in encoded]}))
    elif form == "bare":
        path.write_text(json.dumps(np.concatenate([A, padded]).tolist()))
    elif form == "bare list":
        path.write_text(json.dumps([A.tolist(), padded.tolist(), []]))
    else:
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps({"routed_experts": a.tolist()}) + "\n\n" for a in (A, padded)))
    assert recognise(path) == "vllm"
    trace, notes = import_trace(path)
    assert trace.expert_ids.tolist() == np.concatenate([A, B]).tolist()
    assert trace.seq_len.tolist() == ([3] if form in ("npy", "bare") else [2, 1])
    assert trace.num_experts == 5
    told(notes, "per-token", "highest number seen gives 5", "1 of 4 tokens", "not promised")
    assert import_trace(path, "vllm", num_experts=9, top_k=2, layers=2)[0].num_experts == 9
    refused("top-k is 2", path, top_k=3)
    refused("layers is 2", path, layers=3)
    refused("names expert 4, but there are 4", path, num_experts=4)
    refused("at most 65536", path, num_experts=70_000)


def test_vllm_refuses(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    deep = "[" * 100_000
    cases = {
        deep: "not JSON",
        '{"routed_experts": [[[0, 1]], [[0]]]}': "ragged",
        '{"routed_experts": [[[0.5, 1]]]}': "other things than small integers",
        '{"routed_experts": [[[1e999, 1]]]}': "other things",
        '{"routed_experts": [[[99999999999999999999999, 1]]]}': "other things",
        '{"routed_experts": [[["a", "b"]]]}': "other things",
        '{"routed_experts": [[0, 1]]}': "2 dimensions",
        '{"routed_experts": {"a": 1}}': "nested lists or base64",
        '{"routed_experts": [[[-7, 1]]]}': "names experts -7",
        '{"routed_experts": [[[70000, 1]]]}': "70000",
        '{"routed_experts": [[[1, 1]]]}': "twice",
        '[{"routed_experts": [[[0, 1]]]}, {"routed_experts": [[[0, 1]], [[0, 1]]]}, {"routed_experts": [[[0]]]}]': (
            "not one model"
        ),
        '[{"text": "x"}]': "no request has routed_experts",
        '{"routed_experts": []}': "zero requests",
        "[]": "zero requests",
        "7": "expected a request",
        "": "empty",
        '{"routed_experts": [[[0, ': "not JSON",
    }
    for text, pattern in cases.items():
        path.write_text(text)
        refused(pattern, path)
    (tmp_path / "vllm.log").write_text("INFO EPLB step: avg_tokens=12.50, max_tokens=31, balancedness=0.4032\n")
    refused("only balance figures", tmp_path / "vllm.log")
    refused("only balance figures", tmp_path / "vllm.log", "vllm")
    np.savez(tmp_path / "a.npz", a=A, b=A.astype(float))
    refused("neither a trace", tmp_path / "a.npz")
    refused("b: expected integers", tmp_path / "a.npz", "vllm")
    np.savez(tmp_path / "a.npz", a=A, seq_len=np.array([2**63 - 1, 2**63 - 1, 4]))
    refused("seq_len", tmp_path / "a.npz")
    np.savez(tmp_path / "a.npz", a=A, b=A[:, :1])
    refused("not one model", tmp_path / "a.npz")
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object))
    refused("not a readable npy", tmp_path / "a.npy")
