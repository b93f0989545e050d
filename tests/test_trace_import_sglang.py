"""SGLang's recorder: small recordings, checked value by value."""

import tempfile
from pathlib import Path

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeplan.profiler.traces import import_trace
from moeplan.tests.recordings import (
    FIRST,
    FIRST_LOGICAL,
    LAYERS,
    MAP,
    SECOND,
    SECOND_LOGICAL,
    E,
    P,
    ids_of,
    per_pass,
    per_token,
    refused,
    save_records,
    told,
)


def test_sglang_per_token_maps_back_drops_dense_layers_and_padding(tmp_path: Path) -> None:
    records = [per_token(8, 0, [9, 9], None, SECOND), per_token(7, 0, [5, 6, 7], [2, 1], FIRST)]
    trace, notes = import_trace(save_records(tmp_path / "r.pt", records))
    assert trace.expert_ids.tolist() == FIRST_LOGICAL + SECOND_LOGICAL  # passes in order
    assert trace.seq_len.tolist() == [2, 1, 1, 1]
    assert (trace.num_experts, trace.top_k, trace.layers) == (E, 2, 2)
    assert trace.source.endswith("model layers 1-2")
    assert (trace.expert_weights == 0.5).all()
    told(notes, "per-token", "mapped back", "layer 0 without experts: dropped", "8 places", "not promised", "decoded")


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
