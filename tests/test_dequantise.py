"""Quantised tensors become the numbers that they stand for, or are refused by name."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from moeplan.runtime.dequantise import open_reader
from moeplan.runtime.dequantise.mxfp4 import Mxfp4Experts, unpack
from moeplan.runtime.dequantise.scaled import dequantise
from moeplan.runtime.experts import FAMILIES, read_experts
from moeplan.runtime.tensors import TensorFolder
from moeplan.spec import MoeplanError
from moeplan.spec.errors import DocumentError
from moeplan.spec.model import Attention, Block, Moe
from moeplan.tests.quantised import BLOCK_FP8, block_fp8, compressed, exact, per, quantise, write_folder

F8, I8 = torch.float8_e4m3fn, torch.int8
NAME = "model.layers.0.mlp.experts.3.up_proj.weight"


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.02


def reader(folder, tensors, config):
    return open_reader(TensorFolder(write_folder(folder, tensors, config)))


def rounded(wanted: torch.Tensor) -> torch.Tensor:
    return wanted.to(torch.float32)


@pytest.mark.parametrize("shape", [(256, 384), (200, 129), (128, 128), (130, 4), (3, 300)])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float8_e8m0fnu])
def test_block_fp8_with_ragged_edges(shape, scale_dtype, tmp_path):
    parts = block_fp8(NAME, draw(*shape))
    scales = parts[f"{NAME}_scale_inv"]
    parts[f"{NAME}_scale_inv"] = (2.0 ** scales.log2().round() if scale_dtype.itemsize == 1 else scales).to(scale_dtype)
    wanted = rounded(exact(parts[NAME], parts[f"{NAME}_scale_inv"].float(), None, (128, 128)))
    source = reader(tmp_path, parts, BLOCK_FP8)
    got = source.read(NAME, shape)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)
    for rows, columns in (((1, shape[0]), (shape[1] - 1, shape[1])), ((shape[0] // 2, shape[0] // 2), (0, 3))):
        assert torch.equal(source.read(NAME, shape, (rows, columns)), wanted[slice(*rows), slice(*columns)])


@given(data=st.data())
@settings(max_examples=60)
def test_any_region_of_any_grid(data):
    sizes = st.integers(1, 20)
    rows, columns, height, width = (data.draw(sizes) for _ in range(4))
    zero_points = data.draw(st.booleans())
    values, scales, zeros = quantise(draw(rows, columns, seed=rows), (height, width), I8, zero_points)
    spans = [sorted(data.draw(st.tuples(st.integers(0, n), st.integers(0, n)))) for n in (rows, columns)]
    (top, end), (left, right) = spans
    grid = slice(top // height, -(-end // height)), slice(left // width, -(-right // width))
    got = dequantise(
        values[top:end, left:right],
        scales[grid],
        zeros[grid].float() if zeros is not None else None,
        (height, width),
        (top, left),
    )
    assert torch.equal(got, rounded(exact(values, scales, zeros, (height, width)))[top:end, left:right])


@pytest.mark.parametrize("strategy", ["tensor", "channel", "group", "block"])
@pytest.mark.parametrize(("dtype", "zero_points"), [(F8, False), (I8, False), (I8, True)])
def test_compressed_tensors(strategy, dtype, zero_points, tmp_path):
    rows, columns = 96, 160
    block = {"tensor": (rows, columns), "channel": (1, columns), "group": (1, 32), "block": (64, 128)}[strategy]
    values, scales, zeros = quantise(draw(rows, columns), block, dtype, zero_points)
    shape = (1,) if strategy == "tensor" else scales.shape
    parts = {NAME: values, f"{NAME}_scale": scales.bfloat16().reshape(shape)}
    parts |= {f"{NAME}_zero_point": zeros.reshape(shape)} if zero_points else {}
    extra = {"group": {"group_size": 32}, "block": {"block_structure": [64, 128]}}.get(strategy, {})
    kind = "float" if dtype == F8 else "int"
    source = reader(tmp_path, parts, compressed(strategy, kind, not zero_points, **extra))
    wanted = rounded(exact(values, scales.bfloat16().float(), zeros, block))
    assert torch.equal(source.read(NAME, (rows, columns)), wanted)
    assert torch.equal(source.read(NAME, (rows, columns), ((7, 70), (33, 131))), wanted[7:70, 33:131])


@pytest.mark.parametrize("scale", ["weight_scale", "weight_scale_inv"])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_per_tensor_fp8(scale, shape, tmp_path):
    values, factor, _ = quantise(draw(40, 30), (40, 30), F8)
    parts = {NAME: values, NAME.replace("weight", scale): factor.reshape(shape)}
    config = {"quant_method": "fp8", "activation_scheme": "static"} | (
        {"weight_block_size": None} if scale == "weight_scale_inv" else {}
    )
    assert torch.equal(
        reader(tmp_path, parts, config).read(NAME, (40, 30)), rounded(exact(values, factor, None, (40, 30)))
    )


def test_fused_fp8_experts_count_blocks_per_expert(tmp_path):
    name, weights = "model.layers.0.mlp.experts.gate_up_proj", draw(3, 200, 130)
    made = [quantise(w, (128, 128), F8) for w in weights]
    parts = {name: torch.stack([m[0] for m in made]), f"{name}_scale_inv": torch.stack([m[1] for m in made])}
    wanted = torch.stack([rounded(exact(*m, (128, 128))) for m in made])
    got = reader(tmp_path, parts, BLOCK_FP8).read(name, (3, 200, 130), ((1, 3), (100, 200), (5, 130)))
    assert torch.equal(got, wanted[1:3, 100:, 5:])


def test_scales_may_lie_in_another_shard(tmp_path):
    parts = block_fp8(NAME, draw(130, 140))
    write_folder(tmp_path, parts, BLOCK_FP8)
    (tmp_path / "model.safetensors").unlink()
    where = {}
    for i, (name, tensor) in enumerate(parts.items()):
        where[name] = f"model-0000{i}.safetensors"
        save_file({name: tensor}, tmp_path / where[name])
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    got = open_reader(TensorFolder(tmp_path)).read(NAME, (130, 140))
    assert torch.equal(got, rounded(exact(*parts.values(), None, (128, 128))))


def mxfp4_by_loops(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """[rows, 32 B] float64 from [rows, B, 16] and [rows, B], by the fields of e2m1."""

    def number(nibble: int) -> float:
        sign, exponent, mantissa = -1.0 if nibble & 8 else 1.0, (nibble >> 1) & 3, nibble & 1
        return sign * (mantissa * 0.5 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1))

    out = []
    for row, factors in zip(blocks.tolist(), scales.tolist(), strict=True):
        out.append(
            [
                number(n) * 2.0 ** (s - 127)
                for bl, s in zip(row, factors, strict=True)
                for b in bl
                for n in (b & 15, b >> 4)
            ]
        )
    return torch.tensor(out, dtype=torch.float64)


def gpt_oss_experts(experts: int, hidden: int, ffn: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    parts = {}
    for name, rows, columns in (("gate_up_proj", 2 * ffn, hidden), ("down_proj", hidden, ffn)):
        key = f"model.layers.0.mlp.experts.{name}"
        parts[f"{key}_blocks"] = torch.randint(256, (experts, rows, columns // 32, 16), dtype=torch.uint8, generator=g)
        parts[f"{key}_scales"] = torch.randint(110, 130, (experts, rows, columns // 32), dtype=torch.uint8, generator=g)
    return parts


def test_mxfp4_experts_of_gpt_oss(tmp_path):
    """Against the format's fields and Transformers' own unpacking: [E, in, out], gate and up in turn."""
    mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
    parts = gpt_oss_experts(2, 64, 96)
    write_folder(tmp_path, parts, {"quant_method": "mxfp4"})
    experts = Mxfp4Experts(TensorFolder(tmp_path), "model.layers.0.mlp.experts")
    experts.check(2, 64, 96)
    blocks, scales = (
        {p: parts[f"model.layers.0.mlp.experts.{p}_{k}"] for p in ("gate_up_proj", "down_proj")}
        for k in ("blocks", "scales")
    )
    theirs = {p: mxfp4.convert_moe_packed_tensors(blocks[p], scales[p], dtype=torch.float32) for p in blocks}
    for e in range(2):
        both, down = experts.read(e, (0, 96))
        loops = {p: rounded(mxfp4_by_loops(blocks[p][e], scales[p][e])) for p in blocks}
        assert torch.equal(both, torch.stack([loops["gate_up_proj"][0::2], loops["gate_up_proj"][1::2]]))
        assert torch.equal(down, loops["down_proj"])
        assert torch.equal(both[0], theirs["gate_up_proj"][e][:, 0::2].T)
        assert torch.equal(both[1], theirs["gate_up_proj"][e][:, 1::2].T)
        assert torch.equal(down, theirs["down_proj"][e].T)
        part, back = experts.read(e, (29, 70))
        assert torch.equal(part, both[:, 29:70])
        assert torch.equal(back, down[:, 29:70])
    one = torch.tensor([127], dtype=torch.uint8)
    assert unpack(torch.full((1, 16), 0x72, dtype=torch.uint8), one).tolist() == [1.0, 6.0] * 16


def expert_block(experts: int, hidden: int, ffn: int, zero: int = 0) -> Block:
    attention = Attention(heads=1, kv_heads=1, head_dim=8)
    return Block(
        hidden_size=hidden, attention=attention, moe=Moe(num_experts=experts, top_k=1, ffn_size=ffn, zero_experts=zero)
    )


def test_mxfp4_through_the_experts_reader_and_what_it_refuses(tmp_path):
    parts = gpt_oss_experts(2, 64, 96)

    def read(config, columns=(3, 50)):
        source = reader(tmp_path, parts, config)
        return list(
            read_experts(source, "model.layers.0.", FAMILIES["qwen3_moe"], expert_block(2, 64, 96), [1], columns)
        )

    gate, up, down = read({"quant_method": "mxfp4"})[0]
    want, back = Mxfp4Experts(TensorFolder(tmp_path), "model.layers.0.mlp.experts").read(1, (3, 50))
    assert torch.equal(gate, want[0])
    assert torch.equal(up, want[1])
    assert torch.equal(down, back)
    with pytest.raises(DocumentError, match=r"mxfp4 blocks, but config\.json does not name mxfp4"):
        read(BLOCK_FP8)
    scales = "model.layers.0.mlp.experts.down_proj_scales"
    whole = parts[scales]
    parts[scales] = whole[:, :, :2].clone()
    with pytest.raises(DocumentError, match=r"down_proj_scales: expected shape \[2, 64, 3\], got \[2, 64, 2\]"):
        read({"quant_method": "mxfp4"})
    parts[scales] = torch.full_like(whole, 255)
    with pytest.raises(DocumentError, match="holds 255, which is not a number"):
        read({"quant_method": "mxfp4"})


@pytest.mark.parametrize("original", [True, False])
def test_longcat_as_transformers_saves_it(original, tmp_path):
    """Rows of gate and up for identity experts, which have no down projection, are not taken for experts."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LongcatFlashConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_attention_heads=2, ffn_hidden_size=48, head_dim=8,
        expert_ffn_hidden_size=16, n_routed_experts=6, zero_expert_num=3, moe_topk=2, q_lora_rank=16, kv_lora_rank=8,
        qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, pad_token_id=None, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path, save_original_format=original)
    source, block = open_reader(TensorFolder(tmp_path)), expert_block(6, 32, 16, zero=3)
    held = model.model.layers[0].mlp.experts
    assert held.gate_up_proj.shape[0] == 9  # what makes the case: three more than there are down projections
    parts = list(read_experts(source, "model.layers.0.", FAMILIES["qwen3_moe"], block, [5, 0], (2, 16)))
    for e, (gate, up, down) in zip((5, 0), parts, strict=True):
        assert torch.equal(gate, held.gate_up_proj[e, 2:16])
        assert torch.equal(up, held.gate_up_proj[e, 18:32])
        assert torch.equal(down, held.down_proj[e, :, 2:16])
    with pytest.raises(MoeplanError, match="expert 6 has no weights: 6 to 8 are identity experts, 0 to 5 are real"):
        read_experts(source, "model.layers.0.", FAMILIES["qwen3_moe"], block, [6], (0, 16))
    if not original:  # without identity experts in the model, their rows do not fit
        with pytest.raises(DocumentError, match=r"gate_up_proj: expected shape \[6, 32, 32\], got \[9, 32, 32\]"):
            list(read_experts(source, "model.layers.0.", FAMILIES["qwen3_moe"], expert_block(6, 32, 16), [0], (0, 16)))


