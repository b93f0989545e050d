"""Models by name and by path: old and new spellings, odd fields, hostile files."""

import json
from pathlib import Path

import pytest

from moeplan.spec.catalogue import load_model
from moeplan.spec.errors import MoeplanError
from moeplan.spec.model import Model


def mixtral_body(**changes: object) -> dict[str, object]:
    """A small configuration; a change to ``...`` removes the field."""
    body: dict[str, object] = {
        "model_type": "mixtral",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "vocab_size": 100,
    }
    return {name: value for name, value in (body | changes).items() if value is not ...}


def write(folder: Path, body: object) -> str:
    path = folder / "config.json"
    path.write_text(body if isinstance(body, str) else json.dumps(body))
    return str(path)


def test_names_in_any_case() -> None:
    assert load_model(" DeepSeek-V3 ") == load_model("deepseek-v3")


def test_paths(tmp_path: Path) -> None:
    folder = tmp_path / "My-Model"
    folder.mkdir()
    path = write(folder, mixtral_body())
    model = load_model(str(folder))
    assert load_model(path) == model
    assert model.name == "My-Model"
    assert str(tmp_path) not in model.to_json()
    document = tmp_path / "m.json"
    model.write(document)
    assert load_model(str(document)) == model


def test_old_and_new_spellings_agree(tmp_path: Path) -> None:
    old = mixtral_body(rope_theta=5e5, torch_dtype="float16", head_dim=None)
    new = mixtral_body(
        rope_parameters={"rope_theta": 5e5, "rope_type": "default"},
        dtype="float16",
        num_local_experts=...,
        num_experts=4,
    )
    a, b = load_model(write(tmp_path, old)), load_model(write(tmp_path, new))
    assert a == b
    assert (a.rope_theta, a.dtype) == (5e5, "f16")
    assert a.layers[0].attention is not None
    assert a.layers[0].attention.head_dim == 16


def test_null_key_value_heads_mean_one_per_head(tmp_path: Path) -> None:
    attention = load_model(write(tmp_path, mixtral_body(num_key_value_heads=None))).layers[0].attention
    assert attention is not None
    assert attention.kv_heads == attention.heads == 4


def test_null_and_absent_differ_where_transformers_says_so(tmp_path: Path) -> None:
    """Absent means the default of the configuration class, null means none."""
    body = mixtral_body(model_type="gpt_oss")
    assert windows(load_model(write(tmp_path, body))) == [128, None]
    assert windows(load_model(write(tmp_path, body | {"sliding_window": None}))) == [None, None]


def windows(model: Model) -> list[int | None]:
    return [block.attention.sliding_window for block in model.layers if block.attention]


def test_gate_normalisation_is_off_unless_stated(tmp_path: Path) -> None:
    body = mixtral_body(model_type="olmoe", num_experts=4)
    off = load_model(write(tmp_path, body)).moe_block().moe
    on = load_model(write(tmp_path, body | {"norm_topk_prob": True})).moe_block().moe
    assert off is not None
    assert on is not None
    assert (off.gate.normalize, on.gate.normalize) == (False, True)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("mixtrall", ["mixtral", "config.json"]),
        ("deepseek-v33", ["nearest: deepseek-v3", "config.json"]),
        ("zzzzzz", ["moeplan models", "config.json"]),
        ("", ["unknown"]),
        ("a" * 5000, ["model"]),
        ("nowhere/config.json", ["nowhere/config.json", "no such file"]),
        ("a\0b.json", ["b.json"]),
    ],
)
def test_unknown_models(name: str, parts: list[str]) -> None:
    with pytest.raises(MoeplanError) as caught:
        load_model(name)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    for part in parts:
        assert part in message


