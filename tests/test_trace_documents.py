"""Traces on disk: what is written is read back, and whatever else is in the file is refused in one line."""

import io
import os
import struct
import tempfile
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeplan.spec import Trace
from moeplan.spec.errors import DocumentError
from moeplan.tests.documents import arrays, complaint


def save(path: Path, **fields: Any) -> Path:
    with open(path, "wb") as f:
        np.savez_compressed(f, **fields)
    return path


def trace_refused(path: Path) -> str:
    with pytest.raises(DocumentError) as caught:
        Trace.read(path)
    message = str(caught.value)
    assert message.startswith(str(path))
    assert "\n" not in message
    assert len(message) < 1000
    return message


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(1, 300), st.integers(1, 4), st.integers(0, 99))
def test_trace_round_trip(tokens: int, layers: int, experts: int, top_k: int, seed: int) -> None:
    fields = arrays(tokens, layers, experts, min(top_k, experts), seed)
    half = tokens // 2
    lengths = np.array([half, tokens - half]) if half else np.array([tokens])
    ids, weights = fields["expert_ids"], fields["expert_weights"]
    trace = Trace.of(ids, experts, expert_weights=weights, seq_len=lengths, model="m", source="s")
    with tempfile.TemporaryDirectory() as folder:
        again = Trace.read(trace.write(Path(folder) / "t.npz"))
    np.testing.assert_array_equal(again.expert_ids, ids)
    np.testing.assert_array_equal(again.expert_weights, weights)
    np.testing.assert_array_equal(again.seq_len, lengths)
    assert (again.num_experts, again.model, again.source) == (experts, "m", "s")
    assert again.digest() == trace.digest()
    assert again.expert_counts.sum() == ids.size


@settings(max_examples=30)
@given(st.integers(1, 20), st.integers(1, 4), st.integers(2, 300), st.integers(1, 30), st.integers(0, 99))
def test_choices_of_identity_experts_round_trip(tokens: int, layers: int, experts: int, zero: int, seed: int) -> None:
    """They are written as -1, are no load, and make another digest."""
    ids = np.random.default_rng(seed).random((tokens, layers, experts + zero)).argsort(2)[:, :, :2]
    ids[ids >= experts] = -1
    trace = Trace.of(ids, experts, zero_experts=zero)
    with tempfile.TemporaryDirectory() as folder:
        again = Trace.read(trace.write(Path(folder) / "t.npz"))
    np.testing.assert_array_equal(again.expert_ids, ids)
    assert (again.num_experts, again.zero_experts, again.digest()) == (experts, zero, trace.digest())
    assert again.expert_counts.sum() == (ids >= 0).sum()
    assert trace.part(0, 1).zero_experts == trace.parts(1)[0].zero_experts == zero
    counts = trace.for_placement()
    assert counts.counts_only
    np.testing.assert_array_equal(counts.expert_counts, trace.expert_counts)
    if not (ids < 0).any():
        assert Trace.of(ids, experts).digest() != trace.digest()


def test_counts_only_round_trip(tmp_path: Path) -> None:
    trace = Trace.of_counts(np.array([[1, 2, 0], [3, 0, 0]]), model="m")
    again = Trace.read(trace.write(tmp_path / "t.npz"))
    assert again.counts_only
    assert (again.layers, again.num_experts, again.tokens, again.model) == (2, 3, 0, "m")
    np.testing.assert_array_equal(again.expert_counts, trace.expert_counts)
    assert again.digest() == trace.digest()


def test_optional_arrays_are_completed(tmp_path: Path) -> None:
    ids = arrays()["expert_ids"]
    trace = Trace.read(save(tmp_path / "t.npz", expert_ids=ids))
    assert trace.num_experts == ids.max() + 1
    assert trace.seq_len.tolist() == [6]
    assert (trace.expert_weights == 0.5).all()


