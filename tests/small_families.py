"""Every family of the installed Transformers whose experts are called through one interface, at a size for tests."""

import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from moeplan.runtime.embedding.form import Form, experts_modules, form_of
from moeplan.spec import Model, Plan
from moeplan.spec.model import Block, Moe
from moeplan.spec.plan import LayerPlan
from moeplan.tests.plans import hand_made_plan

EXPERTS = 8
SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 3, "max_position_embeddings": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "sliding_window": 16,
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "intermediate_size": 48, "moe_intermediate_size": 32, "shared_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "n_shared_experts": 1, "num_shared_experts": 1,
    "moe_num_shared_experts": 1, "first_k_dense_replace": 1, "num_dense_layers": 1,
    "num_experts": EXPERTS, "num_local_experts": EXPERTS, "n_routed_experts": EXPERTS, "moe_num_experts": EXPERTS,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_topk": 2, "moe_k": 2, "top_k_experts": 2,
    "n_group": 1, "topk_group": 1, "initializer_range": 0.3,
    "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip
LATENT = {"num_key_value_heads": 4, "head_dim": 8}
HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
OWN: dict[str, dict[str, Any]] = {
    "axk1": LATENT,
    "axk2": LATENT,
    "bailing_hybrid": LATENT | HYBRID | {"n_group": 2},
    "beam": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "dots3_note_text": {"num_key_value_heads": 4, "per_layer_config": {}, "index_n_heads": 4, "index_head_dim": 16},
    "gemma4_text": {"vocab_size_per_layer_input": 128, "hidden_size_per_layer_input": 8, "enable_moe_block": True},
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2, "use_mamba_kernels": False},
    "kimi_linear": LATENT | HYBRID,
    "lfm2_moe": {"layer_types": ["full_attention", "conv", "full_attention"]},
    "qwen3_5_moe_text": HYBRID,
    "qwen3_next": HYBRID,
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        **{"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 16},
        **{"indexer_budget": 16, "indexer_compress_ratio": 4},
    },
    "zaya": {"num_experts_per_tok": 1},
    "llama4_text": {"num_experts_per_tok": 1, "intermediate_size_mlp": 48, "moe_layers": [0, 2]},
}


def families() -> list[str]:
    """Of causal language models whose source has experts of the interface; of those with other inputs the text part."""
    root, found = Path(transformers.__file__).parent / "models", []
    auto = transformers.models.auto
    for family, name in auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        folder = auto.configuration_auto.model_type_to_module_name(family)
        sources = [path.read_text() for path in (root / folder).glob("modeling_*.py")]
        if isinstance(name, str) and any(re.search(r"^@use_experts_implementation", text, re.M) for text in sources):
            found.append(family)
    return sorted(family for family in set(found) if f"{family}_text" not in found)


def small_config(family: str, **changes: Any) -> Any:
    """Sizes of the configuration that it has, made small."""
    kind = transformers.CONFIG_MAPPING[family]
    known = set(kind().to_dict())
    fields = {key: value for key, value in SMALL.items() if key in known} | OWN.get(family, {}) | changes
    return kind(**fields)


def build(family: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """With random weights, also where Transformers begins with zeros, as in some routers; in evaluation mode."""
    torch.manual_seed(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = transformers.AutoModelForCausalLM.from_config(small_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.normal_(std=0.3)
    return net


def plan_for(net: torch.nn.Module, layer: Callable[[Form], LayerPlan], ranks: int = 2, **changes: Any) -> Plan:
    """By hand, of a model that has the layers with experts only; ``changes``: of the description of the experts."""
    top_k = experts_per_token(net)
    forms = [form_of(name, module) for name, module in experts_modules(net).items()]
    blocks = []
    for form in forms:
        moe = Moe(num_experts=form.experts, top_k=top_k, ffn_size=form.ffn, gated=form.gated, bias=form.bias)
        blocks.append(Block(hidden_size=form.hidden, moe=moe.model_copy(update=changes)))
    model = Model(
        name=net.config.model_type, family=net.config.model_type, vocab_size=0, blocks=tuple(blocks), dtype="f32"
    )
    return hand_made_plan(model, f"prefill:{ranks}@1", [layer(form) for form in forms], tokens=(1,) * ranks)


@torch.no_grad()
def experts_per_token(net: torch.nn.Module) -> int:
    """As its experts are called."""
    seen: set[int] = set()

    def see(_: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.add([*args, *kwargs.values()][1].shape[-1])

    hooks = [module.register_forward_pre_hook(see, with_kwargs=True) for module in experts_modules(net).values()]
    net(torch.tensor([[3, 4]]), use_cache=False)
    for hook in hooks:
        hook.remove()
    (found,) = seen
    return found
