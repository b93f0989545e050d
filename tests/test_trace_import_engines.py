"""TensorRT-LLM's statistics, router logits, arrays of one's own: small recordings, checked value by value."""

import tempfile
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
from moeplan.tests.recordings import LOGITS, refused, save_statistics, told


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
