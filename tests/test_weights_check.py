"""Weights that a run reads, against Transformers' own loading and the files' bytes: faults of the loader show."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers

from moeplan.runtime import transformers_check
from moeplan.runtime.audit import decode
from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.dequantise import open_reader, scaled
from moeplan.runtime.tensors import TensorFolder
from moeplan.runtime.weights_check import check_weights, comparable_layers, recompute
from moeplan.spec import Model
from moeplan.spec.catalogue import load_model
from moeplan.tests.quantised import BLOCK_FP8, block_fp8, compressed, per, quantise_folder, write_folder

torch.set_num_threads(1)
F8, I8 = torch.float8_e4m3fn, torch.int8
NAME = "model.layers.0.self_attn.q_proj.weight"
SIZES = {
    "vocab_size": 61,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
}
SIZES |= {"num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
FAMILIES = {
    "qwen3_moe": lambda ffn: transformers.Qwen3MoeConfig(
        **SIZES, head_dim=32, intermediate_size=96, moe_intermediate_size=ffn, num_experts=4
    ),
    "qwen2_moe": lambda ffn: transformers.Qwen2MoeConfig(
        **SIZES, intermediate_size=96, moe_intermediate_size=ffn, shared_expert_intermediate_size=128, num_experts=4
    ),
    "mixtral": lambda ffn: transformers.MixtralConfig(**SIZES, intermediate_size=ffn, num_local_experts=4),
    "olmoe": lambda ffn: transformers.OlmoeConfig(**SIZES, intermediate_size=ffn, num_experts=4),
}
needs_accelerate = pytest.mark.skipif(
    importlib.util.find_spec("accelerate") is None, reason="Transformers needs accelerate to load fp8"
)


def saved(folder: Path, family: str = "qwen3_moe", ffn: int = 128, std: float = 0.02) -> tuple[Model, Path]:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(FAMILIES[family](ffn))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            torch.nn.init.normal_(parameter, float("norm" in name), 0.2 if "norm" in name else std)
    model.save_pretrained(folder)
    return load_model(str(folder)), folder


def test_the_issues_example_has_weights_of_their_true_size(tmp_path):
    """Gate weights of standard deviation 0.020 were read as 105: their scales were left out."""
    _, folder = saved(tmp_path)
    quantise_folder(folder, block_fp8, BLOCK_FP8)
    gate = Checkpoint(load_model(str(folder)), folder, torch.bfloat16).layer(0).gate_up[:, 0]
    assert gate.float().std().item() == pytest.approx(0.020, abs=5e-4)
    raw = TensorFolder(folder).read("model.layers.0.mlp.experts.0.gate_proj.weight").float()
    assert raw.std() > 100


@needs_accelerate
@pytest.mark.parametrize("family", FAMILIES)
def test_block_fp8_equals_transformers(family, tmp_path):
    _, folder = saved(tmp_path, family, std=0.1)
    quantise_folder(folder, block_fp8, BLOCK_FP8)
    found = check_weights(load_model(str(folder)), folder, 2, seed=1)
    assert found["reason"] == ""
    assert (found["passed"], found["layers"], found["differing"]) == (True, 2, 0)
    assert 0 < found["relative_error"] < 1e-5
    assert found["values"] > 100
    assert found["stored"] == "fp8 per block 128x128"


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_plain_weights_equal_transformers(family, tmp_path):
    model, folder = saved(tmp_path, family)
    found = check_weights(model, folder, 1, seed=1)
    assert (found["passed"], found["layers"], found["stored"]) == (True, 1, "f32")
    assert found["relative_error"] < 1e-5


@needs_accelerate
def test_a_loader_that_forgets_scales_fails_both_checks(tmp_path, monkeypatch):
    """The fault that a run and its reference share, and therefore never showed."""
    _, folder = saved(tmp_path)
    quantise_folder(folder, block_fp8, BLOCK_FP8)
    monkeypatch.setattr(scaled, "dequantise", lambda raw, *rest: raw.float())
    found = check_weights(load_model(str(folder)), folder, 2, seed=1)
    assert found["differing"] == found["values"] - 2 * 16  # all but the routers, which are stored plain
    assert found["relative_error"] > 0.1
    assert not found["passed"]


def test_a_loader_that_swaps_gate_and_up_differs_from_transformers(tmp_path, monkeypatch):
    """Values are right, their places are not: only the other loader sees it."""
    model, folder = saved(tmp_path, "mixtral", std=0.2)
    layer = Checkpoint.layer

    def swapped(self, index, **part):
        found = layer(self, index, **part)
        object.__setattr__(found, "gate_up", found.gate_up.flip(1))
        return found

    monkeypatch.setattr(Checkpoint, "layer", swapped)
    found = check_weights(model, folder, 2, seed=1)
    assert found["differing"] == 0
    assert found["relative_error"] > 1e-2
    assert not found["passed"]


@pytest.mark.parametrize(
    ("ffn", "parts", "config", "reason"),
    [
        (200, block_fp8, BLOCK_FP8, r"does not divide into blocks of 128 x 128, which Transformers .* wrongly"),
        (128, per("channel", I8, zero_points=True), compressed("channel", "int", False), "does not load it"),
    ],
)
def test_what_transformers_cannot_load_is_recomputed_and_said(ffn, parts, config, reason, tmp_path):
    _, folder = saved(tmp_path, ffn=ffn)
    quantise_folder(folder, parts, config)
    found = check_weights(load_model(str(folder)), folder, 2, seed=1)
    assert found["passed"]
    assert found["differing"] == 0
    assert found["values"] > 100
    assert (found["layers"], found["relative_error"]) == (0, None)
    if importlib.util.find_spec("accelerate") is None or importlib.util.find_spec("compressed_tensors") is None:
        reason += "|is not installed"
    assert_matches(reason, found["reason"])


def assert_matches(pattern: str, text: str) -> None:
    with pytest.raises(RuntimeError, match=pattern):
        raise RuntimeError(text)


def test_without_its_packages_transformers_is_not_compared(tmp_path, monkeypatch):
    _, folder = saved(tmp_path)
    quantise_folder(folder, block_fp8, BLOCK_FP8)
    monkeypatch.setitem(transformers_check.NEEDS, "fp8", ("no_such_package",))
    found = check_weights(load_model(str(folder)), folder, 1, seed=1)
    assert found["reason"] == "no-such-package is not installed (pip install 'moeplan[hf]')"
    assert found["passed"]


def test_layers_that_do_not_fit_are_not_compared(tmp_path):
    model, _ = saved(tmp_path)
    assert comparable_layers(model, 2, 2**40) == 2
    assert comparable_layers(model, 2, 10) == 0


@pytest.mark.parametrize("seed", [0, 1])
def test_plain_dtypes_are_recomputed(seed, tmp_path):
    model, folder = saved(tmp_path)
    quantise_folder(folder, lambda name, weight: {name: weight.to([torch.bfloat16, torch.float16][seed])}, None)
    values, differing = recompute(Checkpoint(model, folder, torch.float32), 2, seed)
    assert (values > 0, differing) == (True, 0)


def test_every_byte_of_the_eight_bit_floats():
    for dtype, name in ((F8, "F8_E4M3"), (torch.float8_e8m0fnu, "F8_E8M0")):
        for byte in range(256):
            wanted = torch.tensor([byte], dtype=torch.uint8).view(dtype).double()
            got = torch.tensor([decode(name, bytes([byte]))], dtype=torch.float64)
            assert torch.equal(got, wanted) or (got.isnan().all() and wanted.isnan().all()), (name, byte)


@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_compressed_fp8_equals_transformers(strategy, tmp_path):
    pytest.importorskip("compressed_tensors")
    _, folder = saved(tmp_path, "mixtral", std=0.1)
    quantise_folder(folder, per(strategy, F8, torch.bfloat16), compressed(strategy, "float"))
    found = check_weights(load_model(str(folder)), folder, 2, seed=1)
    assert found["reason"] == ""
    assert found["relative_error"] < 1e-5
    assert found["differing"] == 0


@pytest.mark.parametrize(("dtype", "kind"), [(F8, "float"), (I8, "int")])
@pytest.mark.parametrize("strategy", ["tensor", "channel"])
def test_compressed_tensors_own_library_agrees(dtype, kind, strategy, tmp_path):
    library = pytest.importorskip("compressed_tensors.compressors")
    from compressed_tensors.quantization import QuantizationScheme

    config = compressed(strategy, kind, symmetric=False)
    parts = per(strategy, dtype, zero_points=dtype == I8)(NAME, torch.randn(48, 64))
    parts.setdefault(f"{NAME}_zero_point", torch.zeros_like(parts[f"{NAME}_scale"]))
    compressor = library.BaseCompressor.get_value_from_registry(f"{kind}-quantized")
    scheme = QuantizationScheme.model_validate(config["config_groups"]["group_0"])
    wanted = compressor.decompress({name.rpartition(".")[2]: t for name, t in parts.items()}, scheme)["weight"]
    assert torch.equal(open_reader(TensorFolder(write_folder(tmp_path, parts, config))).read(NAME, (48, 64)), wanted)
