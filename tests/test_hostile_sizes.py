"""Limits on what files unfold to, one reader for YAML, and folders of compiled code that are only ours."""

import io
import json
import os
import resource
import stat
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

from moeplan import Cluster, MoeplanError, Trace
from moeplan.caches import ExposedError, check_private, private_folder
from moeplan.runtime.launch.lab import LabSpec
from moeplan.service import cli
from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import DocumentError
from moeplan.spec.model import MAX_LAYERS
from moeplan.spec.plan import LayerPlan
from moeplan.spec.texts import MAX_FIELDS, MAX_VALUES, parse_json, parse_yaml
from moeplan.tests.exports import linear_placement
from moeplan.tests.hostile_seeds import CONFIG
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.routings import random_trace
from moeplan.tests.synthetic import cluster, tiny_model

LAB = "name: two\nuplink_gbit: 1\nhosts:\n  - {name: a, ranks: RANKS, cpu_share: 0.5, threads: THREADS}\n"


def npz(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_npy", ".npy"), content)
    return path


def npy(shape: tuple[int, ...], content: bytes, descr: str = "|u1") -> bytes:
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": shape})
    return header.getvalue() + content


@pytest.mark.parametrize(("ranks", "threads", "field"), [("2000000000", "1", "ranks"), ("1", "1000000", "threads")])
def test_a_lab_of_too_many(ranks: str, threads: str, field: str, tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(LAB.replace("RANKS", ranks).replace("THREADS", threads))
    with pytest.raises(MoeplanError, match=rf"hosts\[0\].{field}: .*less than or equal to"):
        LabSpec.read(tmp_path / "lab.yaml")


@pytest.mark.parametrize("text", ["name: 2026-01-01", "", "name: " + "9" * 5000, "a: 1\na: 2", "[" * 5000, "a: *b",
                                  "a: !!int ''", "2026-99-99", "\x00", "- {: 1}"])  # fmt: skip
def test_hostile_yaml_is_one_line(text: str, tmp_path: Path) -> None:
    (tmp_path / "lab.yaml").write_text(text)
    with pytest.raises(MoeplanError) as refused:
        LabSpec.read(tmp_path / "lab.yaml")
    assert str(refused.value).startswith(str(tmp_path))
    assert str(refused.value).isprintable()


def test_yaml_gives_what_json_gives() -> None:
    assert parse_yaml("{1: [yes, ~, 0x1f, 1.5, '2', 2026-01-01]}", "y") == {1: [True, None, 31, 1.5, "2", "2026-01-01"]}


def test_a_field_twice_is_refused_where_it_differs() -> None:
    for parse in (parse_json, parse_yaml):
        assert parse('{"a": 1, "a": 1}', "f") == {"a": 1}
        with pytest.raises(DocumentError, match="f: 'a' is there twice, as 1 and as 2"):
            parse('{"a": 1, "a": 2}', "f")


def test_texts_are_limited_before_they_unfold() -> None:
    with pytest.raises(DocumentError, match="values, at most"):
        parse_json("[" + "[]," * MAX_VALUES + "[]]", "f")
    with pytest.raises(DocumentError, match="fields, at most"):
        parse_json("{" + ",".join(f'"{i}":0' for i in range(MAX_FIELDS + 1)) + "}", "f")


def test_a_million_faults_are_one(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"kinds\[0\]: Input should be an object"):
        Cluster.parse('{"kind": "moeplan.cluster", "version": 2, "kinds": [' + "[]," * 200_000 + "[]]}", "f")


@pytest.mark.parametrize(
    ("field", "value"),
    [("threads", 10**6), ("memory_bytes", 10**400), ("stream_bandwidth", 1e308), ("cpu_share", 1e-320)],
)
def test_devices_have_bounds(field: str, value: float) -> None:
    body = cluster(tiny_model()).model_dump(mode="json")
    part, i = ("devices", 1) if field == "memory_bytes" else ("kinds", 0)
    body[part][i][field] = value
    with pytest.raises(ValueError, match=rf"{part}.{i}.{field}"):
        Cluster.model_validate(body)


def test_traces_that_unfold_to_too_much(tmp_path: Path) -> None:
    path = tmp_path / "t.npz"
    large = npy((2**24, 8, 1), bytes(2**27))
    for members, said in (
        ({"expert_ids_npy": large}, "16,777,216 tokens x 8 layers x top-1 are 134,217,728 choices, at most"),
        ({"expert_ids_npy": npy((2**40, 8, 1), b"")}, "needs"),
        ({"expert_ids_npy": npy((2**62, 2**62), b"", "<i8")}, "needs"),
        (
            {"expert_ids_npy": npy((1, 100, 1), bytes(100)), "num_experts_npy": npy((), b"\xff\xff", "<u2")},
            "layers x",
        ),
        ({"expert_ids": b"text"}, "'expert_ids': expected an array, named 'expert_ids.npy'"),
        ({"expert_ids_npy": b"text"}, "'expert_ids': no array: its header is missing"),
    ):
        with pytest.raises(DocumentError) as refused:
            Trace.read(npz(path, **members))
        assert said in str(refused.value)
    path.unlink()
    path.symlink_to("/dev/zero")
    with pytest.raises(DocumentError, match="a device, not a regular file"):
        Trace.read(path)


@pytest.mark.parametrize("counts", [[[1e308, 1e308]], [[1e308, 1.0]], [[1e-300, 1e-300]]])
def test_counts_that_leave_what_a_float_holds(counts: list[list[float]]) -> None:
    with pytest.raises(DocumentError, match=r"a layer.s must sum to 0 or 1e-09\.\.9\.01e"):
        Trace.of_counts(np.array(counts))


def test_the_digest_in_pieces_is_that_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = Trace.of(np.arange(24).reshape(6, 2, 2) % 8, 8)
    whole = trace.digest()
    monkeypatch.setattr("moeplan.spec.trace._PIECE", 5)
    assert trace.digest() == whole


# Compiled code


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_folders_are_the_users_alone_whatever_the_umask(cache: Path) -> None:
    before = os.umask(0)
    try:
        folder = private_folder("kernels", "x")
    finally:
        os.umask(before)
    for place in (folder, folder.parent, folder.parent.parent, cache):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700


@pytest.mark.parametrize("place", ["", "moeplan", "moeplan/kernels", "moeplan/kernels/file"])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_what_others_can_write_is_not_loaded(place: str, mode: int, cache: Path) -> None:
    file = private_folder("kernels") / "file"
    file.touch(mode=0o600)
    check_private(file)
    (cache / place).chmod(mode)
    with pytest.raises(ExposedError, match="can be written by others"):
        check_private(file)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to give a file away")
@pytest.mark.parametrize("place", ["", "moeplan", "moeplan/kernels", "moeplan/kernels/file"])
def test_what_others_own_is_not_loaded(place: str, cache: Path) -> None:
    file = private_folder("kernels") / "file"
    file.touch(mode=0o600)
    os.chown(cache / place, 12345, 12345)
    with pytest.raises(ExposedError, match="belongs to user 12345"):
        check_private(file)


def test_no_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(_: type[Path]) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", classmethod(none))
    with pytest.raises(OSError, match="set HOME or XDG_CACHE_HOME"):
        private_folder("kernels")


# Too many layers, devices, tokens

MANY = MAX_LAYERS + 1


def many_layers(folder: Path) -> None:
    """A configuration, a model of as many blocks, a placement, a plan and traces of one layer too many."""
    (folder / "config").mkdir()
    (folder / "config" / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 100_000}))
    model = load_model("mixtral").model_dump(mode="json")
    block = model["blocks"][0] | {"count": 1}
    body = {"kind": "moeplan.model", "version": 1} | model | {"blocks": [block] * 5_000}
    (folder / "model.json").write_text(json.dumps(body))
    small = tiny_model(layers=1, experts=4)
    place = json.loads(linear_placement(small, 2).to_json())
    (folder / "place.json").write_text(json.dumps(place | {"layers": place["layers"] * MANY}))
    layer = LayerPlan(strategy="ep", slots=even_slots(4, 2))
    plan = json.loads(hand_made_plan(small, "decode:4@8", [layer], tokens=[2, 2]).to_json())
    (folder / "plan.json").write_text(json.dumps(plan | {"layers": plan["layers"] * MANY}))
    np.savez(folder / "trace.npz", expert_ids=np.zeros((4, MANY, 1), np.uint8), num_experts=np.int64(4))
    np.savez(folder / "counts.npz", expert_counts=np.ones((100_000, 4)))


