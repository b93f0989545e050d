"""``moeplan run --weights`` with quantised checkpoints: the report, and refusals before any rank starts."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from moeplan import Report
from moeplan.runtime.launch import LocalLauncher
from moeplan.service import cli
from moeplan.spec.catalogue import load_model
from moeplan.spec.plan import LayerPlan
from moeplan.tests.plans import even_slots, hand_made_plan
from moeplan.tests.quantised import BLOCK_FP8, block_fp8, quantise_folder

SCALE = "model.layers.1.mlp.experts.3.down_proj.weight_scale_inv"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The issue's case: a tiny Qwen3-MoE in block-fp8 form, and a plan for it."""
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=61, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        num_experts_per_tok=2, moe_intermediate_size=128, num_experts=4, intermediate_size=96,
        pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    quantise_folder(tmp_path, block_fp8, BLOCK_FP8)
    seats = LocalLauncher(2, threads=1).seats
    plan = hand_made_plan(
        load_model(str(tmp_path)),
        "prefill:8",
        [LayerPlan(strategy="ep", slots=even_slots(4, 2))],
        tokens=(8, 0),
        hosts=[seat.host for seat in seats],
        cpu_share=seats[0].cpu_share,
    )
    plan.write(tmp_path / "plan.json")
    return tmp_path


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> tuple[int, str, str]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(sys, "argv", ["moeplan", "run", "plan.json", "--weights", ".", "--tolerance", "1e9"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capfd.readouterr()
    assert isinstance(stopped.value.code, int)
    return stopped.value.code, captured.out, captured.err


def test_the_report_says_how_weights_were_checked(folder, monkeypatch, capfd):
    code, out, error = run(folder, monkeypatch, capfd)
    weights = Report.read(folder / "report.json").weights
    assert code == 0, error
    assert weights is not None
    assert (weights.stored, weights.differing, weights.passed) == ("fp8 per block 128x128", 0, True)
    assert re.search(r"weights \(fp8 per block 128x128\) computed again \(\d+ values\).* ok ", out)
    if weights.reason:  # accelerate is not there
        assert "not compared" in out
        assert (
            "not compared with Transformers' own loading: accelerate is not installed (pip install 'moeplan[hf]')"
            in (" ".join(error.split()))
        )
    else:
        assert re.search(rf"logits against Transformers {transformers.__version__} \(2 layers, 32 tokens\).* ok ", out)


def change_config(folder: Path, **quantization) -> None:
    body = json.loads((folder / "config.json").read_text())
    body["quantization_config"] = quantization or None
    (folder / "config.json").write_text(json.dumps(body))


def drop_scale(folder: Path) -> None:
    file = folder / "model.safetensors"
    save_file({name: t for name, t in load_file(file).items() if name != SCALE}, file)


REFUSED = {
    "the weights are quantised with gptq, which moeplan does not dequantise": lambda f: change_config(
        f, quant_method="gptq", bits=4
    ),
    r"quantised with modelopt \(NVFP4\)": lambda f: change_config(f, quant_method="modelopt", quant_algo="NVFP4"),
    "stored as F8_E4M3, but no quantization_config of config.json says what that means": change_config,
    f"tensor {SCALE} is missing: without it": drop_scale,
    r"weight_scale_inv: expected shape \[2, 2\], got \[1, 1\]": lambda f: change_config(
        f, quant_method="fp8", weight_block_size=[64, 64]
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_one_line_and_start_no_ranks(message, folder, monkeypatch, capfd):
    REFUSED[message](folder)
    monkeypatch.setattr(LocalLauncher, "run", lambda *_, **__: pytest.fail("a rank was started"))
    code, out, error = run(folder, monkeypatch, capfd)
    assert code == 2
    assert re.search(message, " ".join(error.split())), error
    assert "Traceback" not in error + out
    assert not (folder / "report.json").exists()