def test_counts_are_those_of_the_ids() -> None:
    trace = Trace.of(np.array([[[0, 2]], [[2, 1]]]), 4)
    assert trace.expert_counts.tolist() == [[1, 1, 2, 0]]


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        ({"expert_ids": np.ones((2, 3), int)}, "expert_ids: expected integers [tokens, layers, top_k]"),
        ({"expert_ids": np.ones((6, 3, 2))}, "expert_ids: expected integers"),
        ({"expert_ids": np.full((6, 3, 2), "a")}, "expert_ids: expected integers"),
        ({"expert_ids": np.ones((6, 3, 2), bool)}, "expert_ids: expected integers"),
        ({"expert_ids": np.zeros((6, 3, 2), [("a", int)])}, "expert_ids: expected integers"),
        ({"expert_ids": np.zeros((0, 3, 2), int)}, "expert_ids: expected integers"),
        ({"expert_ids": np.zeros((6, 3, 0), int)}, "expert_ids: expected integers"),
        ({"expert_ids": np.full((6, 3, 2), 1)}, "names one expert twice"),
        ({"expert_ids": np.array([[[0, 5]]])}, "must lie in 0..4, found 0..5"),
        (
            {"expert_ids": np.array([[[-1, 5]]]), "zero_experts": 1, "seq_len": np.array([1])},
            "expert_ids: must lie in 0..4, or be -1 for an identity expert, found -1..5",
        ),
        ({"expert_ids": np.array([[[0, -2]]]), "zero_experts": 3}, "or be -1 for an identity expert, found -2..0"),
        ({"expert_ids": np.array([[[-1, 2, 2]]]), "zero_experts": 3}, "names one expert twice"),
        ({"zero_experts": -1}, "zero_experts: expected 0 to 65536, got -1"),
        ({"zero_experts": 10**18}, "zero_experts: expected 0 to 65536"),
        ({"zero_experts": 2.5}, "zero_experts: expected one integer"),
        ({"expert_ids": np.array([[[0, -1]]])}, "must lie in 0..4, found -1..0"),
        ({"expert_ids": np.array([[[0, 2**63]]], np.uint64)}, "must lie in 0..4"),
        ({"expert_ids": np.array([[[0, 1]]], object)}, "not a readable npz"),
        ({"num_experts": 1}, "1 experts cannot give top-2"),
        ({"num_experts": -5}, "cannot give top-2"),
        ({"num_experts": 10**18}, "at most 65536"),
        ({"num_experts": 5.0}, "num_experts: expected one integer"),
        ({"num_experts": np.array([5, 5])}, "num_experts: expected one integer"),
        ({"expert_weights": np.ones((6, 3))}, "expert_weights: expected floats [6, 3, 2], got [6, 3]"),
        ({"expert_weights": np.ones((6, 3, 2), int)}, "expert_weights: expected floats"),
        ({"expert_weights": np.full((6, 3, 2), np.nan)}, "expert_weights: must be finite"),
        ({"expert_weights": np.full((6, 3, 2), 1e300)}, "expert_weights: must be finite"),
        ({"seq_len": np.array([5])}, "seq_len: expected positive integers that sum to 6"),
        ({"seq_len": np.array([6, 0])}, "seq_len"),
        ({"seq_len": np.array([7, -1])}, "seq_len"),
        ({"seq_len": np.array([6.0])}, "seq_len"),
        ({"seq_len": np.array(6)}, "seq_len"),
        ({"seq_len": np.array([], int)}, "seq_len"),
        ({"seq_len": np.array([2**63 - 1, 2**63 - 1, 8])}, "seq_len"),
        ({"model": np.array(["a", "b"])}, "model: expected one text"),
        ({"model": np.array(3)}, "model: expected one text"),
        ({"source": np.array("x" * 10**5)}, "source: expected one text"),
    ],
)
def test_malformed_traces(change: dict[str, Any], rule: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = save(tmp_path / "t.npz", **(arrays() | change))
    assert rule in trace_refused(path)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({}, "neither expert_ids nor expert_counts"),
        ({"expert_counts": np.ones(3)}, "expected numbers [layers, experts]"),
        ({"expert_counts": np.ones((0, 3))}, "expected numbers"),
        ({"expert_counts": np.full((2, 3), "1")}, "expected numbers"),
        ({"expert_counts": np.ones((2, 3), complex)}, "expected numbers"),
        ({"expert_counts": np.array([[1, -1]])}, "not negative"),
        ({"expert_counts": np.array([[1, np.nan]])}, "finite"),
        ({"expert_counts": np.ones((1, 70_000), np.uint8)}, "expected numbers"),
        ({"expert_counts": np.ones((2, 3)), "num_experts": 4}, "expert_counts has 3, not 4"),
    ],
)
def test_malformed_counts(fields: dict[str, Any], rule: str, tmp_path: Path) -> None:
    assert rule in trace_refused(save(tmp_path / "t.npz", **fields))


