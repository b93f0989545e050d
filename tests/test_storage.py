"""Bytes of quantised weights: every documented scheme, by the tensors that it stores, and by part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import FP8Linear, replace_with_fp8_linear
from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

from moeplan.benchmarks.families import CORRECTION, SMALL, build
from moeplan.spec.catalogue import load_model
from moeplan.spec.catalogue.huggingface import read_config
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Model
from moeplan.spec.storage import PerBlock, Storage

Body = dict[str, Any]
BF16 = 2
# One expert has gate and up [F, D] and down [D, F].
D, F, E = 96, 160, 4
SIZES = D * F
MIXTRAL = {"model_type": "mixtral", "hidden_size": D, "intermediate_size": F, "num_hidden_layers": 2, "vocab_size": 64}
MIXTRAL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": E, "dtype": "bfloat16"}
FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}


def read(scheme: Body | None, beside: Body | None = None, **changes: Any) -> Model:
    body = MIXTRAL | changes | ({"quantization_config": scheme} if scheme else {})
    return read_config(body, "config.json", "m", "", beside)


def compressed(kind: str, layout: str, **weights: Any) -> Body:
    bits = {"float-quantized": 8, "int-quantized": 8}.get(layout, 4)
    group = {"weights": {"num_bits": bits, "type": kind, "symmetric": True} | weights, "targets": ["Linear"]}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


def modelopt(algorithm: str, **fields: Any) -> Body:
    return {"quant_method": "modelopt", "quant_algo": algorithm} | fields


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v3", 44_050_944),
        ("gpt-oss-20b", 13_236_480),
        ("gpt-oss-120b", 13_236_480),
        ("qwen3-30b-a3b-fp8", 4_719_744),
        ("qwen3-30b-a3b", 9_437_184),
    ],
)
def test_one_expert_of_published_models(name: str, expected: int) -> None:
    model = load_model(name)
    assert model.expert_bytes() == expected
    assert (
        model.computed_expert_bytes() == model.moe_block().moe.expert_parameters(model.moe_block().hidden_size) * BF16
    )


# What the repositories' indices say: ``metadata.total_size``.
@pytest.mark.parametrize(("name", "expected"), [("gpt-oss-20b", 13_761_264_768), ("gpt-oss-120b", 65_248_815_744)])
def test_all_weights_of_published_models(name: str, expected: int) -> None:
    assert load_model(name).weight_bytes() == expected


def groups(size: int) -> int:
    """Groups of ``size`` inputs in one expert."""
    return 2 * F * -(-D // size) + D * -(-F // size)


# Bytes of one expert beside 3 * SIZES weights.
SCHEMES: dict[str, tuple[Body, float]] = {
    "fp8 blocks": (FP8, 3 * SIZES + 4 * (2 * 2 * 1 + 1 * 2)),
    "fp8 blocks, exponents": (FP8 | {"scale_fmt": "ue8m0"}, 3 * SIZES + (2 * 2 * 1 + 1 * 2)),
    "fp8, experts in fp4": (FP8 | {"expert_dtype": "fp4", "scale_fmt": "ue8m0"}, 3 * SIZES / 2 + groups(32)),
    "fp8 blocks by default": ({"quant_method": "fp8"}, 3 * SIZES + 4 * 6),
    "fp8 per tensor, static inputs": (
        {"quant_method": "fp8", "weight_block_size": None, "activation_scheme": "static"},
        3 * SIZES + 3 * (4 + 4),
    ),
    "fbgemm": ({"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}, 3 * SIZES + 4 * (2 * F + D)),
    "ct fp8 per tensor": (compressed("float", "float-quantized", strategy="tensor"), 3 * SIZES + 3 * 4),
    "ct fp8 per channel": (compressed("float", "float-quantized", strategy="channel"), 3 * SIZES + 4 * (2 * F + D)),
    "ct fp8 blocks": (
        compressed("float", "float-quantized", strategy="block", block_structure=[64, 64]),
        3 * SIZES + 4 * (2 * (3 * 2) + 2 * 3),
    ),
    "ct int8 per channel": (compressed("int", "int-quantized", strategy="channel"), 3 * SIZES + 4 * (2 * F + D)),
    "ct int8 packed groups": (
        compressed("int", "pack-quantized", strategy="group", group_size=32, num_bits=8),
        3 * SIZES + 2 * groups(32),
    ),
    "ct int4 packed groups": (
        compressed("int", "pack-quantized", strategy="group", group_size=32),
        3 * SIZES / 2 + 2 * groups(32),
    ),
    "ct int4 packed, zero points": (
        compressed("int", "pack-quantized", strategy="group", group_size=32, symmetric=False),
        3 * SIZES / 2 + 2.5 * groups(32),
    ),
    "ct int4 packed, reordered": (
        compressed("int", "pack-quantized", strategy="group", group_size=32, actorder="group"),
        3 * SIZES / 2 + 2 * groups(32) + 4 * (2 * D + F),
    ),
    "ct nvfp4": (
        compressed("float", "nvfp4-pack-quantized", strategy="tensor_group", group_size=16),
        3 * SIZES / 2 + groups(16) + 3 * 4,
    ),
    "ct mxfp4": (
        compressed("float", "mxfp4-pack-quantized", strategy="group", group_size=32),
        3 * SIZES / 2 + groups(32),
    ),
    "gptq": (
        {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False},
        3 * SIZES / 2 + 2.5 * groups(32),
    ),
    "gptq, reordered": (
        {"quant_method": "gptq", "bits": 8, "group_size": 32, "desc_act": True},
        3 * SIZES + 3 * groups(32) + 4 * (2 * D + F),
    ),
    "gptq per channel": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, 3 * SIZES / 2 + 2.5 * (2 * F + D)),
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, 3 * SIZES / 2 + 2.5 * groups(32)),
    "mxfp4": ({"quant_method": "mxfp4"}, 3 * SIZES / 2 + groups(32)),
    "modelopt fp8": (modelopt("FP8"), 3 * SIZES + 3 * (4 + 4)),
    "modelopt nvfp4": (modelopt("NVFP4", group_size=16), 3 * SIZES / 2 + groups(16) + 3 * (4 + 4)),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, 3 * SIZES + 4 * (2 * F + D)),
    "bitsandbytes 4": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
        3 * (SIZES / 2 + 4 * SIZES / 64 + 64),
    ),
    "bitsandbytes 4, twice": (
        {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": True},
        3 * (SIZES / 2 + SIZES / 64 + 4 * 1 + 4 + 4 * 256 + 64),
    ),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_one_expert_of_each_scheme(name: str) -> None:
    scheme, expected = SCHEMES[name]
    assert read(scheme).expert_bytes() == expected


def test_modelopts_own_file_beside_the_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(MIXTRAL))
    plain = load_model(str(tmp_path))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head", "*self_attn*"]}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps({"producer": {}, "quantization": quantization}))
    model = load_model(str(tmp_path))
    assert plain.expert_bytes() == 3 * SIZES * BF16
    assert model.expert_bytes() == SCHEMES["modelopt nvfp4"][1]
    assert model.stored_in() == {"experts": "nvfp4"}
    (tmp_path / "hf_quant_config.json").write_text("[")
    with pytest.raises(MoeplanError, match=r"hf_quant_config\.json: not JSON"):
        load_model(str(tmp_path))


# By part

LAYER = "model.layers.{}.".format


@pytest.mark.parametrize(
    ("scheme", "stored"),
    [
        (FP8, {"experts": "fp8", "attention": "fp8"}),
        (FP8 | {"modules_to_not_convert": ["self_attn", "lm_head"]}, {"experts": "fp8", "attention": "fp8"}),
        (FP8 | {"modules_to_not_convert": ["model.layers.*.self_attn"]}, {"experts": "fp8"}),
        (FP8 | {"modules_to_not_convert": [f"{LAYER(i)}self_attn" for i in (0, 1)]}, {"experts": "fp8"}),
        (FP8 | {"ignored_layers": [f"{LAYER(i)}block_sparse_moe" for i in (0, 1)]}, {"attention": "fp8"}),
        ({"quant_method": "mxfp4"}, {"experts": "mxfp4"}),
        (SCHEMES["ct fp8 per tensor"][0] | {"ignore": ["re:.*self_attn.*"]}, {"experts": "fp8", "rest": "fp8"}),
        (SCHEMES["ct fp8 per tensor"][0] | {"ignore": ["re:.*experts.*", "lm_head"]}, {"attention": "fp8"}),
        (modelopt("FP8", ignore=["*block_sparse_moe*"]), {"attention": "fp8", "rest": "fp8"}),
        (SCHEMES["gptq"][0] | {"lm_head": True}, {"experts": "int4", "attention": "int4", "rest": "int4"}),
        (
            SCHEMES["gptq"][0]
            | {"modules_in_block_to_quantize": [["block_sparse_moe.experts.0.w1"], ["self_attn.q_proj"]]},
            None,
        ),
        (
            SCHEMES["gptq"][0] | {"modules_in_block_to_quantize": [["self_attn.q_proj", "self_attn.k_proj"]]},
            {"attention": "int4"},
        ),
    ],
)
def test_what_a_scheme_leaves_alone(scheme: Body, stored: dict[str, str] | None) -> None:
    if stored is None:
        with pytest.raises(MoeplanError, match="some experts are quantised and others not"):
            read(scheme)
        return
    assert read(scheme).stored_in() == stored


def test_parts_and_layers_are_counted_one_by_one() -> None:
    """Layer 1's attention, and layer 0's output projection, keep bfloat16."""
    plain, whole = read(None), read(FP8)
    some = read(FP8 | {"modules_to_not_convert": ["model.layers.1.self_attn", "model.layers.0.self_attn.o_proj"]})
    q, kv, scales = D * D, D * D // 2, 4
    # One scale for each matrix: all are smaller than a block.
    assert plain.rest_bytes() - whole.rest_bytes() == 2 * (2 * q + 2 * kv) * (BF16 - 1) - 2 * 4 * scales
    assert plain.rest_bytes() - some.rest_bytes() == (q + 2 * kv) * (BF16 - 1) - 3 * scales
    assert plain.weight_bytes() == plain.total_parameters() * BF16
    experts = 2 * E * (plain.expert_bytes() - whole.expert_bytes())
    assert plain.weight_bytes() - whole.weight_bytes() == experts + plain.rest_bytes() - whole.rest_bytes()


def test_long_lists_of_modules_are_read_at_once() -> None:
    """As Qwen3's: every norm and router of every layer; a pattern of layer 1 is not one of layer 10."""
    names = [
        f"model.layers.{i}.{n}" for i in range(64) for n in ("input_layernorm", "mlp.gate", "post_attention_layernorm")
    ]
    model = read(FP8 | {"modules_to_not_convert": [*names, "model.layers.1"]}, num_hidden_layers=64)
    plain = [i for i, block in enumerate(model.layers) if block.moe and not block.moe.storage]
    assert plain == [1]