def test_folder_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(MoeplanError, match=r"config\.json: no such file"):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model_type": "llama"}, ["model_type", "'llama'", "none of its layers has experts"]),
        ({"model_type": ...}, ["model_type", "expected one of"]),
        ({"model_type": ["mixtral"]}, ["model_type"]),
        ({"hidden_size": ...}, ["hidden_size: missing", "'mixtral'"]),
        ({"hidden_size": "64"}, ["hidden_size", "whole number", "'64'"]),
        ({"hidden_size": True}, ["hidden_size", "True"]),
        ({"hidden_size": 64.5}, ["hidden_size", "64.5"]),
        ({"hidden_size": 0}, ["hidden_size", "got 0"]),
        ({"num_hidden_layers": 10**9}, ["num_hidden_layers", "at most 512 layers"]),
        ({"vocab_size": 10**400}, ["vocab_size", "whole number"]),
        ({"num_local_experts": 10**8}, ["num_experts", "65536"]),
        ({"num_experts_per_tok": 5}, ["top_k (5) exceeds num_experts (4)"]),
        ({"num_attention_heads": 5}, ["heads (5) must be a multiple of kv_heads (2)"]),
        ({"num_attention_heads": 128}, ["head_dim"]),
        ({"rms_norm_eps": -1}, ["rms_norm_eps", "above 0"]),
        ({"rms_norm_eps": 10**400}, ["rms_norm_eps"]),
        ({"rope_theta": "x"}, ["rope_theta", "'x'"]),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, ["rope_scaling", "not supported"]),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, ["rope_scaling", "partial"]),
        ({"rope_parameters": [1]}, ["rope_parameters", "object"]),
        ({"hidden_act": "tanh"}, ["hidden_act", "'tanh'"]),
        ({"hidden_act": {}}, ["hidden_act"]),
        ({"torch_dtype": "float8_e4m3fn"}, ["torch_dtype", "float8_e4m3fn"]),
        ({"tie_word_embeddings": "yes"}, ["tie_word_embeddings", "true or false"]),
        ({"model_type": "gpt_oss", "layer_types": ["full_attention"]}, ["layer_types", "2 layers"]),
        ({"model_type": "gpt_oss", "layer_types": [1, 2]}, ["layer_types", "list of str"]),
        ({"model_type": "gpt_oss", "swiglu_limit": 3.0}, ["swiglu_limit", "7.0", "got 3.0"]),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, ["scoring_func", "sigmoid"]),
        ({"model_type": "qwen2_moe", "use_sliding_window": True}, ["layer_types"]),
    ],
)
def test_odd_fields_are_named(changes: dict[str, object], parts: list[str], tmp_path: Path) -> None:
    path = write(tmp_path, mixtral_body(**changes))
    with pytest.raises(MoeplanError) as caught:
        load_model(path)
    message = str(caught.value)
    assert message.startswith(path)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "3", '{"model_type": NaN}', "[" * 100_000, '{"model_type": "mix\\ntral"}', "\ufeff{}"]
)
def test_hostile_configurations(text: str, tmp_path: Path) -> None:
    with pytest.raises(MoeplanError) as caught:
        load_model(write(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    body = mixtral_body(model_type="qwen3_moe", moe_intermediate_size=8, mlp_only_layers=[0, 1], num_experts=4)
    with pytest.raises(
        MoeplanError, match=r"none of its 2 layers has experts: .* at least one block with moe"
    ) as caught:
        load_model(write(tmp_path, body))
    assert "{" not in str(caught.value)


def test_plain_attention_of_deepseek_is_not_latent(tmp_path: Path) -> None:
    """DeepSeek-OCR's decoder, reduced: ``use_mla`` false, heads of size 0."""
    body = mixtral_body(
        model_type="deepseek_v2", moe_intermediate_size=24, n_routed_experts=4, n_shared_experts=2, use_mla=False
    )
    zeros = {"qk_nope_head_dim": 0, "qk_rope_head_dim": 0, "v_head_dim": 0, "kv_lora_rank": None, "head_dim": 64}
    without = {name: value for name, value in (body | zeros).items() if name != "use_mla"}
    for plain in (body, body | zeros, without):
        attention = load_model(write(tmp_path, plain)).layers[1].attention
        assert attention is not None
        assert (attention.kind, attention.heads, attention.kv_heads, attention.head_dim) == ("gqa", 4, 2, 16)
    sizes = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "kv_lora_rank": 16}
    latent = load_model(write(tmp_path, body | sizes | {"use_mla": True})).layers[1].attention
    assert latent is not None
    assert latent.kind == "mla"
    with pytest.raises(MoeplanError, match="use_mla: expected true or false"):
        load_model(write(tmp_path, body | {"use_mla": "no"}))
