"""Per-token recordings of other programs: Megatron-Core's router trace, rows of JSON that people write themselves."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moeplan.profiler.traces import import_trace
from moeplan.profiler.traces.importers import recognise
from moeplan.spec.errors import MoeplanError

RNG = np.random.default_rng(0)


def told(notes: list[str], *patterns: str) -> None:
    for pattern in patterns:
        assert any(re.search(pattern, note) for note in notes), (pattern, notes)


def refused(pattern: str, path: Path, kind: str | None = None, **options: Any) -> None:
    with pytest.raises(MoeplanError, match=pattern) as stopped:
        import_trace(path, kind, **options)
    assert "\n" not in str(stopped.value)


def routing(tokens: int, layers: int = 3, top_k: int = 2, experts: int = 8) -> np.ndarray:
    return RNG.random((tokens, layers, experts)).argsort(axis=2)[:, :, :top_k]


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- Megatron-Core ---


def calls(ids: np.ndarray, step: int = 0, rank: int = 0, first: int = 1, **more: object) -> list[dict[str, Any]]:
    """Lines of one microbatch, in the order of layers, as RouterTracer writes them."""
    return [
        {"step": step, "stage": "pre_dispatch", "block": "decoder", "layer": first + layer, "rank": rank,
         "num_tokens": len(ids), "topk": ids.shape[2], "top_indices": ids[:, layer].tolist(), **more}
        for layer in range(ids.shape[1])
    ]  # fmt: skip


def test_megatron_microbatches_in_order(tmp_path: Path) -> None:
    a, b, c = routing(4), routing(4), routing(6)
    head = calls(routing(4, layers=1), step=0, block="mtp", mtp_idx=0)
    # Both microbatches of step 0 are called again as activations are recomputed.
    lines = calls(a) + calls(b) + calls(b) + calls(a) + head + calls(c, step=1)
    path = write(tmp_path / "router_trace_rank0.jsonl", lines)
    for kind in (None, "megatron", "megatron-core", "Megatron_LM", "mcore"):
        trace, notes = import_trace(tmp_path if kind is None else path, kind, num_experts=8)
        assert trace.expert_ids.tolist() == np.concatenate([a, b, c]).tolist()
        assert trace.seq_len.tolist() == [4, 4, 6]
        assert trace.source == "Megatron-Core router trace; model layers 1-3"
    told(notes, "per-token", "6 calls equal an earlier one.*recomputed", "1 calls of multi-token-prediction", "3 micro")
    told(notes, "3 layers, all of one pipeline stage")
    assert recognise(path) == "megatron"


def test_megatron_ranks(tmp_path: Path) -> None:
    a, b = routing(4), routing(4)
    write(tmp_path / "router_trace_rank0.jsonl", calls(a, rank=0))
    write(tmp_path / "router_trace_rank1.jsonl", calls(a, rank=1))  # tensor parallel with rank 0
    trace, notes = import_trace(tmp_path)
    assert trace.expert_ids.tolist() == a.tolist()
    told(notes, "rank 1: the same tokens as rank 0")
    write(tmp_path / "router_trace_rank2.jsonl", calls(b, rank=2))
    refused("2 ranks hold different routing.*give --layers .*or --model", tmp_path)
    trace, notes = import_trace(tmp_path, layers=3)
    assert trace.expert_ids.tolist() == np.concatenate([a, b]).tolist()
    told(notes, "ranks 0, 2 saw different tokens", "3 layers are all of the model's")
    refused("layers is 3 in the record, --layers says 6", tmp_path, layers=6)  # two pipeline stages of three layers
    write(tmp_path / "router_trace_rank2.jsonl", calls(b, rank=2, first=2))
    refused("different layers", tmp_path, layers=3)


@pytest.mark.parametrize(
    ("change", "pattern"),
    [
        ({"num_tokens": 5}, r"top_indices: expected integers \[5, 2\], got int64 \[4, 2\]"),
        ({"topk": 3}, "expected integers"),
        ({"top_indices": [[0, 1], [2]]}, "ragged"),
        ({"top_indices": [[0.5, 1]] * 4}, "expected integers"),
        ({"top_indices": [[0, 70000]] * 4}, "at most 65536"),
        ({"top_indices": [[1, 1]] * 4}, "twice"),
        ({"layer": -1}, "layer: expected a whole number"),
        ({"rank": "x"}, "rank: expected a whole number"),
        ({"step": None}, "step: expected a whole number"),
        ({"block": "mtp"}, "no call of a decoder's router"),
    ],
)
def test_megatron_lines_that_are_none(change: dict[str, Any], pattern: str, tmp_path: Path) -> None:
    ids = routing(4, layers=1)
    refused(pattern, write(tmp_path / "a.jsonl", [{**calls(ids)[0], **change}] * 2), "megatron")
    refused("holds an object with 'a': no router trace", write(tmp_path / "a.jsonl", [*calls(ids), {"a": 1}]))
    cut = calls(routing(4)) + calls(routing(4))[:2]
    refused("did not route the same tokens as often", write(tmp_path / "a.jsonl", cut))


# --- rows ---

IDS = routing(6)
WEIGHTS = RNG.random(IDS.shape)


@pytest.mark.parametrize(
    "form", ["lists", "objects", "by layer", "named layers", "token and layer", "flat", "one list"]
)
def test_rows_of_tokens(form: str, tmp_path: Path) -> None:
    rows: list[Any] = IDS.tolist()
    options: dict[str, Any] = {}
    if form == "objects":
        rows = [{"token": t, "experts": row} for t, row in enumerate(rows)]
    elif form == "by layer":
        rows = [{str(layer): experts for layer, experts in enumerate(row)} for row in rows]
    elif form == "named layers":
        rows = [{"layers": {f"layer_{9 + layer}": experts for layer, experts in enumerate(row)}} for row in rows]
    elif form == "token and layer":
        pairs = [(t, layer, experts) for t, row in enumerate(rows) for layer, experts in enumerate(row)]
        rows = [{"token": t, "layer": layer, "topk_ids": experts} for t, layer, experts in pairs]
    elif form == "flat":
        rows = [{"token": t, "experts": [e for experts in row for e in experts]} for t, row in enumerate(rows)]
        options = {"layers": 3}
    path = write(tmp_path / "rows.jsonl", rows)
    if form == "one list":
        (path := tmp_path / "rows.json").write_text(json.dumps([{"experts": row} for row in rows], indent=1))
    if form == "flat":
        refused("a flat list of 6 experts does not tell layers and top-k: give --layers or --model", path)
        refused("no multiple of 4 layers", path, layers=4)
    assert recognise(path) == "rows"
    trace, notes = import_trace(path, num_experts=8, **options)
    assert trace.expert_ids.tolist() == IDS.tolist()
    assert trace.seq_len.tolist() == [6]
    assert ("model layers 9-11" in trace.source) == (form == "named layers")
    told(notes, "rows taken for one token each, 3 layers x top-2", "taken for one sequence", "not promised")
    assert import_trace(path, "rows", num_experts=8, **options)[0].digest() == trace.digest()


def test_rows_with_weights_and_sequences(tmp_path: Path) -> None:
    rows = [{"request_id": f"r{t // 4}", "experts": IDS[t].tolist(), "weights": WEIGHTS[t].tolist()} for t in range(6)]
    trace, _ = import_trace(write(tmp_path / "a.jsonl", rows))
    assert trace.seq_len.tolist() == [4, 2]
    order = np.argsort(-WEIGHTS, axis=2)
    assert trace.expert_ids.tolist() == np.take_along_axis(IDS, order, axis=2).tolist()
    np.testing.assert_allclose(trace.expert_weights, np.take_along_axis(WEIGHTS, order, axis=2), rtol=1e-6)


@pytest.mark.parametrize(
    ("rows", "pattern"),
    [
        ([[[0, 1]], [[0, 1], [2, 3]]], "rows must agree"),
        ([[[0, 1]], [[0, 1, 2]]], "rows must agree"),
        ([[[0, 1]], {"a": 1}], "holds an object with 'a': expected experts under experts"),
        ([[[0, 1]], [[0, "x"]]], "expected integers"),
        ([[[0, 1]], [[0, 0.5]]], "expected integers"),
        ([[[0, 1], [2]], [[0, 1], [2]]], "ragged"),
        ([[[0, 70000]], [[0, 1]]], "at most 65536"),
        ([[[1, 1]], [[0, 1]]], "twice"),
        ([{"token": 0, "layer": 0, "experts": [1]}, {"token": 0, "layer": 0, "experts": [1]}], "each layer of a"),
        ([{"token": 0, "layer": 0, "experts": [1]}, {"token": 1, "layer": 1, "experts": [1]}], "rows must agree"),
        ([{"token": 0, "layer": 0, "experts": [1]}, {"token": 1}], "as in the first row"),
        ([{"experts": [[0, 1]], "weights": [[0.5]]}] * 2, "weights: expected finite numbers"),
        ([{"experts": [[0, 1]], "weights": [["x", 1]]}] * 2, "weights: expected numbers"),
        ([{"experts": [[0, 1]], "weights": [[0.5, 0.5]]}, {"experts": [[0, 1]]}], "rows must agree"),
    ],
)  # fmt: skip
def test_rows_that_are_none(rows: list[Any], pattern: str, tmp_path: Path) -> None:
    refused(pattern, write(tmp_path / "a.jsonl", rows), "rows")