@pytest.mark.parametrize("content", [b"", b"PK", b"{}", b"\x93NUMPY", b"PK\x05\x06" + bytes(18), os.urandom(200)])
def test_files_that_are_no_traces(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    path.write_bytes(content)
    trace_refused(path)
    trace_refused(tmp_path)


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = save(tmp_path / "whole.npz", **arrays()).read_bytes()
    path = tmp_path / "t.npz"
    for length in range(0, len(whole), 17):
        path.write_bytes(whole[:length])
        trace_refused(path)


def test_damaged_bytes_are_refused_or_harmless(tmp_path: Path) -> None:
    """Whatever a flipped byte does to zip, deflate or numpy headers, it ends in a trace or in one line."""
    whole = save(tmp_path / "whole.npz", **arrays()).read_bytes()
    path = tmp_path / "t.npz"
    complaints = []
    for at in range(0, len(whole), 5):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
        complaints.append(complaint(lambda: Trace.read(path)))
    assert any(complaints)
    assert all("\n" not in message for message in complaints)


def test_pickled_content_is_never_run(tmp_path: Path) -> None:
    """An npy member that would create a file if its pickle were loaded."""
    mark = tmp_path / "mark"
    attack = b"cos\nmkdir\n(V" + str(mark).encode() + b"\ntR."
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": "|O", "fortran_order": False, "shape": ()})
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("expert_ids.npy", header.getvalue() + attack)
    assert "not a readable npz" in trace_refused(path)
    assert not mark.exists()


def test_zip_bombs_are_refused_before_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moeplan.spec.trace.MAX_TRACE_BYTES", 2**20)
    path = save(tmp_path / "t.npz", expert_ids=np.zeros((2**21, 1, 1), np.int8))
    assert path.stat().st_size < 2**16
    assert "unpacks to" in trace_refused(path)


def test_headers_that_promise_more_than_there_is(tmp_path: Path) -> None:
    header = io.BytesIO()
    shape = (2**40, 2**10, 2)
    np.lib.format.write_array_header_1_0(header, {"descr": "<i8", "fortran_order": False, "shape": shape})
    path = tmp_path / "t.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("expert_ids.npy", header.getvalue() + bytes(64))
    trace_refused(path)


def test_encrypted_members_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "t.npz", **arrays())
    content = bytearray(path.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        at = content.find(signature)
        while at >= 0:
            (flags,) = struct.unpack_from("<H", content, at + offset)
            struct.pack_into("<H", content, at + offset, flags | 1)
            at = content.find(signature, at + 4)
    path.write_bytes(content)
    assert "not a readable npz" in trace_refused(path)


@settings(max_examples=25, deadline=None)
@given(hnp.arrays(hnp.scalar_dtypes() | hnp.unicode_string_dtypes(), hnp.array_shapes(min_dims=0, max_dims=4)))
def test_any_array_in_any_place(array: np.ndarray) -> None:
    for name in ("expert_ids", "expert_weights", "seq_len", "num_experts", "expert_counts", "model"):
        fields = arrays() | {name: array}
        if name == "expert_counts":
            del fields["expert_ids"]
        with tempfile.TemporaryDirectory() as folder:
            path = save(Path(folder) / "t.npz", **fields)
            assert "\n" not in complaint(lambda path=path: Trace.read(path))
