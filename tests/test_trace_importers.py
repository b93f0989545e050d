"""Importers: small recordings in every format, checked value by value; damaged and hostile ones refused in words."""

import base64
import io
import json
import re
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import save_file

from moeplan.profiler.traces import import_trace
from moeplan.profiler.traces.importers import recognise
from moeplan.service import cli
from moeplan.spec import Trace
from moeplan.spec.errors import MoeplanError

E, P, LAYERS = 4, 6, 3
# Layer 0 is dense; physical experts 4 and 5 are copies of other logical ones in each layer.
MAP = torch.tensor([[0, 1, 2, 3, 0, 1], [0, 2, 1, 3, 3, 0], [3, 2, 1, 0, 1, 2]])


def told(notes: list[str], *patterns: str) -> None:
    for pattern in patterns:
        assert any(re.search(pattern, note) for note in notes), (pattern, notes)


def refused(pattern: str, path: Path, kind: str | None = None, **options: int) -> None:
    with pytest.raises(MoeplanError, match=pattern) as stopped:
        import_trace(path, kind, **options)
    assert "\n" not in str(stopped.value)
    assert len(str(stopped.value)) < 600


# --- SGLang's recorder ---


def ids_of(tokens: Sequence[Sequence[Sequence[int]]]) -> torch.Tensor:
    """Physical ids [tokens][2 layers with experts][K] as the file holds them: a dense layer 0, a width of 8."""
    full = torch.full((LAYERS, len(tokens), 8), -1, dtype=torch.int32)
    for t, token in enumerate(tokens):
        for layer, experts in enumerate(token, 1):
            full[layer, t, : len(experts)] = torch.tensor(experts)
    return full


def per_token(forward_pass: int, rank: int, inputs: list[int], lengths: list[int] | None, ids: torch.Tensor) -> dict:
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "input_ids": inputs,
        "positions": list(range(len(inputs))),
        "extend_seq_lens": lengths,
        "forward_mode": 1,
        "misc_objects": [],
        "topk_ids_of_layer": ids,
        "global_physical_count": torch.zeros(LAYERS, P, dtype=torch.int32),
    }


def per_pass(forward_pass: int, rank: int, counts: torch.Tensor) -> dict:
    return {
        "forward_pass_id": forward_pass,
        "rank": rank,
        "gatherer_key": "primary",
        "global_physical_count": counts,
    }


def save_records(path: Path, records: object, logical: object = MAP) -> Path:
    torch.save({"records": records, "last_physical_to_logical_map": logical}, path)
    return path


FIRST = ids_of([[[1, 4], [0, 5]], [[5, 2], [4, 3]], [[3, 0], [1, 0]]])
# Layer 1 maps 1->2, 4->3, 5->0, 2->1, 3->3, 0->0; layer 2 maps 0->3, 5->2, 4->1, 3->0, 1->2.
FIRST_LOGICAL = [[[2, 3], [3, 2]], [[0, 1], [1, 0]], [[3, 0], [2, 3]]]
SECOND = ids_of([[[0, 1], [2, 3]], [[2, 3], [0, 1]]])
SECOND_LOGICAL = [[[0, 2], [1, 0]], [[1, 3], [3, 2]]]


def test_sglang_per_token_maps_back_drops_dense_layers_and_padding(tmp_path: Path) -> None:
    records = [per_token(8, 0, [9, 9], None, SECOND), per_token(7, 0, [5, 6, 7], [2, 1], FIRST)]
    trace, notes = import_trace(save_records(tmp_path / "r.pt", records))
    assert trace.expert_ids.tolist() == FIRST_LOGICAL + SECOND_LOGICAL  # passes in order
    assert trace.seq_len.tolist() == [2, 1, 1, 1]
    assert (trace.num_experts, trace.top_k, trace.layers) == (E, 2, 2)
    assert trace.source.endswith("model layers 1-2")
    assert (trace.expert_weights == 0.5).all()
    told(notes, "per-token", "mapped back", "layer 0 without experts: dropped", "room for 8", "not promised", "decoded")


