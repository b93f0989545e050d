"""The documents: what is written is read back, and whatever else is in the file is refused in one line."""

import hashlib
import io
import json
import os
import struct
import tempfile
import threading
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moeplan.spec import Cluster, Model, MoeplanError, Plan, Report, Trace, Workload
from moeplan.spec.catalogue import catalogue, load_model
from moeplan.spec.document import Document, write_atomically
from moeplan.spec.errors import DocumentError, MissingCurveError
from moeplan.spec.schemas import schemas, write_schemas

ROOT = Path(__file__).parents[1]


def curve(name: str = "bytes") -> dict[str, Any]:
    axis = {"name": name, "values": [1.0, 1024.0], "beyond": "flagged"}
    return {"axes": [axis], "median": [1e-6, 1e-3], "spread": [0.1, 0.2]}


def cluster_body() -> dict[str, Any]:
    route = {"operator": "route", "shape": {"hidden": 8, "experts": 4, "top_k": 2}, "dtype": "f32"}
    device = {
        "host": "a",
        "kind": "cpu",
        "name": "processor",
        "memory_bytes": 2**30,
        "stream_bandwidth": 1e10,
        "operators": [route | {"curve": curve("tokens")}],
    }
    link = {"latency": 1e-5, "curve": curve()}
    return {
        "devices": [device, device],
        "hosts": [{"name": "a"}],
        "links": [{"source": 0, "target": 1} | link, {"source": 1, "target": 0} | link],
        "collectives": [{"collective": "all_gather", "group": [0, 1], "curve": curve(), "busy": curve()}],
        "provenance": {"created": "now", "command": "test", "versions": {}, "seconds": 1.0, "models": ["tiny-moe"]},
    }


def plan_body() -> dict[str, Any]:
    device = {"host": "a", "kind": "cpu", "name": "processor", "memory_bytes": 2**30}
    memory = {"weights": 1, "gathered": 0, "cache": 1, "activations": 1, "limit": 10}
    ep = {"strategy": "ep", "slots": [list(range(8)), list(range(8, 16))]}
    return {
        "model": load_model("tiny-moe").model_dump(mode="json"),
        "workload": {"phase": "decode", "tokens": 6, "sequences": 6, "context": 3},
        "dtype": "f32",
        "devices": [device, device],
        "degrees": {"tensor": 1, "data": 2, "expert": 2},
        "sequences": [2, 4],
        "tokens": [2, 4],
        "layers": [ep] * 7 + [{"strategy": "sharded", "slots": [[], []], "split": [28, 100]}],
        "stored_layers": 8,
        "routing": {"kind": "assumed", "assumption": "power law"},
        "predicted": {
            "step_seconds": 0.1,
            "layers": [{"layer": 0, "parts": {"attention": 0.1}}],
            "memory": [memory, memory],
            "traffic": [{"source": 0, "target": 1, "bytes": 5}],
        },
        "solver": {"status": "optimal", "objective": 0.1, "bound": 0.1, "gap": 0.0, "space": "all"},
        "solve_seconds": 1.0,
        "baselines": {"linear": 0.2},
        "digests": {},
    }


def model_body() -> dict[str, Any]:
    """The first layers of gpt-oss-20b: the model that sets most fields."""
    body = load_model("gpt-oss-20b").model_dump(mode="json")
    return body | {"blocks": body["blocks"][:2]}


def report_body() -> dict[str, Any]:
    return {
        "plan": "abc",
        "model": "tiny-moe",
        "workload": "decode:6@3",
        "step": {"predicted": 1.0, "measured": 2.0, "spread": 0.1},
        "repetitions": 3,
        "parts": [{"layer": 0, "part": "expert", "predicted": 1.0, "measured": 0.0, "spread": 0.0}],
        "memory": [1, 2],
        "check": {"relative_error": 1e-6, "tolerance": 1e-4, "layers": 8, "tokens": 6, "passed": True},
        "tolerance": 0.25,
        "passed": True,
        "environment": {"torch": "2"},
    }


BODIES: dict[type[Document], Callable[[], dict[str, Any]]] = {
    Model: model_body,
    Workload: lambda: {"phase": "prefill", "tokens": 512, "sequences": 4, "context": 0},
    Cluster: cluster_body,
    Plan: plan_body,
    Report: report_body,
}
documents = pytest.mark.parametrize("document", BODIES, ids=lambda d: d.__name__)


