"""The tiny model learns, is a Mixtral to Transformers, and its shipped trace shows what planning lives on."""

import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from moeplan.profiler.traces import capture, trace_stats
from moeplan.spec import Trace
from moeplan.spec.catalogue import load_model
from moeplan.spec.routing import check_shape

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny_moe"
STEPS, SEED = 12, 1


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        yield importlib.import_module("train")
        for name in ("train", "tiny_moe"):
            del sys.modules[name]


@pytest.fixture(scope="module")
def net(train: ModuleType) -> torch.nn.Module:
    net = train.TinyMoe(load_model("tiny-moe"), SEED)
    assert train.train(net, train.standard_library()[0], steps=STEPS, seconds=60, seed=SEED) == STEPS
    return net.eval()


def test_command_trains_saves_and_records(
    train: ModuleType,
    net: torch.nn.Module,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        sys, "argv", ["train.py", "--steps", str(STEPS), "--seed", str(SEED), "--output", str(tmp_path)]
    )
    train.main()
    printed = capsys.readouterr().out
    before, after = re.search(r"([\d.]+) bits per byte before, ([\d.]+) after", printed).groups()  # type: ignore[union-attr]
    assert float(before) > 7  # uniform over 256 bytes is 8
    assert float(after) < float(before) - 2
    assert {path.name for path in tmp_path.iterdir()} == {
        "config.json",
        "model.safetensors",
        "trace.npz",
        "stats.png",
        "held_out.txt",
    }
    trace = Trace.read(tmp_path / "trace.npz")
    check_shape(trace, load_model("tiny-moe"))
    assert f"{STEPS} steps, seed {SEED}" in trace.source

    # The same seed and steps trained the same model a second time, so it routes a text the same way.
    held_out = train.standard_library()[1]
    sample = train.windows(held_out, train.TRACE_SEQUENCES, train.LENGTH, torch.Generator().manual_seed(SEED))
    assert train.record_trace(net, sample, "").digest() == trace.digest()


def test_saved_model_is_a_mixtral_to_transformers(train: ModuleType, net: torch.nn.Module, tmp_path: Path) -> None:
    import transformers

    train.save(net, tmp_path, max_length=train.LENGTH)
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded).__name__ == "MixtralForCausalLM"
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    text = train.standard_library()[1]
    sample = train.windows(text, 8, train.LENGTH, torch.Generator().manual_seed(0))
    with torch.inference_mode():
        mine, theirs = net(sample)[0], loaded.eval()(sample).logits
    assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()

    own = train.record_trace(net, sample, "")
    (tmp_path / "sample.txt").write_bytes(bytes(sample.flatten().tolist()))
    captured = capture(tmp_path, tmp_path / "sample.txt", tokens=sample.numel(), sequence_length=train.LENGTH)
    assert (own.expert_ids == captured.expert_ids).mean() > 0.999  # a near tie may fall either way
    np.testing.assert_allclose(own.expert_weights, captured.expert_weights, atol=1e-3)


def test_shipped_trace_has_affinity_and_no_idle_expert() -> None:
    path = EXAMPLE / "trace.npz"
    assert path.stat().st_size < 2**20
    trace = Trace.read(path)
    check_shape(trace, load_model("tiny-moe"))
    assert trace.tokens >= 4096
    stats = trace_stats(trace)
    assert stats.affinity is not None
    assert stats.affinity.ratio >= 5
    assert (stats.affinity.information >= 5 * stats.affinity.control.mean(0)).all()
    assert stats.affinity.corrected.mean() >= 5 * np.abs(stats.affinity.corrected_control).mean()
    assert not stats.idle_experts.any()
    assert stats.expert_imbalance.max() < 4