@pytest.mark.parametrize(
    ("scheme", "parts"),
    [
        ({"quant_method": "aqlm"}, ["aqlm", "not known", "known: fp8"]),
        ({"quant_method": "hqq", "bits": 4}, ["hqq"]),
        ({"quant_method": "quark"}, ["quark"]),
        ({"quant_method": "torchao"}, ["torchao"]),
        (FP8 | {"expert_dtype": "fp6"}, ["expert_dtype fp6"]),
        (FP8 | {"expert_dtype": "fp4", "fmt": "e5m2"}, ["fmt e5m2"]),
        (modelopt("W4A16_AWQ"), ["modelopt", "W4A16_AWQ"]),
        (modelopt("MIXED_PRECISION", quantized_layers={}), ["MIXED_PRECISION"]),
        (compressed("int", "marlin-24", strategy="channel"), ["marlin-24"]),
        (SCHEMES["ct fp8 per tensor"][0] | {"sparsity_config": {"format": "sparse-24-bitmask"}}, ["sparse-24-bitmask"]),
        (SCHEMES["gptq"][0] | {"dynamic": {"+:.*": {"bits": 8}}}, ["gptq", "dynamic"]),
        ({"bits": 4}, ["quant_method"]),
        ([4], ["quantization_config", "object"]),
    ],
)
def test_what_cannot_be_counted_is_refused_by_name(scheme: Any, parts: list[str]) -> None:
    with pytest.raises(MoeplanError) as caught:
        read(scheme)
    message = str(caught.value)
    assert message.startswith("config.json: quantization_config")
    assert "\n" not in message
    assert all(part in message for part in parts)


