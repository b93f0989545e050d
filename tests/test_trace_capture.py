"""Captured routing is what the architecture's own formula says, for every kind of gate."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moeplan.profiler.traces import capture
from moeplan.spec import MoeplanError, Trace

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
CONFIGS = {
    "mixtral": {"intermediate_size": 16, "num_local_experts": 8},
    "qwen3_moe": {"intermediate_size": 16, "moe_intermediate_size": 16, "num_experts": 8, "norm_topk_prob": True},
    "qwen2_moe": {
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 16,
        "num_experts": 8,
        "norm_topk_prob": False,
    },
    "olmoe": {"intermediate_size": 16, "num_experts": 8, "norm_topk_prob": False},
    "gpt_oss": {"intermediate_size": 16, "num_local_experts": 8, "sliding_window": 16},
    "deepseek_v3": {
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "n_group": 2,
        "topk_group": 1,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "q_lora_rank": None,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "head_dim": 4,
        "num_key_value_heads": 4,
    },
}
ROUTERS = dict.fromkeys(CONFIGS, "mlp.gate") | {"gpt_oss": "mlp.router"}


def write_config(folder: Path, kind: str, **changes: object) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": kind, **SMALL, **CONFIGS.get(kind, {}), **changes}))
    return path


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes())
    return path


def expected(kind: str, config: Path, text: bytes, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Expert ids and gate weights [T, L, K] from the router's inputs and weights, by the architecture's formula."""
    import transformers

    torch.manual_seed(seed)
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config)).eval()
    inputs: list[torch.Tensor] = []
    routers = [m for name, m in net.named_modules() if name.endswith(ROUTERS[kind])]
    for router in routers:
        router.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
    with torch.inference_mode():
        net(torch.tensor(list(text)).view(-1, 16))
    layers = []
    for router, x in zip(routers, inputs, strict=True):
        logits = x @ router.weight.detach().T + getattr(router, "bias", torch.zeros(1))
        score = logits.sigmoid() if kind == "deepseek_v3" else logits.softmax(-1)
        choice = score.clone()
        if kind == "deepseek_v3":  # two groups of four experts, the better by its two best
            groups = score.view(-1, 2, 4).topk(2).values.sum(-1).argmax(-1)
            outside = (torch.arange(8) // 4)[None] != groups[:, None]
            choice[outside] = -1
        ids = choice.argsort(dim=-1, descending=True)[:, :2]
        weights = score.gather(1, ids)
        if kind in ("mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"):  # a softmax over the chosen only is the same
            weights = weights / weights.sum(-1, keepdim=True)
        layers.append((ids, weights * (2.5 if kind == "deepseek_v3" else 1.0)))
    return tuple(torch.stack(part, 1).detach().numpy() for part in zip(*layers, strict=True))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", CONFIGS)
def test_routing_of_every_architecture(kind: str, tmp_path: Path, text: Path) -> None:
    config = write_config(tmp_path, kind)
    events: list[dict] = []
    trace = capture(config, text, tokens=400, sequence_length=16, seed=3, random_weights=True, on_event=events.append)
    ids, weights = expected(kind, config, text.read_bytes(), 3)
    layers = 2 if kind == "deepseek_v3" else 3
    assert trace.expert_ids.shape == (400, layers, 2)
    assert trace.num_experts == 8
    np.testing.assert_array_equal(trace.expert_ids, ids)
    np.testing.assert_allclose(trace.expert_weights, weights, rtol=1e-4)
    assert (np.diff(trace.expert_weights, axis=2) <= 0).all()
    assert len(np.unique(trace.expert_ids)) == 8
    assert (events[-1]["done"], events[-1]["of"]) == (400, 400)
    assert "bytes" in trace.source
    assert "random weights" in trace.source
    assert trace.seq_len.tolist() == [16] * 25


def test_saved_weights_and_last_shorter_sequence(tmp_path: Path, text: Path) -> None:
    import transformers

    config = write_config(tmp_path, "mixtral")
    random = capture(config, text, tokens=100, sequence_length=16, seed=5, random_weights=True)
    torch.manual_seed(5)
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config))
    folder = tmp_path / "saved"
    net.save_pretrained(folder)
    loaded = capture(folder, text, tokens=100, sequence_length=16, seed=5)
    assert loaded.seq_len.tolist() == [16] * 6 + [4]
    assert loaded.model == "saved"
    np.testing.assert_array_equal(loaded.expert_ids, random.expert_ids)
    again = Trace.read(loaded.write(tmp_path / "trace.npz"))
    assert again.digest() == loaded.digest()
    other = capture(folder, text, tokens=100, sequence_length=16, seed=6)
    assert other.digest() != loaded.digest()

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(MoeplanError, match=r"lack 1 tensors, the first model\.norm\.weight"):
        capture(folder, text, tokens=100, sequence_length=16)
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(MoeplanError, match="its weights do not load"):
        capture(folder, text, tokens=100, sequence_length=16)


