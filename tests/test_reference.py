"""The reference against Transformers: prefill and decode, through checkpoints on disk."""

import json

import pytest
import torch
import transformers

from moeplan.runtime.checkpoint import Checkpoint
from moeplan.runtime.random_weights import RandomWeights
from moeplan.runtime.reference import ReferenceModel
from moeplan.spec import MoeplanError
from moeplan.spec.catalogue import load_model
from moeplan.spec.catalogue.huggingface import read_config
from moeplan.spec.routing import Routing

torch.set_num_threads(1)  # sizes are small: threads would only wait for each other

VOCABULARY, PROMPT, STEPS, SEQUENCES = 97, 24, 8, 3

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}
QWEN = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96, "moe_intermediate_size": 48, "num_experts": 8}
MIXTRAL = {**COMMON, "num_key_value_heads": 2, "intermediate_size": 96, "num_local_experts": 8}
OLMOE = {**COMMON, "num_key_value_heads": 4, "intermediate_size": 48, "num_experts": 8}
CONFIGS = {
    "mixtral": lambda: transformers.MixtralConfig(**MIXTRAL),
    "mixtral-window": lambda: transformers.MixtralConfig(**MIXTRAL, sliding_window=7),
    "qwen3": lambda: transformers.Qwen3MoeConfig(**QWEN, head_dim=16, norm_topk_prob=True),
    "qwen3-dense-bias-tied": lambda: transformers.Qwen3MoeConfig(
        **QWEN, head_dim=16, mlp_only_layers=[0], attention_bias=True, tie_word_embeddings=True
    ),
    "qwen2-shared": lambda: transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=80),
    "olmoe": lambda: transformers.OlmoeConfig(**OLMOE),
    "olmoe-clip": lambda: transformers.OlmoeConfig(**OLMOE, clip_qkv=0.5),
}


def random_model(name: str, skew: bool = False) -> transformers.PreTrainedModel:
    """Random weights and norms, large enough that every part matters; ``skew``: expert 0 hot, experts 5 to 7 idle."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            torch.nn.init.normal_(p, float("norm" in key), 0.2)
            # A direction that all tokens share, which experts 5 to 7 shun and expert 0 seeks.
            if skew and key.endswith("embed_tokens.weight"):
                p += 2
            if skew and key.endswith("mlp.gate.weight"):
                p[5:] -= 1
                p[0] += 0.3
    return model


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max()).item()


def compare(model: transformers.PreTrainedModel, folder, kernel: str) -> None:
    """Prefill and 8 decode steps against Transformers' own cache."""
    tokens = torch.randint(VOCABULARY, (SEQUENCES, PROMPT + STEPS), generator=torch.Generator().manual_seed(1))
    spec = load_model(str(folder))
    source = Checkpoint(spec, folder, torch.float32)
    ours = ReferenceModel(spec, source, sequences=SEQUENCES, capacity=PROMPT + STEPS, kernel=kernel)
    with torch.no_grad():
        theirs = model(tokens[:, :PROMPT], use_cache=True)
        assert relative(ours.prefill(tokens[:, :PROMPT]), theirs.logits) < 1e-5
        for i in range(PROMPT, PROMPT + STEPS):
            theirs = model(tokens[:, i : i + 1], past_key_values=theirs.past_key_values, use_cache=True)
            assert relative(ours.decode(tokens[:, i]), theirs.logits[:, 0]) < 1e-5


@pytest.mark.parametrize("kernel", ["reference", "grouped"])
@pytest.mark.parametrize("name", CONFIGS)
def test_logits_equal_transformers(name, kernel, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, kernel)


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe"])
def test_skewed_routing_with_idle_experts(name, tmp_path):
    model = random_model(name, skew=True)
    with torch.no_grad():
        logits = model(torch.arange(VOCABULARY)[None], output_router_logits=True).router_logits
    counts = torch.stack([torch.bincount(layer.topk(2).indices.flatten(), minlength=8) for layer in logits])
    assert (counts[:, 5:] == 0).all()
    assert (counts[:, 0] > VOCABULARY / 2).all()
    model.save_pretrained(tmp_path)
    compare(model, tmp_path, "grouped")


@pytest.mark.parametrize("name", ["mixtral", "qwen3", "olmoe"])
def test_fused_and_sharded_checkpoints(name, tmp_path):
    model = random_model(name)
    model.save_pretrained(tmp_path, save_original_format=False, max_shard_size="100KB")
    where = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    assert "model.layers.0.mlp.experts.gate_up_proj" in where
    assert len(set(where.values())) > 1
    compare(model, tmp_path, "reference")


def small_model():
    """A model of the catalogue's documents with a shared expert, made small."""
    body = transformers.Qwen2MoeConfig(**QWEN, shared_expert_intermediate_size=80).to_dict()
    return read_config(body, "test", "small", "")


def test_decode_equals_prefill_of_the_same_tokens():
    model = small_model()
    source = RandomWeights(model, torch.float32, seed=3)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, 12), generator=torch.Generator().manual_seed(2))
    whole = ReferenceModel(model, source, sequences=SEQUENCES, capacity=12).prefill(tokens)
    steps = ReferenceModel(model, source, sequences=SEQUENCES, capacity=12)
    assert relative(steps.prefill(tokens[:, :4]), whole[:, :4]) < 1e-5
    for i in range(4, 12):
        assert relative(steps.decode(tokens[:, i]), whole[:, i]) < 1e-5
    with pytest.raises(MoeplanError, match="do not fit"):
        steps.decode(tokens[:, 0])


def test_chunked_prefill_after_a_context():
    """Several new tokens behind a context: the mask is aligned to the last position."""
    model = small_model()
    source = RandomWeights(model, torch.float32, seed=3)
    x = torch.randn(SEQUENCES, 12, 64, generator=torch.Generator().manual_seed(2))
    whole = ReferenceModel(model, source, sequences=SEQUENCES, capacity=12).forward_hidden(x.flatten(0, 1))
    parts = ReferenceModel(model, source, sequences=SEQUENCES, capacity=12)
    halves = [parts.forward_hidden(half.flatten(0, 1)).view(SEQUENCES, 6, 64) for half in (x[:, :6], x[:, 6:])]
    assert relative(torch.cat(halves, 1), whole.view(SEQUENCES, 12, 64)) < 1e-5


def test_forced_routing_decides_the_experts():
    model = small_model()
    source = RandomWeights(model, torch.float32, seed=3)
    x = torch.randn(SEQUENCES, 64, generator=torch.Generator().manual_seed(2))
    shape = (SEQUENCES, 2, 2)
    forced = Routing(torch.zeros(shape, dtype=torch.int32).numpy(), torch.full(shape, 0.5).numpy())
    forced.expert_ids[..., 1] = 5

    def run(routing):
        return ReferenceModel(model, source, sequences=SEQUENCES, capacity=1).forward_hidden(x, routing)

    swapped = Routing(forced.expert_ids[..., ::-1].copy(), forced.expert_weights)
    other = Routing(forced.expert_ids + 1, forced.expert_weights)
    assert relative(run(forced), run(swapped)) < 1e-6
    assert relative(run(forced), run(other)) > 1e-3
    assert relative(run(forced), run(None)) > 1e-3
