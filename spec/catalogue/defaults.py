"""What the configuration classes of Transformers 5.23 give where a field is absent, for the fields that we read.

Not here, and so required: the sizes by which one model differs from another (layers, hidden, heads, vocabulary, FFN
sizes, experts). JSON null is absence too, except where a reader says otherwise. tests/test_catalogue_defaults.py
compares each of these with the classes.
"""

from typing import Any

_COMMON = {"tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 1e4}
_LATENT = {"attention_bias": False, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128}
_LATENT |= {"qk_rope_head_dim": 64, "v_head_dim": 128}
_QWEN = {"rms_norm_eps": 1e-6, "use_sliding_window": False, "sliding_window": 4096, "decoder_sparse_step": 1}
_QWEN |= {"norm_topk_prob": False}

DEFAULTS: dict[str, dict[str, Any]] = {
    "mixtral": _COMMON | {"num_key_value_heads": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "rope_theta": 1e6},
    "qwen2_moe": _COMMON | _QWEN | {"num_key_value_heads": 16, "num_experts_per_tok": 4, "qkv_bias": True},
    "qwen3_moe": _COMMON | _QWEN | {"num_key_value_heads": 4, "num_experts_per_tok": 8, "attention_bias": False},
    "olmoe": _COMMON
    | {"num_experts_per_tok": 8, "rms_norm_eps": 1e-5, "attention_bias": False, "norm_topk_prob": False},
    "gpt_oss": _COMMON
    | {"num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4, "sliding_window": 128}
    | {"rms_norm_eps": 1e-5, "attention_bias": True, "rope_theta": 150e3},
    "deepseek_v2": _COMMON
    | _LATENT
    | {"first_k_dense_replace": 0, "n_shared_experts": 2, "routed_scaling_factor": 1.0, "topk_method": "greedy"}
    | {"norm_topk_prob": False, "rms_norm_eps": 1e-6},
    "deepseek_v3": _COMMON
    | _LATENT
    | {"first_k_dense_replace": 3, "n_shared_experts": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
    | {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "rms_norm_eps": 1e-6},
    "switch_transformers": {"d_kv": 64, "num_decoder_layers": 12, "num_sparse_encoder_layers": 3}
    | {"num_sparse_decoder_layers": 3, "layer_norm_epsilon": 1e-6, "router_bias": False, "dense_act_fn": "relu"}
    | {"relative_attention_num_buckets": 32, "tie_word_embeddings": True},
    "longcat_flash": _COMMON
    | _LATENT
    | {"moe_topk": 12, "zero_expert_num": 256, "routed_scaling_factor": 6.0, "rms_norm_eps": 1e-5, "rope_theta": 1e7}
    | {"router_bias": False},
}
