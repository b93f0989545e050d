"""Tuned configurations that come with the package: read, used, checked and put in their place."""

import json
import subprocess
import sys
from dataclasses import asdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan.runtime.kernels.gpu import shipped
from moeplan.runtime.kernels.gpu.config import HEIGHTS, candidates, key, parse_key
from moeplan.runtime.kernels.gpu.tuning import Tuner
from moeplan.spec import MoeplanError

KEY = key("esmm", "torch.bfloat16", "", (8, 4096, 14336), 16, 16)
FIRST, SECOND = candidates("esmm", 16, parse_key(KEY)[2], 90)[:2]


def document(**changed) -> dict:
    body = {"kind": "tuned-kernels", "version": 1, "arch": 90, "device": "NVIDIA H200", "triton": "3.6.0"}
    return body | {"date": "2026-11-30", "configs": {KEY: asdict(SECOND)}} | changed


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "tuned")
    shipped.shipped.cache_clear()
    yield tmp_path
    shipped.shipped.cache_clear()


def brought(folder, **changed):
    path = folder / "sm_90.json"
    path.write_text(json.dumps(document(**changed)))
    return path


def never(launch, config):
    raise AssertionError("nothing is measured")


def test_what_was_brought_home_is_used_and_not_measured_again(folder):
    assert shipped.shipped(90) == {}
    target = shipped.install(brought(folder))
    assert target == folder / "tuned" / "sm_90.json"
    known = shipped.shipped(90)
    assert known == {KEY: SECOND}
    assert shipped.shipped(80) == {}
    assert Tuner(folder / "device.json", never, known).pick(KEY, [FIRST, SECOND], print) == SECOND
    # Without measuring it counts as well; what this device's own tuning found goes before it; other launches are tuned.
    assert Tuner(folder / "device.json", None, known).pick(KEY, [FIRST, SECOND], print) == SECOND
    (folder / "own.json").write_text(json.dumps({KEY: asdict(FIRST)}))
    assert Tuner(folder / "own.json", never, known).pick(KEY, [FIRST, SECOND], print) == FIRST
    timed = Tuner(folder / "device.json", lambda launch, config: float(config == FIRST), known)
    assert timed.pick("another", [FIRST, SECOND], print) == SECOND


def test_a_second_file_adds_to_the_first(folder):
    other = key("esfk", "torch.float32", "tf32x3", (8, 64, 64), 1000, 128)
    tile = asdict(candidates("esfk", 128, parse_key(other)[2], 90)[0])
    shipped.install(brought(folder))
    shipped.install(brought(folder, configs={other: tile}))
    assert set(shipped.shipped(90)) == {KEY, other}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"configs": {}}, "configs: holds none"),
        ({"configs": {"esmm": asdict(FIRST)}}, "configs: expected keys such as 'esmm torch.bfloat16"),
        ({"configs": {KEY: asdict(FIRST) | {"columns": 48}}}, "none of the configurations that are tried"),
        ({"configs": {KEY: asdict(FIRST) | {"warps": 0}}}, "warps: Input should be greater than or equal to 1"),
        ({"configs": {KEY: {"rows": 16}}}, "Field required"),
        ({"arch": 12}, "arch: Input should be greater than or equal to 80"),
        ({"kind": "plan"}, "kind: expected 'tuned-kernels'"),
        ({"device": "interpreter"}, "times of a dry run are not those of a GPU"),
        ({"extra": 1}, "extra: Extra inputs are not permitted"),
    ],
)
def test_what_is_no_such_file(folder, changed, message):
    path = brought(folder, **changed)
    with pytest.raises(MoeplanError) as error:
        shipped.install(path)
    assert message in str(error.value)
    assert str(path) in str(error.value)
    assert not (folder / "tuned").exists()


@pytest.mark.parametrize("content", [None, b"", b"\xff", b"[]", b"{"])
def test_as_a_command_it_is_one_line(tmp_path, content):
    path = tmp_path / "x.json"
    if content is not None:
        path.write_bytes(content)
    command = [sys.executable, "-m", "moeplan.runtime.kernels.gpu.shipped", str(path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1
    assert str(path) in done.stderr


@given(
    kind=st.sampled_from(["esmm", "project", "esfk"]),
    dtype=st.sampled_from(["torch.bfloat16", "torch.float16"]),
    shape=st.tuples(*[st.integers(1, 10**5)] * 3),
    choices=st.integers(1, 10**6),
    height=st.sampled_from(HEIGHTS),
)
def test_a_key_is_read_as_it_is_written(kind, dtype, shape, choices, height):
    found = parse_key(key(kind, dtype, "", shape, choices, height))
    assert found is not None
    assert (found[0], found[1], str(found[2])) == (kind, height, dtype)
    assert parse_key(key(kind, dtype, "", shape, choices, 17)) is None
