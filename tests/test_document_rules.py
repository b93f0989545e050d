"""Rules of single documents, and what happens to their files."""

import io
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moeplan.spec import Cluster, Model, Plan, Trace, Workload
from moeplan.spec.catalogue import load_model
from moeplan.spec.document import Document, write_atomically
from moeplan.spec.errors import DocumentError, MissingCurveError
from moeplan.tests.documents import BODIES, changed, cluster_body, curve, documents, plan_body, refused, text

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
        (Cluster, ("devices", 1, "kind"), "gpu", "devices[1].kind 'gpu' is not among kinds ['processor']"),
        (Cluster, ("link_classes", 0, "curve"), curve("tokens"), "link needs axes"),
        (Cluster, ("collectives", 0, "busy"), curve("tokens"), "all_gather needs axes"),
        (Cluster, ("kinds", 0, "operators", 0, "operator"), "teleport", "unknown operator 'teleport'"),
        (Cluster, ("kinds", 0, "operators", 0, "curve"), curve("bytes"), "route needs axes"),
        (Cluster, ("kinds", 0, "operators", 0, "curve", "median"), [1e-6], "2 grid points"),
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


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ([(("devices", 0, "memory_bytes"), "x")], "devices[0].memory_bytes: Input should be a valid integer (got 'x')"),
        ([(("devices", 0, "switch"), 1.5)], "devices[0].switch: Input should be a valid string (got 1.5)"),
        ([(("kinds", 0, "operators", 0, "shape", "hidden"), 1.5)], "hidden: Input should be a valid integer (got 1.5)"),
        ([(("devices", 0, "memory_bytes"), "x"), (("hosts", 0, "name"), 3)], "(got 'x') (and 1 more)"),
        ([(("hosts",), [])], "hosts: Tuple should have at least 1 item after validation, not 0 (got [])"),
    ],
)  # fmt: skip
def test_each_wrong_field_counts_once(changes: list[tuple[tuple[Any, ...], Any]], said: str) -> None:
    body = cluster_body()
    for path, value in changes:
        body = changed(body, path, value)
    assert refused(Cluster, text(Cluster, body)).endswith(said)


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
    assert cluster.collective("all_gather", (0, 1)).members == (2,)
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