LARGE = [
    ["models", "config"],
    ["models", "model.json"],
    ["solve", "-m", "config"],
    ["profile", "-m", "model.json"],
    ["place", "--trace", "trace.npz"],
    ["place", "--trace", "counts.npz"],
    ["trace", "stats", "counts.npz"],
    ["trace", "import", "counts.npz", "-o", "new.npz"],
    ["explain", "place.json"],
    ["compare", "place.json", "place.json"],
    ["export", "place.json", "--to", "vllm", "-m", "mixtral"],
    ["run", "plan.json"],
    ["place", "--trace", "small.npz", "--devices", "1000000000"],
    ["place", "--trace", "small.npz", "--hosts", "1000000000"],
    ["trace", "stats", "small.npz", "--devices", "1000000000"],
    ["place", "--trace", "wide.npz", "--devices", "1024"],
    ["place", "--trace", "small.npz", "--slots", "1048576"],
    ["place", "--trace", "small.npz", "--seed", "-5"],
    ["explain", "place.json", "--seed", "-5"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--seed", "-5"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--seed", "9" * 30],
    ["export", "--check", "place.json", "--to", "vllm", "-m", "mixtral", "--devices", "1000000000"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--workload", "prefill:9999872"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--workload", "decode:9999999"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--workload", "prefill:100000000000"],
    ["solve", "-m", "mixtral", "--cluster", "cluster.json", "--workload", f"decode:{'9' * 5000}"],
]


@pytest.mark.parametrize("argv", LARGE, ids=" ".join)
def test_sizes_beyond_any_model_are_refused_at_once(
    argv: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["moeplan", *argv])
    many_layers(tmp_path)
    random_trace(0, 2, 4).write("small.npz")
    np.savez(tmp_path / "wide.npz", expert_counts=np.ones((3, 65536)))
    cluster(tiny_model()).write("cluster.json")
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    err = capfd.readouterr().err
    assert stopped.value.code == 2
    assert "Traceback" not in err
    if not err.lstrip().startswith("Usage:"):
        assert err.startswith("error: ")
        assert err.count("\n") == 1
    assert time.process_time() - began < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20


def test_as_many_layers_as_may_be_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": MAX_LAYERS}))
    assert len(load_model(str(tmp_path / "config.json")).layers) == MAX_LAYERS
    trace = Trace.of(np.zeros((2, MAX_LAYERS, 1), np.uint8), 4)
    assert Trace.read(trace.write(tmp_path / "t.npz")).layers == MAX_LAYERS
