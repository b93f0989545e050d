"""Captured experts are those of the family's own formula, also where router logits do not tell them.

The reference computes each router's choice again from its input and weights, by the formula of the family's published
code; correction biases are large, so that choices by logits alone are wrong.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from moeplan.profiler.traces import capture, import_trace
from moeplan.profiler.traces.importers.transformers_logits import HIGHEST, OTHERWISE
from moeplan.service import cli
from moeplan.spec import MoeplanError, Trace

SMALL = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 16,
    "moe_intermediate_size": 16,
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
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "head_dim": 4,
    "num_key_value_heads": 4,
}
GROUPED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2}
CONFIGS: dict[str, dict[str, Any]] = {
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 1},
    "minimax_m2": {"num_local_experts": 8},
    "glm4_moe": GROUPED,
    "deepseek_v2": {**GROUPED, **LATENT, "topk_method": "group_limited_greedy", "topk_group": 1},
    "dots1": {**GROUPED, "n_group": 1, "topk_group": 1, "layer_types": ["full_attention"] * 3},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["full_attention"] * 3},
    "longcat_flash": {
        **LATENT,
        "num_layers": 3,
        "num_hidden_layers": 6,  # sub-blocks
        "ffn_hidden_size": 16,
        "expert_ffn_hidden_size": 16,
        "n_routed_experts": 8,
        "zero_expert_num": 4,
    },
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 3,
        "max_seq_len": 64,
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 8, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0},
    },
    "mixtral": {"num_local_experts": 8},
    "qwen2_moe": {"num_experts": 8, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8},
    "qwen3_next": {"num_experts": 8, "layer_types": ["full_attention"] * 3, "shared_expert_intermediate_size": 16},
    "olmoe": {"num_experts": 8},
    "flex_olmo": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 16},
    "granitemoe": {"num_local_experts": 8},
    "granitemoeshared": {"num_local_experts": 8, "shared_intermediate_size": 16},
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": [2] * 3, "num_shared_expert": [1] * 3},
    "jamba": {"num_experts": 8, "attn_layer_period": 1, "attn_layer_offset": 0, "expert_layer_period": 1,
              "expert_layer_offset": 0, "use_mamba_kernels": False},
    "llama4_text": {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size_mlp": 16},
    "minimax": {"num_local_experts": 8, "layer_types": ["full_attention"] * 3},
    "phimoe": {"num_local_experts": 8, "router_jitter_noise": 0.01},
    "jetmoe": {"num_local_experts": 8, "kv_channels": 8, "num_hidden_layers": 3},
}  # fmt: skip


def top(scores: Tensor) -> Tensor:
    return scores.argsort(dim=-1, descending=True)[:, :2]


def grouped(scores: Tensor, groups: int, best: int) -> Tensor:
    """Scores of the best of four groups, the others out of reach; a group is worth the sum of its ``best`` scores."""
    worth = scores.view(-1, 4, 2).topk(best).values.sum(-1)
    inside = torch.zeros_like(worth).scatter(1, worth.topk(groups).indices, 1).repeat_interleave(2, dim=1).bool()
    return scores.masked_fill(~inside, -torch.inf)


# Expert ids by the family's formula, from router logits [T, E] and the correction bias [E].
FORMULAS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "ernie4_5_moe": lambda logits, bias: top(logits.softmax(-1) + bias),
    "minimax_m2": lambda logits, bias: top(logits.sigmoid() + bias),
    "glm4_moe": lambda logits, bias: top(grouped(logits.sigmoid() + bias, groups=2, best=2)),
    "deepseek_v2": lambda logits, _: top(grouped(logits.softmax(-1), groups=1, best=1)),
    "dots1": lambda logits, bias: top(logits.sigmoid() + bias),
    "lfm2_moe": lambda logits, bias: top(logits.sigmoid() + bias),
    "longcat_flash": lambda logits, bias: top(logits.softmax(-1) + bias),
    "dbrx": lambda logits, _: top(logits),
}
ROUTER = {"longcat_flash": "mlp.router", "dbrx": "ffn.router", "lfm2_moe": "feed_forward.gate"}
LAYERS = {"glm4_moe": 2, "deepseek_v2": 2, "dots1": 2, "lfm2_moe": 2, "ernie4_5_moe": 2}  # the first is dense


def config_of(folder: Path, kind: str) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({"model_type": kind, **SMALL, **CONFIGS[kind]}))
    return path


def build(config: Path) -> torch.nn.Module:
    """A random model whose correction biases are as large as its scores' spread."""
    import transformers

    torch.manual_seed(3)
    net = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(config)).eval()
    for name, tensor in [*net.named_buffers(), *net.named_parameters()]:
        if name.endswith(("correction_bias", "expert_bias")):
            with torch.no_grad():
                tensor.copy_(torch.randn(tensor.shape) / 2)
    return net


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, 128, dtype=np.uint8).tobytes())
    return path


def chosen(kind: str, net: torch.nn.Module, text: Path) -> tuple[np.ndarray, np.ndarray]:
    """Experts [T, L, K] by the family's formula and by logits alone, ascending."""
    suffix = ROUTER.get(kind, "mlp.gate")
    routers = [(name, module) for name, module in net.named_modules() if name.endswith(suffix)]
    inputs: dict[str, Tensor] = {}
    for name, router in routers:
        router.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
    with torch.inference_mode():
        net(torch.tensor(list(text.read_bytes())).view(-1, 16))
    state = dict(net.named_buffers()) | dict(net.named_parameters())
    layers, plain = [], []
    for name, router in routers:
        block = name.removesuffix(suffix) + suffix.partition(".")[0]
        biases = [value for key, value in state.items() if key.startswith(f"{block}.") and key.endswith("_bias")]
        linear = getattr(router, "classifier", getattr(router, "layer", router))
        logits = inputs[name].float() @ linear.weight.detach().float().T
        ids = FORMULAS[kind](logits, biases[0].flatten() if biases else torch.zeros(1))
        layers.append(ids)
        plain.append(top(logits))
    return tuple(torch.stack(part, 1).sort(-1).values.numpy() for part in (layers, plain))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", FORMULAS)