def text(document: type[Document], body: dict[str, Any]) -> str:
    return json.dumps({"kind": document.kind, "version": document.version, **body})


def refused(document: type[Document], content: str) -> str:
    """The error of a content, which must be one printable line of bounded length."""
    with pytest.raises(DocumentError) as caught:
        document.parse(content, "file.json")
    message = str(caught.value)
    assert message.startswith("file.json: ")
    assert message.isprintable()
    assert len(message) < 1000
    return message


def complaint(read: Callable[[], object]) -> str:
    """The error of a reader, empty if it succeeds; any other exception passes through."""
    try:
        read()
    except DocumentError as error:
        return str(error)
    return ""


# Round trips


@documents
def test_round_trip(document: type[Document], tmp_path: Path) -> None:
    original = document.model_validate(BODIES[document]())
    path = original.write(tmp_path / "new" / "folder" / "d.json")
    again = document.read(path)
    assert again == original
    assert again.digest() == original.digest()
    assert json.loads(path.read_text())["kind"] == document.kind
    assert [p.name for p in path.parent.iterdir()] == ["d.json"]


def test_every_catalogue_model_round_trips() -> None:
    for model in catalogue().values():
        assert Model.parse(model.to_json(), "m") == model


@documents
def test_digest_follows_the_content(document: type[Document]) -> None:
    """The digest tells any two contents apart, and is the same whatever the order of the fields in the file."""
    body = BODIES[document]()
    shuffled = dict(reversed(body.items()))
    assert document.parse(text(document, shuffled), "d").digest() == document.model_validate(body).digest()


def test_digest_is_the_same_on_every_machine() -> None:
    content = '{"context": 2048, "phase": "decode", "sequences": 32, "tokens": 32}'
    assert Workload.from_text("decode:32@2048").digest() == hashlib.sha256(content.encode()).hexdigest()[:16]


@settings(max_examples=50, deadline=None)
@given(st.sampled_from(["prefill", "decode"]), st.integers(1, 5000), st.integers(1, 300), st.integers(0, 10**6))
def test_workload_text_round_trips(phase: str, count: int, length: int, context: int) -> None:
    written = f"prefill:{count * length}@{length}" if phase == "prefill" else f"decode:{count}@{context}"
    workload = Workload.from_text(written)
    assert Workload.from_text(str(workload)) == workload
    assert Workload.parse(workload.to_json(), "w") == workload
    assert workload.length == (length if phase == "prefill" else 1)


MALFORMED = (
    "train:5 prefill prefill:0 decode:0 prefill:5@0 prefill:10@3 decode:-1 decode:1e3 prefill:99999999 decode:3@"
)


@pytest.mark.parametrize("written", ["", "prefill:512@512 extra", *MALFORMED.split()])
def test_malformed_workload_texts(written: str) -> None:
    with pytest.raises(MoeplanError, match="workload") as caught:
        Workload.from_text(written)
    assert "\n" not in str(caught.value)


# Malformed content of every document


@documents
@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "null", "3", '"text"', "[" * 200_000, '{"a":' * 50_000, "\ufeff{}", "{'kind': 1}", "1" * 5000],
)
def test_not_a_document(document: type[Document], content: str) -> None:
    refused(document, content)


