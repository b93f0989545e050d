"""The catalogue and the Hugging Face readers, against published numbers and against Transformers itself."""

import json
from pathlib import Path

import pytest
import torch
import transformers

from moeplan.spec.catalogue import catalogue, catalogue_rows, load_model
from moeplan.spec.model import Model

# Published totals and active parameters in billions. The last column says whether the publisher's active count holds
# the input embedding (one row of which a token uses): Model.active_parameters() does.
PUBLISHED = [
    ("mixtral", 46.7, 12.9, True),
    ("mixtral-8x22b", 141, 39, True),
    ("deepseek-v3", 671, 37, False),
    ("deepseek-v2-lite", 15.7, 2.4, False),
    ("qwen3-30b-a3b", 30.5, 3.3, True),
    ("qwen3-235b-a22b", 235, 22, True),
    ("olmoe", 6.9, 1.3, True),
    ("gpt-oss-20b", 20.9, 3.6, False),
    ("gpt-oss-120b", 116.8, 5.1, False),
    ("longcat-flash", 560, 27, False),
]
TOTAL_TOLERANCE = 0.005
ACTIVE_TOLERANCE = 0.025  # the published active counts have two digits


@pytest.mark.parametrize(("name", "total", "active", "with_embedding"), PUBLISHED)
def test_published_parameters(name: str, total: float, active: float, with_embedding: bool) -> None:
    model = load_model(name)
    assert model.total_parameters() / 1e9 == pytest.approx(total, rel=TOTAL_TOLERANCE)
    embedding = 0 if with_embedding else model.vocab_size * model.layers[0].hidden_size
    assert (model.active_parameters() - embedding) / 1e9 == pytest.approx(active, rel=ACTIVE_TOLERANCE)


def test_every_required_model_is_there() -> None:
    names = set(catalogue())
    assert {name for name, *_ in PUBLISHED} <= names
    assert {f"switch-base-{n}" for n in (8, 16, 32, 64, 128, 256)} <= names
    assert {f"gpt-moe-{n}" for n in (8, 16, 32, 64)} <= names
    assert {"swin-moe-small", "swin-moe-base", "tiny-moe", "lab-moe"} <= names
    for name, model in catalogue().items():
        assert model.name == name
        assert model.source


def test_own_models() -> None:
    tiny, lab = load_model("tiny-moe"), load_model("lab-moe")
    (block,) = tiny.blocks
    assert block.attention is not None
    assert block.moe is not None
    assert (tiny.vocab_size, block.count, block.hidden_size, tiny.dtype) == (256, 8, 128, "f32")
    assert (block.attention.heads, block.attention.kv_heads, block.attention.head_dim) == (4, 2, 32)
    assert (block.moe.num_experts, block.moe.top_k, block.moe.ffn_size, block.moe.activation) == (16, 2, 128, "silu")
    assert (block.moe.gate.score, block.moe.gate.normalize) == ("softmax", True)
    assert (tiny.rope_theta, tiny.norm_eps, tiny.tie_embeddings) == (10000.0, 1e-5, False)
    (block,) = lab.blocks
    assert block.moe is not None
    assert (lab.vocab_size, block.count, block.hidden_size, lab.dtype) == (4096, 4, 1024, "f32")
    assert (block.moe.num_experts, block.moe.top_k, block.moe.ffn_size) == (16, 2, 1024)


def test_staged_and_alternating_models() -> None:
    swin = load_model("swin-moe-small")
    assert [swin.layers[i].hidden_size for i in (0, 2, 4, 22)] == [96, 192, 384, 768]
    assert swin.moe_layers == (5, 7, 9, 11, 13, 15, 17, 19, 21, 23)
    switch = load_model("switch-base-64")
    assert switch.moe_layers == tuple(range(1, 24, 2))
    assert [bool(block.attention and block.attention.cross) for block in switch.layers] == [False] * 12 + [True] * 12
    assert not switch.causal
    longcat = load_model("longcat-flash")
    assert longcat.moe_layers == tuple(range(1, 56, 2))
    assert longcat.moe_block().shortcut == "mid"


@pytest.mark.parametrize(("name", "dense_millions"), [("swin-moe-small", 50), ("swin-moe-base", 88)])
def test_swin_with_one_expert_is_dense_swin(name: str, dense_millions: float) -> None:
    """With one expert a Swin-MoE is Swin-S or Swin-B, whose published size holds the merging layers and the head."""
    body = load_model(name).model_dump()
    for block in body["blocks"]:
        if block["moe"]:
            block["moe"] |= {"num_experts": 1}
    backbone = Model.model_validate(body).total_parameters()
    width = body["blocks"][0]["hidden_size"]
    merging = sum((4 * w) * (2 * w) + 8 * w for w in (width, 2 * width, 4 * width))
    head = 8 * width * 1000 + 1000
    assert (backbone + merging + head) / 1e6 == pytest.approx(dense_millions, rel=0.02)


def parameters(config: transformers.PretrainedConfig, auto: type = transformers.AutoModelForCausalLM) -> int:
    """What Transformers builds for a configuration, without allocating it."""
    with torch.device("meta"):
        return int(sum(p.numel() for p in auto.from_config(config).parameters()))  # type: ignore[attr-defined]


def saved(config: transformers.PretrainedConfig, folder: Path) -> Model:
    """The configuration as Transformers writes it, read back by moeplan."""
    config.save_pretrained(folder)
    return load_model(str(folder))


SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 160}
LATENT = {
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 8,
    "v_head_dim": 20,
    "moe_intermediate_size": 40,
    "intermediate_size": 96,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
EXACT = {
    "mixtral": transformers.MixtralConfig(
        **SMALL, intermediate_size=96, num_key_value_heads=2, head_dim=24, num_local_experts=6
    ),
    "mixtral, tied": transformers.MixtralConfig(
        **SMALL, intermediate_size=96, num_key_value_heads=4, tie_word_embeddings=True
    ),
    "qwen3": transformers.Qwen3MoeConfig(
        **SMALL, moe_intermediate_size=40, num_experts=6, num_experts_per_tok=2, num_key_value_heads=2, head_dim=24
    ),
    "qwen3, dense layers and biases": transformers.Qwen3MoeConfig(
        **(SMALL | {"num_hidden_layers": 6}),
        moe_intermediate_size=40,
        intermediate_size=88,
        num_experts=6,
        num_experts_per_tok=2,
        num_key_value_heads=4,
        attention_bias=True,
        decoder_sparse_step=2,
        mlp_only_layers=[3],
    ),
    "qwen2, shared expert and QKV bias": transformers.Qwen2MoeConfig(
        **SMALL,
        moe_intermediate_size=40,
        intermediate_size=88,
        shared_expert_intermediate_size=56,
        num_experts=6,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        mlp_only_layers=[0],
    ),
    "olmoe": transformers.OlmoeConfig(
        **SMALL, intermediate_size=48, num_experts=6, num_experts_per_tok=2, num_key_value_heads=2
    ),
    "gpt-oss": transformers.GptOssConfig(
        **SMALL,
        intermediate_size=48,
        num_local_experts=6,
        num_experts_per_tok=2,
        num_key_value_heads=2,
        head_dim=24,
        sliding_window=8,
    ),
    "deepseek-v2, no query compression": transformers.DeepseekV2Config(
        **SMALL, **LATENT, q_lora_rank=None, n_shared_experts=2, first_k_dense_replace=1
    ),
}


@pytest.mark.parametrize("case", EXACT)
def test_parameters_equal_transformers(case: str, tmp_path: Path) -> None:
    config = EXACT[case]
    assert saved(config, tmp_path).total_parameters() == parameters(config)


@pytest.mark.parametrize("bias", [False, True])
def test_deepseek_v3_differs_by_its_buffer_only(bias: bool, tmp_path: Path) -> None:
    """The correction bias of the router is a buffer in Transformers and a parameter here (it is in the checkpoint)."""
    config = transformers.DeepseekV3Config(
        **SMALL,
        **LATENT,
        q_lora_rank=32,
        n_shared_experts=1,
        first_k_dense_replace=1,
        n_group=4,
        topk_group=2,
        attention_bias=bias,
    )
    model = saved(config, tmp_path)
    assert model.total_parameters() - parameters(config) == len(model.moe_layers) * config.n_routed_experts


def test_longcat_differs_by_its_buffer_and_unused_weights_only(tmp_path: Path) -> None:
    """Transformers gives the zero experts gate/up weights that nothing reads; they have none here."""
    config = transformers.LongcatFlashConfig(
        hidden_size=64,
        num_layers=2,
        num_attention_heads=4,
        vocab_size=160,
        ffn_hidden_size=96,
        expert_ffn_hidden_size=40,
        q_lora_rank=32,
        kv_lora_rank=16,
        qk_nope_head_dim=24,
        qk_rope_head_dim=8,
        v_head_dim=20,
        moe_topk=3,
        n_routed_experts=8,
        zero_expert_num=4,
    )
    model = saved(config, tmp_path)
    unused = 2 * 4 * (2 * 40 * 64)
    correction = 2 * (8 + 4)
    assert parameters(config) - model.total_parameters() == unused - correction


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("mixtral", transformers.MixtralConfig()),
        ("gpt-oss-120b", transformers.GptOssConfig()),
        ("deepseek-v3", transformers.DeepseekV3Config()),
        ("longcat-flash", transformers.LongcatFlashConfig()),
    ],
)
def test_catalogue_equals_the_defaults_of_transformers(
    name: str, config: transformers.PretrainedConfig, tmp_path: Path
) -> None:
    """These configuration classes default to the published model, but say nothing of how its weights are stored."""
    told = {"name", "source", "dtype", "blocks"}
    theirs, ours = saved(config, tmp_path), load_model(name)
    assert theirs.model_dump(exclude=told) == ours.model_dump(exclude=told)
    assert theirs.layers == tuple(block.dequantised() for block in ours.layers)


def test_rows_are_what_the_command_prints() -> None:
    rows = {row["name"]: row for row in catalogue_rows()}
    assert set(rows) == set(catalogue())
    row = rows["mixtral"]
    assert (row["layers"], row["moe_layers"], row["experts"], row["top_k"]) == (32, 32, 8, 2)
    assert (row["hidden"], row["expert_ffn"], row["family"]) == (4096, 14336, "mixtral")
    assert row["expert_bytes"] == 3 * 4096 * 14336 * 2
    assert rows["deepseek-v3"]["moe_layers"] == 58
    assert json.loads(json.dumps(list(rows.values())))


def test_catalogue_cannot_be_changed_by_a_caller() -> None:
    catalogue().clear()
    assert "mixtral" in catalogue()