def test_schemes_that_quantise_no_weights_change_nothing() -> None:
    group = {"input_activations": {"num_bits": 8, "type": "float"}, "weights": None, "targets": ["Linear"]}
    scheme = {"quant_method": "compressed-tensors", "format": "dense", "config_groups": {"group_0": group}}
    assert read(scheme) == read(None)


# The same counted in what Transformers allocates


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "qwen2_moe", "olmoe", "deepseek_v2", "deepseek_v3"])
def test_fp8_is_what_transformers_allocates(name: str) -> None:
    """Every part: experts and linear layers, each with its scales. Blocks divide gate and up, which are one there."""
    family, arguments = SMALL[name]
    size = "moe_intermediate_size" if "moe_intermediate_size" in arguments else "intermediate_size"
    arguments = arguments | {size: 64} | ({"shared_expert_intermediate_size": 96} if family == "qwen2_moe" else {})
    scheme = {"quant_method": "fp8", "weight_block_size": [32, 16]}
    config = transformers.AutoConfig.for_model(family, **arguments, quantization_config=scheme)
    model = build(config)
    replace_with_fp8_linear(model, ["lm_head", "shared_expert_gate"], transformers.FineGrainedFP8Config(**scheme))
    assert any(isinstance(module, FP8Linear) for module in model.modules())
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    held += sum(b.numel() * b.element_size() for n, b in model.named_buffers() if n.endswith(CORRECTION))
    ours = read_config(json.loads(config.to_json_string()) | {"dtype": "float32"}, name, name, "")
    assert ours.weight_bytes() == held  # what is not quantised was built in float32


