"""The Triton kernels without a GPU: the interpreter's tests in a process of their own, errors, tiles, and tuning."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from moeplan.runtime.kernels.gpu import TritonKernels
from moeplan.runtime.kernels.gpu.config import HEIGHTS, Config, candidates, height, with_split
from moeplan.runtime.kernels.gpu.index import most_tiles
from moeplan.runtime.kernels.gpu.tuning import Tuner, cache_path
from moeplan.spec import MoeplanError

HERE = Path(__file__).parent
FIRST, SECOND = Config(16, 64, 64, 4, 3), Config(16, 128, 64, 8, 3)


def run(*arguments: str, **environment: str) -> str:
    """Output of python; fails the test with it where python fails."""
    command = [sys.executable, *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, cwd=HERE.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_in_the_interpreter():
    run("-m", "pytest", "-x", "-p", "no:cacheprovider", str(HERE / "gpu_interpreted.py"), TRITON_INTERPRET="1")


def test_without_triton_everything_else_works():
    """Import, and one clear error for who asks."""
    program = """
import sys
sys.modules["triton"] = None
from moeplan.runtime.kernels.gpu import TritonKernels
try:
    TritonKernels()
except Exception as error:
    print(type(error).__name__, error)
"""
    assert run("-c", program).startswith("MoeplanError kernels: triton: expected the package triton")


def test_without_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        MoeplanError, match=r"^kernels: triton: expected a CUDA device, or TRITON_INTERPRET=1 .*neither$"
    ):
        TritonKernels()


def test_tensors_elsewhere(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    x, ids = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.long)
    with pytest.raises(MoeplanError, match=r"^esmm: device: expected tensors that Triton can reach, got cpu$"):
        TritonKernels().esmm(x, torch.zeros(2, 5, 4), None, ids)


def test_height_follows_the_mean_rows():
    assert [height(choices, 8) for choices in (1, 128, 129, 8 * 64, 10**6)] == [16, 16, 32, 64, 128]
    assert height(5, 1000) == height(0, 0) == 16


@pytest.mark.parametrize("experts", [0, 1, 2, 4])
def test_tiles_suffice_and_are_needed(experts):
    """The bound on a grid is the most tiles that any routing of the choices needs."""
    for choices in range(10):
        routings = itertools.product(range(choices + 1), repeat=experts)
        needed = max(sum(-(-n // 3) for n in counts) for counts in routings if sum(counts) <= choices)
        assert most_tiles(choices, experts, 3) == needed


@pytest.mark.parametrize("kind", ["esmm", "project", "esfk"])
@pytest.mark.parametrize("arch", [80, 90])
def test_candidates_are_tiles(kind, arch):
    """What Triton can compile: powers of two, of at least the 16 that its products take; none twice."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for h in HEIGHTS:
            able = candidates(kind, h, dtype, arch)
            assert len(set(able)) == len(able)
            for c in able:
                assert all(n >= 16 and n & (n - 1) == 0 for n in (c.rows, c.columns, c.depth))
                assert kind == "esfk" or c.rows == h


def test_split_fills_the_processors_and_no_more():
    config = Config(16, 64, 128, 4, 4)
    for tiles, width, depth, want in [(1, 64, 8192, 16), (1, 64, 1024, 2), (1, 64, 1000, 1), (8, 64 * 16, 8192, 1)]:
        split = with_split(config, tiles, width, depth, 132).split
        assert split == want
        assert split == 1 or split * tiles * (width // 64) <= 132


def test_tuning_measures_once_and_remembers(tmp_path):
    path, asked = tmp_path / "deep" / "device.json", []

    def measure(launch, config):
        launch(config)
        return 2.0 if config == FIRST else 1.0

    assert Tuner(path, measure).pick("key", [FIRST, SECOND], asked.append) == SECOND
    assert asked == [FIRST, SECOND]
    for again in (Tuner(path, measure), Tuner(path, None)):
        assert again.pick("key", [FIRST, SECOND], asked.append) == SECOND
    assert len(asked) == 2
    # What is remembered and no longer offered is measured again, and off means the default.
    assert Tuner(path, None).pick("key", [FIRST], asked.append) == FIRST
    assert Tuner(path, None).pick("other", [FIRST, SECOND], asked.append) == FIRST
    assert [file.name for file in path.parent.iterdir()] == ["device.json"]


def test_tuning_keeps_what_others_wrote(tmp_path):
    path = tmp_path / "device.json"
    one, two = Tuner(path, lambda *_: 1.0), Tuner(path, lambda *_: 1.0)
    one.pick("one", [FIRST, SECOND], print)
    two.pick("two", [FIRST, SECOND], print)
    assert set(json.loads(path.read_text())) == {"one", "two"}


def test_tuning_skips_what_does_not_fit(tmp_path, caplog):
    def measure(launch, config):
        if config == FIRST:
            raise RuntimeError("out of resource")
        return 1.0

    tuner = Tuner(tmp_path / "device.json", measure)
    assert tuner.pick("key", [FIRST, SECOND], print) == SECOND
    assert tuner.pick("other", [FIRST, FIRST], print) == FIRST
    assert "tuning: other: nothing could be timed, the default runs" in caplog.text
    assert "out of resource" in caplog.text
    assert set(json.loads((tmp_path / "device.json").read_text())) == {"key"}


@pytest.mark.parametrize("content", ["", "[]", "{", "7"])
def test_a_broken_cache_is_named(tmp_path, content):
    path = tmp_path / "device.json"
    path.write_text(content)
    with pytest.raises(MoeplanError, match=r"^tuning: .*device\.json: expected .*JSON.*delete the file$"):
        Tuner(path, None)


def test_a_file_for_each_device(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    paths = [cache_path(f"NVIDIA {name}/80GB", "3.7.1") for name in ("A100", "H100")]
    assert len(set(paths)) == 2
    assert all(path.parent == tmp_path / "moeplan" / "triton" for path in paths)