def test_tokenizer_of_the_folder(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}" for i in range(40)]
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "<unk>": 1, **{w: i + 2 for i, w in enumerate(words)}}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>").save_pretrained(tmp_path)
    config = write_config(tmp_path, "mixtral", vocab_size=64)
    text = tmp_path / "text.txt"
    text.write_text(" ".join(np.random.default_rng(1).choice(words, 33)))
    trace = capture(config, text, tokens=36, sequence_length=12, random_weights=True)
    assert "bytes" not in trace.source
    assert trace.seq_len.tolist() == [12, 12, 12]
    # Every sequence begins with <s>, which sees nothing else: the same routing each time.
    np.testing.assert_array_equal(trace.expert_ids[0], trace.expert_ids[12])
    np.testing.assert_array_equal(trace.expert_ids[0], trace.expert_ids[24])
    with pytest.raises(MoeplanError, match="33 tokens give 3 sequences of 12, 4 are needed"):
        capture(config, text, tokens=37, sequence_length=12, random_weights=True)


def failure(*args: object, **options: object) -> str:
    with pytest.raises(MoeplanError) as caught:
        capture(*args, **{"random_weights": True, "tokens": 32, "sequence_length": 16, **options})  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_bad_input(tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no such file" in failure(tmp_path / "none", text)
    config = write_config(tmp_path, "mixtral")
    assert "no *.safetensors" in failure(config, text, random_weights=False)
    assert "no such file" in failure(config, tmp_path / "none.txt")
    assert "allows at most 64" in failure(config, text, sequence_length=65)
    assert "at least 1" in failure(config, text, tokens=0)
    assert "device 'abacus' cannot be used" in failure(config, text, device="abacus")
    assert "400 tokens give 25 sequences of 16, 26 are needed" in failure(config, text, tokens=401)
    assert "too small for bytes" in failure(write_config(tmp_path, "mixtral", vocab_size=255), text)
    assert "has no router" in failure(write_config(tmp_path, "mistral", intermediate_size=16), text)
    assert "'nonsense' is none" in failure(write_config(tmp_path, "nonsense"), text)
    huge = write_config(tmp_path, "mixtral", hidden_size=2**14, intermediate_size=2**15, num_local_experts=256)
    assert "GiB of weights do not fit" in failure(huge, text)
    jetmoe = write_config(tmp_path, "jetmoe", intermediate_size=16, num_local_experts=4, kv_channels=8)
    assert "JetMoeParallelExperts does not take expert ids" in failure(jetmoe, text)
    assert "its choice cannot be seen" in failure(jetmoe, text)
    (tmp_path / "config.json").write_text("{")
    assert "not readable as JSON" in failure(config, text)
    (tmp_path / "config.json").write_text("[]")
    assert "None is none" in failure(config, text)
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert "pip install 'moeplan[hf]'" in failure(config, text)