@documents
def test_kind_and_version(document: type[Document]) -> None:
    body = BODIES[document]()
    assert "kind: expected" in refused(document, json.dumps(body))
    assert "kind: expected" in refused(document, json.dumps({"kind": "x" * 10**6, "version": 1, **body}))
    assert "version: this moeplan reads 1, got 2" in refused(
        document, json.dumps({"kind": document.kind, "version": 2, **body})
    )
    assert "version" in refused(document, json.dumps({"kind": document.kind, **body}))


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values that are no containers."""
    if isinstance(value, dict):
        return [leaf for name, item in value.items() for leaf in leaves(item, (*path, name))]
    if isinstance(value, list):
        return [leaf for i, item in enumerate(value[:2]) for leaf in leaves(item, (*path, i))]
    return [path]


def changed(body: dict[str, Any], path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    body = json.loads(json.dumps(body))
    place: Any = body
    for step in path[:-1]:
        place = place[step]
    place[path[-1]] = value
    return body


HOSTILE = [float("nan"), float("inf"), -1, 10**400, "x\n\x1b[31m", [], {}, [[[[]]]], True, 1.5, None]


@documents
@pytest.mark.parametrize("value", HOSTILE, ids=lambda v: repr(v)[:12])
def test_hostile_values_anywhere(document: type[Document], value: Any) -> None:
    """Any value in any place is either valid, then it round-trips, or refused in one line that names the place."""
    body = BODIES[document]()
    for path in leaves(body):
        content = text(document, changed(body, path, value))
        try:
            parsed = document.parse(content, "file.json")
        except DocumentError as error:
            message = str(error)
            assert message.startswith("file.json: ")
            assert message.isprintable()
            assert len(message) < 1000
        else:
            assert document.parse(parsed.to_json(), "again") == parsed


@documents
def test_numbers_are_not_guessed_from_text(document: type[Document]) -> None:
    body = BODIES[document]()
    for path in leaves(body):
        place: Any = body
        for step in path:
            place = place[step]
        if isinstance(place, int | float) and not isinstance(place, bool) and "shape" not in path:
            assert "file.json: " in refused(document, text(document, changed(body, path, str(place))))


@documents
def test_missing_and_unknown_fields_are_named(document: type[Document]) -> None:
    body = BODIES[document]()
    required = document.json_schema()["required"][2:]
    for name in required:
        assert f"{name}: Field required" in refused(
            document, text(document, {k: v for k, v in body.items() if k != name})
        )
    assert "surprise: Extra inputs" in refused(document, text(document, body | {"surprise": 1}))
    refused(document, text(document, body | {"new\nline" * 1000: 1}))


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize("levels", [50, 190, 500, 900])
def test_deep_values(levels: int) -> None:
    refused(Workload, text(Workload, BODIES[Workload]() | {"tokens": deep(levels)}))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_damaged_files(data: st.DataObject) -> None:
    """A document with some bytes cut out or replaced is refused or still a document."""
    content = text(Plan, plan_body())
    at, length = data.draw(st.integers(0, len(content))), data.draw(st.integers(0, 40))
    damaged = content[:at] + data.draw(st.text(max_size=5)) + content[at + length :]
    assert complaint(lambda: Plan.parse(damaged, "file.json")).isprintable()


# Rules of single documents


def without(path: tuple[Any, ...], value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda body: changed(body, path, value)


@pytest.mark.parametrize(
    ("document", "path", "value", "rule"),
    [
        (Model, ("blocks",), [], "blocks"),
        (Model, ("blocks", 0, "count"), 10**9, "blocks[0].count"),
        (Model, ("blocks", 0, "moe", "top_k"), 33, "top_k (33) exceeds num_experts (32)"),
        (Model, ("blocks", 0, "moe", "gate", "groups"), 5, "multiple of gate.groups (5)"),
        (Model, ("blocks", 0, "moe", "gate", "top_groups"), 2, "top_groups (2) exceeds"),
        (Model, ("blocks", 0, "attention", "kv_heads"), 7, "must be a multiple of kv_heads (7)"),
        (Model, ("blocks", 0, "attention", "kind"), "mla", "mla needs kv_lora_rank"),
        (Workload, ("tokens",), 513, "multiple of sequences"),
        (Workload, ("context",), 5, "empty context"),
        (Workload, ("phase",), "decode", "one token per sequence"),
        (Workload, ("tokens",), 2**40, "tokens"),
        (Cluster, ("devices", 1, "host"), "b", "devices[1].host 'b' is not among"),
        (Cluster, ("hosts",), [{"name": "a"}, {"name": "a"}], "host names repeat"),
        (Cluster, ("links",), [], "every ordered pair of 2 devices"),
        (Cluster, ("links", 1, "source"), 0, "every ordered pair of 2 devices"),
        (Cluster, ("links", 0, "curve"), curve("tokens"), "link needs axes"),
        (Cluster, ("collectives", 0, "busy"), curve("tokens"), "all_gather needs axes"),
        (Cluster, ("collectives", 0, "group"), [0, 2], "collectives[0].group"),
        (Cluster, ("collectives", 0, "group"), [0, 0], "collectives[0].group"),
        (Cluster, ("devices", 0, "operators", 0, "operator"), "teleport", "unknown operator 'teleport'"),
        (Cluster, ("devices", 0, "operators", 0, "curve"), curve("bytes"), "route needs axes"),
        (Cluster, ("devices", 0, "operators", 0, "curve", "median"), [1e-6], "2 grid points"),
        (Plan, ("degrees", "data"), 3, "tensor (1) * data (3) != devices (2)"),
        (Plan, ("tokens",), [3, 4], "tokens must give 6 tokens"),
        (Plan, ("tokens",), [4, 2], "group 0 owns 2 sequences but holds 4 tokens"),
        (Plan, ("tokens",), [-2, 8], "tokens must give 6 tokens"),
        (Plan, ("sequences",), [6], "sequences must give 6 to 2 groups"),
        (Plan, ("layers",), [], "0 layers for 8"),
        (Plan, ("layers", 0, "slots"), [list(range(16))], "layers[0].slots: 1 lists for 2 devices"),
        (Plan, ("layers", 0, "slots"), [[0], [1]], "layers[0].slots must hold every expert 0..15"),
        (Plan, ("layers", 0, "slots"), [list(range(17)), []], "layers[0].slots must hold every expert 0..15"),
        (Plan, ("layers", 0, "slots"), [[0, 0], [1]], "holds an expert twice"),
        (Plan, ("layers", 0, "slots"), [[-1], [1]], "negative expert"),
        (Plan, ("layers", 0, "split"), [64, 64], "split belongs to strategy sharded"),
        (Plan, ("layers", 7, "split"), None, "split belongs to strategy sharded"),
        (Plan, ("layers", 7, "split"), [64, 65], "layers[7].split must divide 128 columns"),
        (Plan, ("layers", 7, "split"), [-2, 130], "negative number of columns"),
        (Plan, ("layers", 0, "shares"), [[1.0], [1.0]], "form of slots"),
        (Plan, ("layers", 0, "shares"), [[0.5] * 8, [1.0] * 8], "shares of expert 0 sum to 0.5"),
        (Plan, ("layers", 0, "shares"), [[-1.0] * 8, [1.0] * 8], "share of expert 0 is negative"),
        (Plan, ("stored_layers",), 9, "stored_layers (9) exceeds"),
        (Plan, ("predicted", "memory"), [], "predicted.memory: 0 entries for 2 devices"),
        (Plan, ("predicted", "step_seconds"), 0, "predicted.step_seconds"),
        (Plan, ("model", "vocab_size"), -1, "model.vocab_size"),
    ],
)  # fmt: skip
def test_rules(document: type[Document], path: tuple[Any, ...], value: Any, rule: str) -> None:
    assert rule in refused(document, text(document, changed(BODIES[document](), path, value)))


def test_tensor_parallelism_must_divide_the_heads() -> None:
    body = plan_body()
    devices = body["devices"][:1] * 4
    body |= {"devices": devices, "degrees": {"tensor": 4}, "sequences": [6], "tokens": [6, 0, 0, 0]}
    assert "tensor (4) must divide heads (4) and kv_heads (2)" in refused(Plan, text(Plan, body))


def test_split_is_held_against_its_own_layer() -> None:
    """In a staged model the FFN of one layer is not that of the first."""
    swin = load_model("swin-moe-small")
    body = plan_body() | {"model": swin.model_dump(mode="json"), "stored_layers": 1}
    wide = [swin.moe_block(i).moe for i in range(len(swin.moe_layers))]
    body["layers"] = [{"strategy": "sharded", "slots": [[], []], "split": [0, moe.ffn_size]} for moe in wide if moe]
    assert len(Plan.parse(text(Plan, body), "p").layers) == 10


def test_missing_curves_say_what_to_measure() -> None:
    cluster = Cluster.model_validate(cluster_body())
    shape: dict[str, int | str] = {"hidden": 8, "experts": 4, "top_k": 2}
    assert cluster.operator(1, "route", shape, "f32", "tiny-moe").at(tokens=1).seconds == pytest.approx(1e-6)
    with pytest.raises(MissingCurveError, match=r"route .*hidden 9.* device 1: .*moeplan profile --model tiny-moe"):
        cluster.operator(1, "route", shape | {"hidden": 9}, "f32", "tiny-moe")
    assert cluster.collective("all_gather", (0, 1)).group == (0, 1)
    with pytest.raises(MissingCurveError, match="no all_to_all curve"):
        cluster.collective("all_to_all", (0, 1))


# Files


@documents
def test_unreadable_files(document: type[Document], tmp_path: Path) -> None:
    (tmp_path / "latin").write_bytes(b'{"kind": "\xff"}')
    for path in (tmp_path / "none", tmp_path, tmp_path / "latin", Path("a\0b"), tmp_path / ("x" * 300)):
        with pytest.raises(DocumentError) as caught:
            document.read(path)
        assert "\n" not in str(caught.value)


def test_missing_files_say_which_command_makes_them(tmp_path: Path) -> None:
    for document, command in ((Cluster, "moeplan profile"), (Plan, "moeplan solve"), (Trace, "moeplan trace capture")):
        with pytest.raises(DocumentError, match=f"no such file.*{command}"):
            document.read(tmp_path / "none")


def test_endless_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="a device, not a regular file"):
        Workload.read("/dev/zero")
    with open(tmp_path / "sparse.json", "wb") as file:
        file.truncate(2**40)
    with pytest.raises(DocumentError, match="larger than 64 MiB"):
        Workload.read(tmp_path / "sparse.json")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = Workload.from_text("decode:4").write(tmp_path / "w.json")
    before = path.read_bytes()

    def fail(file: io.BufferedIOBase) -> None:
        file.write(b"half")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_atomically(path, fail)  # type: ignore[arg-type]
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["w.json"]


def test_a_write_that_cannot_be_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "w.json", tmp_path):
        with pytest.raises(DocumentError, match="cannot be written"):
            Workload.from_text("decode:4").write(path)


def test_readers_never_see_half_a_document(tmp_path: Path) -> None:
    path = tmp_path / "m.json"
    models = [load_model("deepseek-v3"), load_model("longcat-flash")]
    models[0].write(path)
    writer = threading.Thread(target=lambda: [models[i % 2].write(path) for i in range(20)])
    writer.start()
    while writer.is_alive():
        assert Model.read(path) in models
    writer.join()


# Traces


def arrays(tokens: int = 6, layers: int = 3, experts: int = 5, top_k: int = 2, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    ids = rng.random((tokens, layers, experts)).argsort(2)[:, :, :top_k]
    weights = rng.random(ids.shape).astype(np.float16).astype(np.float32)
    return {"expert_ids": ids, "expert_weights": weights, "seq_len": np.array([tokens]), "num_experts": experts}


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


# Published schemas


def test_published_schemas_are_current(tmp_path: Path) -> None:
    """Renew them with `python -c "from moeplan.spec.schemas import write_schemas; write_schemas('docs/schemas')"`."""
    write_schemas(tmp_path)
    published = {path.name: path.read_text() for path in (ROOT / "docs" / "schemas").iterdir()}
    assert published == {path.name: path.read_text() for path in tmp_path.iterdir()}


@documents
def test_schema_names_every_written_field(document: type[Document]) -> None:
    schema = schemas()[f"{document.__name__.lower()}.schema.json"]
    written = json.loads(document.model_validate(BODIES[document]()).to_json())
    assert set(schema["properties"]) == set(written)
    assert schema["properties"]["kind"] == {"const": document.kind}
    assert schema["properties"]["version"] == {"const": 1}
    assert {"kind", "version"} <= set(schema["required"]) <= set(written)
    assert schema["additionalProperties"] is False


def test_trace_schema_names_every_written_array(tmp_path: Path) -> None:
    described = schemas()["trace.json"]["arrays"]
    fields = arrays()
    full = Trace.of(fields["expert_ids"], 5, model="m").write(tmp_path / "a.npz")
    counts = Trace.of_counts(np.ones((2, 3))).write(tmp_path / "b.npz")
    with np.load(full, allow_pickle=False) as a, np.load(counts, allow_pickle=False) as b:
        assert set(a.files) | set(b.files) == set(described)
        for name in a.files:
            assert a[name].ndim == len(described[name]["shape"])