PACKED = compressed("group", "int", num_bits=4, group_size=128) | {"format": "pack-quantized"}
SCHEMES = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True},
    r"bitsandbytes \(4-bit\)": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    r"bitsandbytes \(8-bit\)": {"load_in_8bit": True},
    r"modelopt \(FP8\)": {"quant_method": "modelopt", "quant_algo": "FP8"},
    r"modelopt \(NVFP4\)": {"quant_algo": "NVFP4", "producer": {"name": "modelopt"}},
    "nvfp4": {"quant_method": "nvfp4"},
    "mxfp8": {"quant_method": "mxfp8"},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "hqq": {"quant_method": "hqq"},
    "quark": {"quant_method": "quark"},
    "torchao": {"quant_method": "torchao"},
    "auto-round": {"quant_method": "auto-round", "bits": 4},
    "something-new": {"quant_method": "something-new"},
    r"fp8 \(fmt e5m2\)": BLOCK_FP8 | {"fmt": "e5m2"},
    r"fp8 \(expert_dtype fp4\)": BLOCK_FP8 | {"expert_dtype": "fp4"},
    r"compressed-tensors \(pack-quantized\)": PACKED,
    r"compressed-tensors \(nvfp4-pack-quantized\)": compressed("tensor_group", "float", num_bits=4, group_size=16)
    | {"format": "nvfp4-pack-quantized"},
    r"compressed-tensors \(sparse-24-bitmask\)": compressed("channel", "float")
    | {"sparsity_config": {"format": "sparse-24-bitmask"}},
    r"compressed-tensors \(transform_config\)": compressed("channel", "int") | {"transform_config": {"R1": {}}},
}


