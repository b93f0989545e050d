"""Every family that the reader accepts, beside what Transformers builds for the same configuration.

    python benchmarks/families.py

Total and active parameters, parameters of one expert, and values that the key/value cache holds per token: ours from
the configuration alone, theirs counted in the modules that Transformers makes on the meta device, and for the small
configurations in the cache after a real forward pass. Small configurations have unequal dimensions, so that a swapped
one shows; the published ones are those of the catalogue. Exit code 1 where anything differs.

Two things are counted as the checkpoints have them. The router's correction bias, a buffer in Transformers, is a
parameter. The rows that Transformers 5.23 gives LongCat's identity experts, which nothing reads, are none.
"""

import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch import nn

from moeplan.spec.catalogue.huggingface import READERS, read_config
from moeplan.spec.catalogue.published import PUBLISHED
from moeplan.spec.model import Model

TOKENS = 3  # of the forward pass that fills a cache
CORRECTION = "e_score_correction_bias"

_SMALL = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 160}
_LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 24, "qk_rope_head_dim": 8, "v_head_dim": 20}
_DEEPSEEK = _SMALL | _LATENT | {"moe_intermediate_size": 40, "intermediate_size": 96, "n_routed_experts": 8}
_DEEPSEEK |= {"num_experts_per_tok": 3}
_GROUPED = {"num_key_value_heads": 2, "head_dim": 24}
_QWEN = _SMALL | {"moe_intermediate_size": 40, "intermediate_size": 88, "num_experts": 6, "num_experts_per_tok": 3}
_SWITCH = {"vocab_size": 160, "d_model": 64, "d_kv": 24, "d_ff": 96, "num_heads": 4, "num_layers": 6, "num_experts": 5}
_LONGCAT = {"hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "vocab_size": 160, "ffn_hidden_size": 96}
_LONGCAT |= _LATENT | {"expert_ffn_hidden_size": 40, "q_lora_rank": 28, "moe_topk": 3, "n_routed_experts": 8}
_LONGCAT |= {"head_dim": 8}  # of the rotary part

# name: (family, its configuration's arguments)
SMALL: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", _SMALL | _GROUPED | {"intermediate_size": 96, "num_local_experts": 6}),
    "mixtral, tied, one head size": (
        "mixtral",
        _SMALL | {"intermediate_size": 96, "num_key_value_heads": 4, "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        _QWEN | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 56, "mlp_only_layers": [0]},
    ),
    "qwen2_moe, no bias, windows": (
        "qwen2_moe",
        _QWEN
        | {"num_key_value_heads": 2, "shared_expert_intermediate_size": 56, "qkv_bias": False}
        | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3},
    ),
    "qwen3_moe": ("qwen3_moe", _QWEN | _GROUPED),
    "qwen3_moe, dense layers, biases": (
        "qwen3_moe",
        _QWEN
        | _GROUPED
        | {"num_hidden_layers": 6, "attention_bias": True, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
    ),
    "olmoe": (
        "olmoe",
        _SMALL
        | {"intermediate_size": 48, "num_experts": 6, "num_experts_per_tok": 3}
        | {"num_key_value_heads": 2, "attention_bias": True},
    ),
    "gpt_oss": (
        "gpt_oss",
        _SMALL
        | _GROUPED
        | {"intermediate_size": 48, "num_local_experts": 6, "num_experts_per_tok": 3, "sliding_window": 8},
    ),
    "deepseek_v2": (
        "deepseek_v2",
        _DEEPSEEK | {"q_lora_rank": None, "n_shared_experts": 2, "first_k_dense_replace": 1},
    ),
    "deepseek_v2, query ranks, groups": (
        "deepseek_v2",
        _DEEPSEEK
        | {"q_lora_rank": 28, "n_shared_experts": 1, "first_k_dense_replace": 2, "attention_bias": True}
        | {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3": (
        "deepseek_v3",
        _DEEPSEEK | {"q_lora_rank": 28, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2},
    ),
    "deepseek_v3, biases, no query ranks": (
        "deepseek_v3",
        _DEEPSEEK
        | {"q_lora_rank": None, "n_shared_experts": 3, "first_k_dense_replace": 2, "attention_bias": True}
        | {"n_group": 2, "topk_group": 1},
    ),
    "switch_transformers": (
        "switch_transformers",
        _SWITCH | {"num_decoder_layers": 4, "num_sparse_encoder_layers": 3, "num_sparse_decoder_layers": 2},
    ),
    "switch_transformers, router bias, untied": (
        "switch_transformers",
        _SWITCH
        | {"num_decoder_layers": 3, "num_sparse_encoder_layers": 2, "num_sparse_decoder_layers": 3}
        | {"router_bias": True, "tie_word_embeddings": False, "relative_attention_num_buckets": 16},
    ),
    "longcat_flash": ("longcat_flash", _LONGCAT | {"zero_expert_num": 4}),
    "longcat_flash, no identity experts": (
        "longcat_flash",
        _LONGCAT | {"zero_expert_num": 0, "attention_bias": True, "router_bias": True},
    ),
}


class Sizes(NamedTuple):
    """cache: values per token, over all layers."""

    total: int
    active: int
    expert: int
    cache: int

    @classmethod
    def of(cls, model: Model) -> "Sizes":
        block = model.moe_block()
        assert block.moe is not None
        expert = block.moe.expert_parameters(block.hidden_size)
        return cls(model.total_parameters(), model.active_parameters(), expert, model.cache_values())


class Case(NamedTuple):
    name: str
    ours: Sizes
    theirs: Sizes

    @property
    def equal(self) -> bool:
        return self.ours == self.theirs


def small_cases() -> Iterator[Case]:
    """The small configurations, as Transformers writes and as we read them; their cache by a forward pass."""
    for name, (family, arguments) in SMALL.items():
        yield small_case(name, family, arguments)


def small_case(name: str, family: str, arguments: dict[str, Any]) -> Case:
    config = transformers.AutoConfig.for_model(family, **arguments)
    model = read_config(json.loads(config.to_json_string()), name, name, "")
    theirs = counted(build(config))
    held = cached(config)
    if held != theirs.cache:
        raise AssertionError(f"{name}: the modules say {theirs.cache} values per token, the cache holds {held}")
    return Case(name, Sizes.of(model), theirs)


def published_cases(names: Iterable[str] = tuple(PUBLISHED)) -> Iterator[Case]:
    """The catalogue's configurations, at their full size."""
    for name in names:
        body = PUBLISHED[name][1]
        model = read_config(body, name, name, "")
        plain = {key: value for key, value in body.items() if key not in ("model_type", "quantization_config")}
        config = transformers.AutoConfig.for_model(body["model_type"], **plain)
        yield Case(name, Sizes.of(model), counted(build(config)))


def build(config: transformers.PretrainedConfig, device: str = "meta") -> nn.Module:
    """What Transformers makes of a configuration."""
    auto = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    with torch.device(device):
        return auto.from_config(config, dtype=torch.float32).eval()


def counted(model: nn.Module) -> Sizes:
    """Sizes of the modules themselves."""
    total = sum(p.numel() for p in model.parameters())
    total += sum(b.numel() for name, b in model.named_buffers() if name.endswith(CORRECTION))
    idle, per_expert = 0, 0
    for name, module in model.named_modules():
        if not name.endswith(".experts"):
            continue
        router = next(m for m in model.get_submodule(name.rpartition(".")[0]).children() if m is not module)
        count, zero, per_expert = experts(module)
        total -= zero * sum(p.numel() // len(p) for p in module.parameters() if len(p) > count)
        top_k = getattr(router, "top_k", 1)  # Switch's has one expert per token, without saying so
        idle += count * per_expert - top_k * count * per_expert // (count + zero)
    return Sizes(total, total - idle, per_expert, cache_of(model))


def experts(module: nn.Module) -> tuple[int, int, int]:
    """(real experts, identity experts, parameters of one) of a module of experts."""
    if isinstance(module, nn.ModuleDict):  # one module each (Switch)
        return len(module), 0, sum(p.numel() for p in next(iter(module.values())).parameters())
    tensors = list(module.parameters())  # [experts, ...]
    count, most = min(map(len, tensors)), max(map(len, tensors))
    return count, most - count, sum(p.numel() // len(p) for p in tensors)


def cache_of(model: nn.Module) -> int:
    """Outputs of the projections whose results are cached: keys and values, or the latent ones of both."""
    kept = (
        *("k_proj", "v_proj", "kv_a_proj_with_mqa"),
        *("SelfAttention.k", "SelfAttention.v", "EncDecAttention.k", "EncDecAttention.v"),
    )
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name.endswith(kept)]
    return sum(m.out_features for name, m in linear if not name.startswith("encoder."))


def cached(config: transformers.PretrainedConfig) -> int:
    """Values per token that the cache holds after a forward pass on as many tokens of source and target."""
    model = build(config, "cpu")
    ids = torch.arange(TOKENS)[None]
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if config.is_encoder_decoder else {})
    with torch.no_grad():
        cache = model(**inputs).past_key_values
    halves = [getattr(cache, n) for n in ("self_attention_cache", "cross_attention_cache") if hasattr(cache, n)]
    values = sum(t.numel() for c in halves or [cache] for layer in c.layers for t in (layer.keys, layer.values))
    assert values % TOKENS == 0
    return values // TOKENS


def main() -> None:
    missing = set(READERS) - {family for family, _ in SMALL.values()}
    assert not missing, f"no case for {missing}"
    transformers.logging.set_verbosity_error()
    table = Table("configuration", *(f"{name} ({whose})" for name in Sizes._fields for whose in ("ours", "theirs")), "")
    different = 0
    for cases in (small_cases(), published_cases()):
        for case in cases:
            values = [f"{value:,}" for pair in zip(case.ours, case.theirs, strict=True) for value in pair]
            table.add_row(case.name, *values, "equal" if case.equal else "DIFFERENT")
            different += not case.equal
        table.add_section()
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(table)
    console.print(f"Transformers {transformers.__version__}: {different or 'no'} differences")
    sys.exit(1 if different else 0)


if __name__ == "__main__":
    main()