def test_sglang_ranks_with_the_same_tokens_count_once_whatever_copy_they_chose(tmp_path: Path) -> None:
    other = FIRST.clone()
    other[1, 0, 1] = 3  # the other copy of logical expert 3
    for rank, ids in enumerate((FIRST, other)):
        save_records(tmp_path / f"r_{rank}.pt", [per_token(7, rank, [5, 6, 7], [3], ids)])
    trace, notes = import_trace(tmp_path, "sglang")
    assert trace.expert_ids.tolist() == FIRST_LOGICAL
    told(notes, "rank 1: the same tokens as rank 0.*counted once")


def test_sglang_ranks_with_different_tokens_are_joined(tmp_path: Path) -> None:
    save_records(tmp_path / "r_0.pt", [per_token(7, 0, [5, 6, 7], [3], FIRST)])
    save_records(tmp_path / "r_1.pt", [per_token(7, 1, [1, 2], [2], SECOND)])
    save_records(tmp_path / "r_2.pt", [per_token(7, 2, [1, 2], [2], SECOND)])  # tensor parallel with rank 1
    save_records(tmp_path / "r_3.pt", [per_token(7, 3, [], [], ids_of([]))])  # idle
    trace, notes = import_trace(tmp_path)
    assert trace.expert_ids.tolist() == FIRST_LOGICAL + SECOND_LOGICAL
    assert trace.seq_len.tolist() == [3, 2]
    told(notes, "rank 2: the same tokens as rank 1", "saw different tokens")


def test_sglang_padding_tokens_are_dropped(tmp_path: Path) -> None:
    ids = torch.cat([FIRST, ids_of([[[], []]] * 2)], dim=1)
    trace, notes = import_trace(save_records(tmp_path / "r.pt", [per_token(7, 0, [5, 6, 7, 0, 0], [1, 2], ids)]))
    assert trace.expert_ids.tolist() == FIRST_LOGICAL
    assert trace.seq_len.tolist() == [1, 2]
    told(notes, "2 of 5 tokens are padding")


def test_sglang_per_pass_sums_ranks_and_passes_in_logical_experts(tmp_path: Path) -> None:
    a = torch.tensor([[0] * P, [1, 2, 3, 4, 5, 6], [6, 5, 4, 3, 2, 1]], dtype=torch.int32)
    b = a * 2
    for rank, counts in enumerate((a, b, b)):  # rank 2 is rank 1 again
        save_records(tmp_path / f"r_{rank}.pt", [per_pass(1, rank, counts), per_pass(2, rank, counts * (rank + 1) % 7)])
    save_records(tmp_path / "r_2.pt", [per_pass(1, 2, b), per_pass(2, 2, b * 2 % 7)])
    trace, notes = import_trace(tmp_path)
    physical = (a + a % 7 + b + b * 2 % 7).numpy()
    expected = np.zeros((LAYERS, E))
    for layer in range(LAYERS):
        for slot in range(P):
            expected[layer, MAP[layer, slot]] += physical[layer, slot]
    assert trace.counts_only
    assert trace.expert_counts.tolist() == expected[1:].tolist()
    told(notes, "counts only", "rank 2: the same tokens as rank 1", "2 forward passes", "layer 0 without experts")


def test_sglang_file_given_twice_counts_once(tmp_path: Path) -> None:
    for name in "ab":
        save_records(tmp_path / f"{name}.pt", [per_pass(1, 0, torch.ones(LAYERS, P, dtype=torch.int32))])
    trace, notes = import_trace(tmp_path)
    assert trace.expert_counts.sum() == LAYERS * P
    told(notes, "1 records found twice")
    save_records(tmp_path / "b.pt", [per_pass(1, 0, torch.full((LAYERS, P), 2))])
    refused("rank 0 has two different records of forward pass 1", tmp_path)