@pytest.mark.parametrize("name", SCHEMES)
def test_other_schemes_are_refused_by_name(name, tmp_path):
    with pytest.raises(MoeplanError, match=f"quantised with {name}, which moeplan does not dequantise"):
        reader(tmp_path, {"x": torch.ones(1)}, SCHEMES[name])


def test_modelopt_is_known_by_its_own_file(tmp_path):
    write_folder(tmp_path, {"x": torch.ones(1)}, None)
    body = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4", "group_size": 16}}
    (tmp_path / "hf_quant_config.json").write_text(json.dumps(body))
    with pytest.raises(MoeplanError, match=r"quantised with modelopt \(NVFP4\)"):
        open_reader(TensorFolder(tmp_path))


GOOD = block_fp8(NAME, draw(130, 140))
SCALE = f"{NAME}_scale_inv"
WRONG = {
    "missing: without it": (lambda p: p.pop(SCALE), BLOCK_FP8),
    r"scale_inv: expected shape \[2, 2\], got \[2, 1\]": (
        lambda p: p.update({SCALE: p[SCALE][:, :1].clone()}),
        BLOCK_FP8,
    ),
    r"scale_inv: expected F64 or .*, got I32": (lambda p: p.update({SCALE: p[SCALE].int()}), BLOCK_FP8),
    "not finite": (lambda p: p[SCALE].fill_(float("nan")), BLOCK_FP8),
    "F8_E5M2": (lambda p: p.update({NAME: p[NAME].float().to(torch.float8_e5m2)}), BLOCK_FP8),
    "stored as F32, yet .*weight_scale_inv scales it": (lambda p: p.update({NAME: p[NAME].float()}), BLOCK_FP8),
    "stored as BF16, yet .*scale_inv scales it": (lambda p: p.update({NAME: p[NAME].bfloat16()}), None),
    "stored as F8_E4M3, but no quantization_config": (lambda p: None, None),
    "stored as I8, but no quantization_config": (lambda p: p.update({NAME: torch.ones(130, 140, dtype=I8)}), None),
    "stored as BOOL, but no": (lambda p: p.update({NAME: torch.ones(130, 140, dtype=torch.bool)}), None),
    "stored as F8_E4M3, which mxfp4 does not explain": (lambda p: None, {"quant_method": "mxfp4"}),
    "config.json lists it as not quantised": (
        lambda p: None,
        BLOCK_FP8 | {"modules_to_not_convert": ["lm_head", "model.layers.0.mlp"]},
    ),
    r"up_proj.weight is missing: .*qweight is there, packed by gptq or awq": (
        lambda p: p.update({NAME.replace("weight", "qweight"): p.pop(NAME).view(torch.uint8).int()}),
        None,
    ),
    "config.json does not list it as quantised": (
        lambda p: None,
        compressed("channel", "float") | {"ignore": ["re:.*experts.*"]},
    ),
    "expected I8, got F8_E4M3": (lambda p: None, compressed("channel", "int")),
    "weight_zero_point is missing": (
        lambda p: p.update(per("channel", I8)(NAME, draw(130, 140))),
        compressed("channel", "int", symmetric=False),
    ),
    "activation order": (
        lambda p: p.update(per("channel", I8)(NAME, draw(130, 140)) | {f"{NAME}_g_idx": torch.zeros(140)}),
        compressed("channel", "int"),
    ),
    "140 columns are no multiple of the group size 32": (
        lambda p: p.update(per("channel", I8)(NAME, draw(130, 140))),
        compressed("group", "int", group_size=32),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_read_exactly_is_named(message, tmp_path):
    change, config = WRONG[message]
    parts = {name: tensor.clone() for name, tensor in GOOD.items()}
    change(parts)
    with pytest.raises(DocumentError, match=message):
        reader(tmp_path, parts, config).read(NAME, (130, 140))


@pytest.mark.parametrize(
    "config",
    [
        {
            "quant_method": "compressed-tensors",
            "config_groups": {},
            "kv_cache_scheme": {"num_bits": 8},
            "format": "dense",
        },
        {
            "quant_method": "compressed-tensors",
            "format": "dense",
            "config_groups": {
                "group_0": {"targets": ["Linear"], "weights": None, "input_activations": {"num_bits": 8}}
            },
        },
        None,
    ],
)
def test_plain_weights_beside_quantised_activations_or_caches(config, tmp_path):
    """Activations and caches are quantised as a model runs; the stored weights are what they are."""
    weight = draw(4, 6).bfloat16()
    parts = {NAME: weight, "model.layers.0.self_attn.k_proj.k_scale": torch.ones(1)}
    parts[NAME.replace("weight", "input_scale")] = torch.ones(1)
    assert torch.equal(reader(tmp_path, parts, config).read(NAME, (4, 6)), weight)


def test_malformed_configurations_are_named(tmp_path):
    for config, message in (
        ([], r"config\.json: quantization_config: expected an object"),
        ({"quant_method": 8}, "quant_method: expected a text"),
        (BLOCK_FP8 | {"weight_block_size": [128]}, "weight_block_size: expected two whole numbers above 0"),
        (BLOCK_FP8 | {"modules_to_not_convert": ["(a+)+$"]}, "not a usable pattern of modules"),
        (compressed("block", "float"), "block_structure: expected two whole numbers"),
        (compressed("row", "float"), "strategy: expected tensor, channel, block or group"),
    ):
        write_folder(tmp_path, {"x": torch.ones(1)}, None)
        (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
        with pytest.raises(DocumentError, match=message):
            open_reader(TensorFolder(tmp_path))
