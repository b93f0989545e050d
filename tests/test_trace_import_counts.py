"""Counts that people keep: SGLang's as JSON and floats, vLLM's expert load, llama.cpp's CSV."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeplan.profiler.traces import import_trace
from moeplan.profiler.traces.importers import recognise
from moeplan.spec.errors import MoeplanError

COUNTS = np.array([[0, 0, 0, 0], [5, 1, 0, 2], [3, 3, 1, 1]])  # layer 0 is dense
STEPS = np.stack([COUNTS, 2 * COUNTS])


def told(notes: list[str], *patterns: str) -> None:
    for pattern in patterns:
        assert any(re.search(pattern, note) for note in notes), (pattern, notes)


def refused(pattern: str, path: Path, kind: str | None = None, **options: Any) -> None:
    with pytest.raises(MoeplanError, match=pattern) as stopped:
        import_trace(path, kind, **options)
    assert "\n" not in str(stopped.value)


# --- SGLang ---


@pytest.mark.parametrize("form", ["ints", "floats", "steps", "lines", "tensor", "float tensor", "steps tensor"])
def test_logical_counts_in_every_form(form: str, tmp_path: Path) -> None:
    value = STEPS if "steps" in form else COUNTS
    value = value.astype(float) if "float" in form else value
    path = tmp_path / ("a.pt" if "tensor" in form else "a.jsonl" if form == "lines" else "a.json")
    if "tensor" in form:
        torch.save({"rank": 0, "logical_count": torch.tensor(value)}, path)
    elif form == "lines":
        path.write_text("".join(json.dumps({"logical_count": (n * COUNTS).tolist()}) + "\n" for n in (1, 2)))
    else:
        path.write_text(json.dumps({"rank": 0, "logical_count": value.tolist()}, indent=1))
    assert recognise(path) == "sglang"
    trace, notes = import_trace(path)
    times = 3 if "steps" in form or form == "lines" else 1
    assert trace.counts_only
    assert trace.expert_counts.tolist() == (times * COUNTS[1:]).tolist()
    told(notes, "counts only", "layer 0 without experts: dropped")
    assert import_trace(path, "sglang", num_experts=4, layers=3)[0].digest() == trace.digest()
    refused("num-experts is 4 in the record, --num-experts says 5", path, num_experts=5)


def test_bare_counts_and_recorder_records_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(COUNTS.tolist()))
    refused("a bare table of 3 rows", tmp_path / "a.json")
    trace, notes = import_trace(tmp_path / "a.json", "sglang")
    assert trace.expert_counts.tolist() == COUNTS[1:].tolist()
    told(notes, "bare numbers, taken for logical_count")
    torch.save(torch.tensor(STEPS).float(), tmp_path / "a.pt")
    assert import_trace(tmp_path / "a.pt", "sglang")[0].expert_counts.tolist() == (3 * COUNTS[1:]).tolist()
    record = {
        "forward_pass_id": 1,
        "rank": 0,
        "gatherer_key": "primary",
        "global_physical_count": [[1, 2, 3], [4, 5, 6]],
    }
    body = {"records": [record], "last_physical_to_logical_map": [[0, 1, 0], [1, 0, 1]]}
    (tmp_path / "r.json").write_text(json.dumps(body))
    assert import_trace(tmp_path / "r.json")[0].expert_counts.tolist() == [[4, 2], [5, 10]]


@pytest.mark.parametrize(
    ("value", "pattern"),
    [
        ([[1e308, 1], [1, 1]], "at most 9.0"),
        ([[float("inf"), 1]], "finite"),
        ([[float("nan"), 1]], "finite"),
        ([[-1, 1]], "negative"),
        ([[0, 0]], "every count is zero"),
        ([[1, 2], [3]], "ragged"),
        ([["a", "b"]], "other things than numbers"),
        ([[True, False]], "other things than numbers"),
        ([1, 2], "expected .steps, layers, experts"),
        ([], "expected .steps, layers, experts"),
        ("x", "as a tensor"),
        (None, "as a tensor"),
        ([[1, 10**30]], "other things than numbers"),
        ([[1, 2]] * 5000, "5000 layers, at most 512"),
    ],
)
def test_counts_that_are_none_are_refused(value: object, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"logical_count": value}))
    refused(pattern, tmp_path / "a.json")
    if isinstance(value, list) and not re.search("numbers|ragged|zero", pattern):
        np.savez(tmp_path / "a.npz", expert_counts=np.array(value))
        refused(pattern, tmp_path / "a.npz")


# --- vLLM ---

MAP = np.array([[0, 1, 2, 0], [2, 1, 0, 1]])
PHYSICAL = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
LOGICAL = [[5, 2, 3], [7, 14, 5]]


@pytest.mark.parametrize("form", ["json", "stats", "pt", "npz", "safetensors", "window"])
def test_expert_load_of_vllm(form: str, tmp_path: Path) -> None:
    path = tmp_path / f"load.{'json' if form in ('stats', 'window') else form}"
    body: dict[str, Any] = {"expert_load_pass": PHYSICAL, "physical_to_logical_map": MAP}
    if form == "json":
        path.write_text(json.dumps({name: value.tolist() for name, value in body.items()}))
    elif form == "window":
        steps = np.stack([PHYSICAL - 1, np.ones_like(PHYSICAL)])
        path.write_text(json.dumps({"expert_load_window": steps.tolist(), "physical_to_logical_map": MAP.tolist()}))
    elif form == "stats":
        layers = [{"layer": i, "physical_load": PHYSICAL[i].tolist(), "logical_load": LOGICAL[i]} for i in range(2)]
        path.write_text(json.dumps({"current_step": 3, "per_layer_stats": layers, "physical_to_logical_map": [[0]]}))
    elif form == "pt":
        torch.save({name: torch.tensor(value) for name, value in body.items()}, path)
    elif form == "npz":
        np.savez(path, **body)
    else:
        save_file({"x": torch.tensor(LOGICAL, dtype=torch.float32)}, path)
    trace, notes = import_trace(path, "vllm" if form == "safetensors" else None)
    assert trace.counts_only
    assert trace.expert_counts.tolist() == LOGICAL
    assert trace.source == "vLLM expert load"
    told(notes, "counts only")
    if form in ("json", "pt", "npz", "window"):
        told(notes, "mapped back")
    if form == "safetensors":
        told(notes, "'x': taken for expert load")


def test_expert_load_without_its_map_is_not_guessed_at(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"expert_load_pass": PHYSICAL.tolist()}))
    refused("4 physical experts without physical_to_logical_map", path)
    refused("without physical_to_logical_map", path, num_experts=3)
    trace, notes = import_trace(path, num_experts=4)
    assert trace.expert_counts.tolist() == PHYSICAL.tolist()
    told(notes, "right only if the engine never rebalanced")
    path.write_text(json.dumps({"expert_load_pass": PHYSICAL.tolist(), "physical_to_logical_map": MAP[:1].tolist()}))
    refused(r"\[2, 4\] beside physical_to_logical_map of \[1, 4\]", path)
    torch.save({"a": torch.ones(2, 3), "b": torch.ones(2, 3)}, tmp_path / "a.pt")
    refused("no expert load", tmp_path / "a.pt", "vllm")


# --- llama.cpp ---


def test_llama_cpp_rows_are_counted_by_layer(tmp_path: Path) -> None:
    path = tmp_path / "moe_trace.csv"
    rng = np.random.default_rng(0)
    rows = np.stack([rng.integers(1, 4, 500), rng.integers(0, 16, 500)], axis=1)  # layer 0 is dense
    text = "".join(f"{layer},{expert}\n" for layer, expert in rows)
    expected = [[int(((rows == (layer, expert)).all(axis=1)).sum()) for expert in range(16)] for layer in (1, 2, 3)]
    for header in ("", "layer,expert\n"):
        path.write_text(header + text)
        trace, notes = import_trace(path)
        assert trace.counts_only
        assert trace.expert_counts.tolist() == expected
        assert trace.source == "llama.cpp routing; model layers 1-3"
        told(notes, "counts only", "500 rows of layers 1-3 counted", "highest number seen gives 16")
    for name in ("llama.cpp", "llama-cpp", "llamacpp", "Llama.cpp"):
        assert import_trace(path, name, num_experts=20)[0].num_experts == 20
    refused("names expert 15, but there are 8", path, num_experts=8)
    zero, notes = import_trace(path, num_experts=8, zero_experts=8)
    assert zero.expert_counts.tolist() == [row[:8] for row in expected]
    told(notes, "8-15 are zero experts")


def test_llama_cpp_with_tokens_is_a_per_token_recording(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    ids = rng.random((9, 3, 8)).argsort(axis=2)[:, :, :2]
    rows = [("prefill", t, layer + 2, k, ids[t, layer, k]) for layer in range(3) for t in range(9) for k in range(2)]
    rows = [rows[i] for i in rng.permutation(len(rows))]
    text = "phase,token,layer,rank,expert\n" + "".join(",".join(map(str, row)) + "\n" for row in rows)
    (tmp_path / "a.csv").write_text(text)
    trace, _ = import_trace(tmp_path / "a.csv", num_experts=8)
    assert trace.expert_ids.tolist() == ids.tolist()
    assert trace.source.endswith("model layers 2-4")
    (tmp_path / "a.csv").write_text(text + "decode,9,2,0,1\n")
    refused("different numbers of experts or layers", tmp_path / "a.csv")
    (tmp_path / "c.csv").write_text("layer,expert,count\n0,1,7\n0,0,2\n1,1,5\n")
    assert import_trace(tmp_path / "c.csv")[0].expert_counts.tolist() == [[2, 7], [0, 5]]


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=60))
def test_llama_cpp_counts_return(rows: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.csv"
        path.write_text("layer,expert\n" + "".join(f"{layer},{expert}\n" for layer, expert in rows))
        trace, _ = import_trace(path, num_experts=10)
    layers = sorted({layer for layer, _ in rows})
    assert trace.expert_counts.tolist() == [[rows.count((layer, e)) for e in range(10)] for layer in layers]


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("", "expected columns layer,expert"),
        ("a,b\n1,2\n", "expected columns layer,expert"),
        ("layer,expert\n", "no rows"),
        ("layer,expert\n1,x\n", "not a readable CSV"),
        ("layer,expert\n1,2.5\n", "not a readable CSV"),
        ("layer,expert\n1\n", "not a readable CSV"),
        ("layer,expert\n-1,2\n", "layer: expected 0..511, found -1"),
        ("layer,expert\n5000,2\n", "layer: expected 0..511"),
        ("layer,expert\n1,70000\n", "expert: expected 0..65535"),
        ("layer,expert\n1,99999999999999999999\n", "not a readable CSV"),
        ("layer,expert\n500,1\n1,65000\n", "at most 16777216 counts"),
        ("layer,expert,count\n1,2,-4\n", "expected counts"),
        ("\0\0\0", "expected columns"),
    ],
)
def test_csv_that_is_none_is_refused(text: str, pattern: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(text)
    refused(pattern, tmp_path / "a.csv")