def test_sglang_statistics_sum_the_circular_buffer(tmp_path: Path) -> None:
    counts = torch.zeros(10, LAYERS, E, dtype=torch.int32)
    counts[7:, 1:] = torch.arange(8).reshape(2, 4).int()
    counts[0, 1:] = 1
    for name in "ab":
        torch.save(
            {"rank": 0, "logical_count": counts, "average_utilization_rate_over_window": None}, tmp_path / f"{name}.pt"
        )
    trace, notes = import_trace(tmp_path)
    assert trace.expert_counts.tolist() == [[1, 4, 7, 10], [13, 16, 19, 22]]
    told(notes, "4 of 10 steps", "counted once", "counts only", "layer 0 without", "22 to 70|26 to 70|choices")
    torch.save({"rank": 0, "logical_count": counts[7:9]}, tmp_path / "b.pt")
    trace, notes = import_trace(tmp_path)
    assert trace.expert_counts.tolist() == [[1, 6, 11, 16], [21, 26, 31, 36]]
    told(notes, "2 of 2 steps.*may have wrapped", "2 recordings with different counts: summed")


@settings(max_examples=25)
@given(
    hnp.arrays(
        np.int32, st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5)), elements=st.integers(0, 99)
    )
)
def test_sglang_statistics_equal_their_sum(counts: np.ndarray) -> None:
    total = counts.sum(axis=0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "stat.pt"
        torch.save({"rank": 0, "logical_count": torch.from_numpy(counts)}, path)
        if not total.any():
            refused("every count is zero", path)
            return
        trace, _ = import_trace(path)
        assert trace.expert_counts.tolist() == total[total.any(axis=1)].tolist()
        # Written and imported again, a trace is itself.
        again, _ = import_trace(trace.write(Path(folder) / "trace.npz"))
        assert again.digest() == trace.digest()


@settings(max_examples=25)
@given(st.data())
def test_sglang_per_token_inverts_any_map(data: st.DataObject) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    experts, extra, layers, tokens = (data.draw(st.integers(*r)) for r in ((2, 9), (0, 4), (1, 3), (1, 12)))
    top_k = data.draw(st.integers(1, min(experts, 8)))
    copies = rng.integers(0, experts, (layers, extra))
    logical = rng.permuted(np.concatenate([np.tile(np.arange(experts), (layers, 1)), copies], axis=1), axis=1)
    wanted = rng.permuted(np.tile(np.arange(experts), (tokens, layers, 1)), axis=2)[:, :, :top_k]
    physical = np.full((layers, tokens, 8), -1, np.int32)
    for t, layer, k in np.ndindex(tokens, layers, top_k):
        physical[layer, t, k] = rng.choice((logical[layer] == wanted[t, layer, k]).nonzero()[0])
    record = per_token(3, 0, list(range(tokens)), [tokens], torch.from_numpy(physical))
    with tempfile.TemporaryDirectory() as folder:
        trace, _ = import_trace(save_records(Path(folder) / "r.pt", [record], torch.from_numpy(logical)))
    assert trace.expert_ids.tolist() == wanted.tolist()
    assert trace.num_experts == experts


def test_sglang_refuses_what_is_no_recording(tmp_path: Path) -> None:
    good = per_token(7, 0, [5, 6, 7], [3], FIRST)
    counts = torch.ones(LAYERS, P, dtype=torch.int32)
    out_of_range, short = FIRST.clone(), FIRST.clone()
    out_of_range[1, 0, 0] = P
    short[1, 0, 1] = -1
    twice = ids_of([[[0, 5], [0, 1]]])  # both copies of logical expert 0
    cases: list[tuple[str, object, object]] = [
        ("zero records", [], MAP),
        ("expected a list", {"a": 1}, MAP),
        ("expected a dictionary", [3], MAP),
        ("missing", [good], None),
        ("last_physical_to_logical_map: expected integers", [good], MAP.float()),
        ("last_physical_to_logical_map: expected experts in 0..5", [good], MAP * 7),
        ("expected experts in 0..5, found -1", [good], MAP - 1),
        (r"expected \[layers, physical", [good], MAP[0]),
        (r"\[2 layers, tokens", [good], MAP[:2]),
        ("-1..5, found -1..6.*shared-experts", [good | {"topk_ids_of_layer": out_of_range}], MAP),
        ("fewer than 2 experts", [good | {"topk_ids_of_layer": short}], MAP),
        ("names one expert twice", [per_token(7, 0, [1], [1], twice)], MAP),
        ("expected integers", [good | {"topk_ids_of_layer": FIRST.float()}], MAP),
        ("2 input_ids", [good | {"input_ids": [1, 2]}], MAP),
        ("list of integers", [good | {"positions": [0, True, "x"]}], MAP),
        ("at most 3 tokens", [good | {"extend_seq_lens": [2, 2]}], MAP),
        ("forward_pass_id: expected an integer", [good | {"forward_pass_id": "x"}], MAP),
        ("gatherer_key", [good | {"gatherer_key": [[]]}], MAP),
        ("per_token beside per_pass", [good, per_pass(8, 0, counts)], MAP),
        (r"expected \[3, 6\]", [per_pass(8, 0, counts[:2])], MAP),
        ("negative count", [per_pass(8, 0, -counts)], MAP),
        ("expected integers", [per_pass(8, 0, counts.double() * torch.nan)], MAP),
        ("every count is zero", [per_pass(8, 0, counts * 0)], MAP),
        ("no token was recorded", [per_token(7, 0, [1], [1], ids_of([[[], []]]))], MAP),
        ("dense tensor", [per_pass(8, 0, counts.to_sparse())], MAP),
    ]
    for pattern, records, logical in cases:
        refused(pattern, save_records(tmp_path / "r.pt", records, logical), "sglang")
    huge = torch.zeros(1, dtype=torch.int32).expand(2**12, 2**20, 8)  # one number on the disk
    refused("too large", save_records(tmp_path / "r.pt", [good | {"topk_ids_of_layer": huge}]))
    many = torch.arange(70_000).reshape(1, -1)
    one = per_pass(1, 0, torch.ones_like(many))
    refused("expected experts in 0..65535", save_records(tmp_path / "r.pt", [one], many))
    torch.save({"logical_count": torch.ones(2, 3, 70_000)}, tmp_path / "r.pt")
    refused("logical_count: expected integers", tmp_path / "r.pt")
    torch.save({"logical_count": torch.ones(2, 1, 70_000).int()}, tmp_path / "r.pt")
    refused(r"expected \[steps, layers, experts\]", tmp_path / "r.pt")
    torch.save({"logical_count": -torch.ones(2, 1, 7).int()}, tmp_path / "r.pt")
    refused("negative count", tmp_path / "r.pt")
    save_records(tmp_path / "s.pt", [good])
    refused("beside records", tmp_path, "sglang")


# --- answers of requests ---


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


A = np.array([[[0, 3], [2, 1]], [[1, 2], [0, 3]]], np.int16)
B = np.array([[[4, 3], [2, 4]]], np.int16)
UNROUTED = np.zeros((1, 2, 2), np.int16)  # the last token of an answer


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


# --- TensorRT-LLM ---


def save_statistics(folder: Path, ranks: list[dict[str, Any]], meta: object = None) -> Path:
    folder.mkdir(exist_ok=True)
    body = {"num_experts": 4, "num_experts_per_token": 2} if meta is None else meta
    (folder / "meta_info.json").write_text(json.dumps(body))
    for r, counts in enumerate(ranks):
        tensors = {name: torch.as_tensor(value) for name, value in counts.items()}
        save_file(tensors, folder / f"rank{r}.safetensors")
    return folder


def test_tensorrt_llm_sums_ranks_and_iterations_by_absolute_layer(tmp_path: Path) -> None:
    ranks = [
        {"50_3": [1, 2, 3, 4], "50_10": [4, 0, 0, 6], "51_3": [1, 1, 1, 1], "51_10": [0, 0, 4, 0]},
        {"50_3": [1, 1, 1, 3], "50_10": [6, 0, 0, 0]},
    ]
    trace, notes = import_trace(save_statistics(tmp_path / "s", ranks))
    assert trace.expert_counts.tolist() == [[3, 4, 5, 8], [10, 0, 4, 6]]
    assert trace.source.endswith("model layers 3, 10")
    told(notes, "counts only", "2 iterations of 2 ranks", "model's 3, 10")
    assert not any("choices" in note for note in notes)


@settings(max_examples=25)
@given(
    hnp.arrays(np.int64, st.tuples(st.integers(1, 3), st.integers(1, 4), st.just(5)), elements=st.integers(1, 10**12))
)
def test_tensorrt_llm_counts_return(counts: np.ndarray) -> None:
    """[ranks, layers, experts] written as the engine does comes back as its sum."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = [{f"7_{layer}": row for layer, row in enumerate(rank)} for rank in counts]
        meta = {"num_experts": 5, "num_experts_per_token": 2}
        trace, _ = import_trace(save_statistics(Path(folder) / "s", ranks, meta))
    assert trace.expert_counts.tolist() == counts.sum(axis=0).tolist()


def test_tensorrt_llm_refuses(tmp_path: Path) -> None:
    good = {"0_3": [1, 2, 3, 4]}
    cases: list[tuple[str, list[dict[str, Any]], object]] = [
        ("num_experts", [good], {}),
        ("num_experts", [good], {"num_experts": 10**9}),
        ("expected a JSON object", [good], [1]),
        ("expected 5 counts", [good], {"num_experts": 5}),
        ("iteration", [{"x": [1, 2, 3, 4]}], None),
        ("expected integers", [{"0_3": [1.0, 2.0, 3.0, float("nan")]}], None),
        ("negative", [{"0_3": [1, 2, 3, -4]}], None),
        ("every count is zero", [{"0_3": [0, 0, 0, 0]}], None),
        ("zero counts", [{}], None),
    ]
    for pattern, ranks, meta in cases:
        refused(pattern, save_statistics(tmp_path / "s", ranks, meta), "tensorrt-llm")
    (tmp_path / "s" / "rank0.safetensors").write_bytes(b"\xff" * 100)
    refused("not a readable safetensors", tmp_path / "s")
    (tmp_path / "s" / "rank0.safetensors").unlink()
    refused("no .safetensors", tmp_path / "s")
    (tmp_path / "s" / "meta_info.json").write_text("{")
    refused("not JSON", tmp_path / "s")
    refused("statistics folder", tmp_path / "s" / "meta_info.json", "tensorrt-llm")


# --- Transformers ---

LOGITS = torch.tensor([[[0.0, 2.0, 1.0, 1.0], [5.0, -1.0, 4.0, 0.0]], [[3.0, 1.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0]]])


@pytest.mark.parametrize("form", ["tuple", "output", "npz", "safetensors"])
def test_transformers_takes_the_highest_logits(form: str, tmp_path: Path) -> None:
    layers = [LOGITS[layer] for layer in range(2)]
    many = {f"layer_{9 + i}": value for i, value in enumerate(layers)}  # natural order: 9 before 10
    path = tmp_path / "logits.pt"
    if form == "tuple":
        torch.save((layers[0].bfloat16(), None, layers[1].bfloat16()), path)
    elif form == "output":
        torch.save({"router_logits": tuple(layers)}, path)
    elif form == "npz":
        np.savez(path := tmp_path / "l.npz", **{name: many[name].numpy() for name in reversed(many)})
    else:
        save_file(many, path := tmp_path / "l.safetensors")
    assert recognise(path) == "transformers"
    trace, notes = import_trace(path, top_k=2)
    assert trace.expert_ids.tolist() == [[[1, 2], [0, 2]], [[0, 2], [0, 1]]]
    high = 1 / (1 + np.exp(-1))
    expected = [[[high, 1 - high], [high, 1 - high]], [[high, 1 - high], [0.5, 0.5]]]
    np.testing.assert_allclose(trace.expert_weights, expected, rtol=1e-6)
    assert trace.num_experts == 4
    told(notes, "per-token", "softmax over those chosen", "taken for one")
    if form == "tuple":
        told(notes, "layers 1 without router logits: dropped")
        assert trace.source.endswith("model layers 0, 2")
    refused("give --top-k", path)
    refused("top-5 of 4", path, top_k=5)
    refused("num-experts is 4", path, top_k=2, num_experts=8)


def test_transformers_batches_are_sequences_and_bad_logits_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "l.pt"
    torch.save((torch.randn(3, 5, 4), torch.randn(3, 5, 4)), path)
    assert import_trace(path, top_k=1)[0].seq_len.tolist() == [5, 5, 5]
    bad: list[tuple[object, str]] = [
        ((LOGITS[0], LOGITS[1] * torch.nan), "finite"),
        ((LOGITS[0], LOGITS[1, :1]), "layers must agree"),
        ((LOGITS[0], LOGITS[1].int()), "expected floats"),
        ((LOGITS[0], "x"), "as a tensor"),
        ((LOGITS[0], (LOGITS[0], LOGITS[1])), "as a tensor"),
        ((LOGITS[0, 0],), "expected .tokens, experts"),
        ((torch.zeros(1).expand(2**21, 2**10),), "too large"),
        ((torch.zeros(1, 70_000),), "expected .tokens, experts"),
        ((), "0 layers"),
        ((None,), "0 layers"),
        (LOGITS[0], "a tensor per layer"),
        (7, "a tensor per layer"),
    ]
    for content, pattern in bad:
        torch.save(content, path)
        refused(pattern, path, top_k=2)
    refused("one file of router logits", tmp_path, "transformers", top_k=2)


# --- neutral npz ---


def test_neutral_forms_are_normalised(tmp_path: Path) -> None:
    ids = np.array([[[0, 1]], [[2, 0]], [[1, 2]]])
    weights = np.array([[[0.25, 0.75]], [[0.5, 0.5]], [[0.75, 0.25]]])
    np.savez(tmp_path / "a.npz", expert_ids=ids, expert_weights=weights, extra=1)
    trace, notes = import_trace(tmp_path / "a.npz")
    assert trace.expert_ids.tolist() == [[[1, 0]], [[2, 0]], [[1, 2]]]
    assert trace.expert_weights.tolist() == [[[0.75, 0.25]], [[0.5, 0.5]], [[0.75, 0.25]]]
    told(notes, "reordered", "'extra'", "no seq_len", "highest number seen gives 3")
    np.savez(tmp_path / "a.npz", expert_ids=ids[:, :, 0])
    trace, notes = import_trace(tmp_path / "a.npz", num_experts=7)
    assert trace.expert_ids.tolist() == ids[:, :, :1].tolist()
    assert trace.num_experts == 7
    told(notes, "top-1", "no expert_weights")
    np.savez(tmp_path / "a.npz", expert_counts=np.arange(12.0).reshape(2, 2, 3))
    trace, notes = import_trace(tmp_path / "a.npz")
    assert trace.expert_counts.tolist() == [[6, 8, 10], [12, 14, 16]]
    told(notes, "2 steps: summed", "counts only")


def test_neutral_refuses(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    ids = np.array([[[0, 1]]])
    cases: list[tuple[dict[str, Any], str]] = [
        ({"expert_ids": np.array([{}], dtype=object)}, "not a readable npz"),
        ({"expert_ids": ids * 1.0}, "expected integers"),
        ({"expert_ids": ids - 1, "num_experts": 2}, "found -1"),
        ({"expert_ids": ids * 0, "num_experts": 2}, "twice"),
        ({"expert_ids": ids[:0]}, "expected integers"),
        ({"expert_ids": ids * 70_000}, "at most 65536"),
        ({"expert_ids": ids, "num_experts": 1}, "top-2"),
        ({"expert_ids": ids, "num_experts": 70_000}, "num_experts"),
        ({"expert_ids": ids, "expert_weights": ids * np.nan}, "finite"),
        ({"expert_ids": ids, "seq_len": [2]}, "seq_len"),
        ({"expert_ids": ids, "model": np.array(["a" * 5000])}, "one text"),
        ({"expert_counts": ids[0] * np.nan}, "finite"),
        ({"expert_counts": -ids[0]}, "negative"),
        ({"expert_counts": ids[0, 0]}, "layers, experts"),
        ({"expert_counts": ids[0], "num_experts": 3}, "of 2 experts, num_experts is 3"),
        ({"other": np.array("x")}, "neither"),
        ({}, "neither"),
    ]
    for arrays, pattern in cases:
        np.savez(path, **arrays)
        refused(pattern, path)
    np.savez(path, **{"x\n\x1b[31m" + "y" * 5000: np.array("z")})
    refused("neither a trace", path)
    np.savez(path, x=ids)
    refused("neither expert_ids nor expert_counts", path, "npz")


# --- files that mean harm, or are none ---


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