def test_mxfp4_is_what_transformers_allocates() -> None:
    """Of gpt-oss: blocks as declared, a byte per 32 weights as in the checkpoint, and biases, there in float32."""
    family, arguments = SMALL["gpt_oss"]
    arguments = arguments | {"hidden_size": 64, "intermediate_size": 96}
    config = transformers.AutoConfig.for_model(family, **arguments)
    with torch.device("meta"):
        experts = Mxfp4GptOssExperts(config)
    packed = sum(p.numel() for p in experts.parameters() if p.dtype == torch.uint8)
    biases = sum(p.numel() for p in experts.parameters() if p.dtype == torch.float32)
    body = json.loads(config.to_json_string()) | {"dtype": "bfloat16", "quantization_config": {"quant_method": "mxfp4"}}
    model = read_config(body, "x", "x", "")
    assert model.expert_bytes() * config.num_local_experts == packed + packed * 2 // 32 + biases * BF16


SIDES = st.integers(1, 300)


@given(SIDES, SIDES, st.sampled_from([4, 8]), st.integers(1, 200) | st.none(), st.integers(1, 200) | st.none())
def test_blocks_are_counted_by_walking_over_them(
    rows: int, columns: int, bits: int, block_rows: int | None, block_columns: int | None
) -> None:
    per = PerBlock(what="scale", bits=32, rows=block_rows, columns=block_columns)
    starts = len(range(0, rows, block_rows or rows)) * len(range(0, columns, block_columns or columns))
    assert (
        Storage(name="x", bits=bits, beside=(per,)).bytes((rows, columns))
        == -(-rows * columns * bits // 8) + 4 * starts
    )