def test_experts_are_those_of_the_formula(kind: str, tmp_path: Path, text: Path) -> None:
    net = build(config_of(tmp_path, kind))
    folder = tmp_path / "saved"
    net.save_pretrained(folder)
    ids, by_logits = chosen(kind, net, text)
    trace = capture(folder, text, tokens=128, sequence_length=16)
    assert trace.layers == LAYERS.get(kind, 3)
    assert trace.num_experts == 8
    if kind == "longcat_flash":  # ids from 8 on are identity experts
        assert (ids >= 8).mean() > 0.1
        assert trace.counts_only
        counts = [[(ids[:, layer] == expert).sum() for expert in range(8)] for layer in range(3)]
        assert trace.expert_counts.tolist() == counts
        assert f"{(ids >= 8).mean():.1%} of the choices, identity experts" in trace.source
    else:
        np.testing.assert_array_equal(np.sort(trace.expert_ids, axis=2), ids)
        assert (np.diff(trace.expert_weights, axis=2) <= 0).all()
    if kind != "dbrx":
        assert (ids != by_logits).any(axis=2).mean() > 0.1  # logits would have been wrong


@pytest.mark.parametrize("kind", ["jetmoe", "llama4_text"])
def test_experts_that_are_not_called_with_ids_are_refused_by_name(kind: str, tmp_path: Path, text: Path) -> None:
    with pytest.raises(MoeplanError, match=r"Experts does not take expert ids.*its choice cannot be seen"):
        capture(config_of(tmp_path, kind), text, tokens=32, sequence_length=16, random_weights=True)


@pytest.mark.parametrize("kind", HIGHEST.split())
def test_logits_of_families_that_take_the_highest(kind: str, tmp_path: Path, text: Path) -> None:
    """What `import --from transformers --model` makes of logits is what the experts were called with."""
    config = config_of(tmp_path, kind)
    net = build(config)
    given: list[Tensor] = []
    for name, module in net.named_modules():
        if name.endswith("experts") and kind != "llama4_text":
            module.register_forward_pre_hook(lambda _, args: given.append(args[1]))
        if name.endswith("router") and kind == "llama4_text":  # its experts get every token, scaled by a score or zero
            module.register_forward_hook(lambda _, args, out: given.append(out[0].topk(2).indices))
    with torch.inference_mode():
        out = net(torch.tensor(list(text.read_bytes())).view(-1, 16), output_router_logits=True)
    assert len(given) == len(out.router_logits)
    torch.save(out.router_logits, tmp_path / "logits.pt")
    trace, notes = import_trace(tmp_path / "logits.pt", model=str(config), top_k=2)
    expected = torch.stack([ids.reshape(128, 2) for ids in given], 1).sort(-1).values.numpy()
    np.testing.assert_array_equal(np.sort(trace.expert_ids, axis=2), expected)
    assert any(f"as {kind} chooses" in note for note in notes)


def moeplan(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, *args: object) -> tuple[object, str]:
    """Exit status and standard error, in one line, of a command."""
    monkeypatch.setattr(sys, "argv", ["moeplan", *map(str, args)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return stopped.value.code, " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("kind", ["ernie4_5_moe", "minimax_m2", "glm4_moe", "deepseek_v2", "longcat_flash", "jetmoe"])
def test_logits_that_do_not_tell_the_experts_are_refused_by_family(
    kind: str, tmp_path: Path, text: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    config = config_of(tmp_path, kind)
    with torch.inference_mode():
        out = build(config)(torch.tensor(list(text.read_bytes())).view(-1, 16), output_router_logits=True)
    torch.save(tuple(out.router_logits), logits := tmp_path / "logits.pt")
    trace = tmp_path / "trace.npz"
    command = ["trace", "import", logits, "--from", "transformers", "--model", config, "-o", trace]
    code, error = moeplan(monkeypatch, capfd, *command)
    assert code == 2
    assert f"logits of {kind} do not tell its experts: it {OTHERWISE[kind]}" in error
    assert not trace.exists()


def test_logits_of_an_unnamed_model_are_refused_by_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    torch.save((torch.randn(5, 4), torch.randn(5, 4)), logits := tmp_path / "logits.pt")
    command = ["trace", "import", logits, "--top-k", "2", "-o", tmp_path / "trace.npz"]
    code, error = moeplan(monkeypatch, capfd, *command)
    assert code == 2
    assert "--highest-logits" in error
    assert "--model" in error
    assert moeplan(monkeypatch, capfd, *command, "--highest-logits")[0] == 0
    assert Trace.read(tmp_path / "trace.npz").expert_ids.shape == (5, 2, 2)


def test_families_with_a_correction_bias_are_known() -> None:
    """Every causal family of the installed Transformers whose router adds a bias is refused, or not known at all."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    models = Path(transformers.__file__).parent / "models"
    for kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        source = models / kind / f"modeling_{kind}.py"
        if source.exists() and "correction_bias" in source.read_text(encoding="utf-8"):
            assert kind not in HIGHEST.split()
    assert not set(HIGHEST.split()) & OTHERWISE.keys()
