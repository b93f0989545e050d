"""Configurations of the catalogue in Hugging Face's terms: what the readers need of each published ``config.json``."""

from typing import Any

_FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [128, 128]}
_MXFP4: dict[str, Any] = {"quant_method": "mxfp4"}
_MXFP4 |= {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "lm_head"]}
_MIXTRAL = {
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e6,
    "vocab_size": 32000,
    "torch_dtype": "bfloat16",
}
_OWN = {"model_type": "mixtral", "num_local_experts": 16, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
_OWN |= {"rope_theta": 1e4, "torch_dtype": "float32"}
_QWEN3 = {
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "vocab_size": 151936,
    "torch_dtype": "bfloat16",
}
_GPT_OSS = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_experts_per_tok": 4,
    "sliding_window": 128,
    "rms_norm_eps": 1e-5,
    "rope_theta": 150000,
    "vocab_size": 201088,
    "torch_dtype": "bfloat16",
    "quantization_config": _MXFP4,
}
_LATENT = {
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}
_SWITCH = {
    "model_type": "switch_transformers",
    "d_model": 768,
    "d_kv": 64,
    "d_ff": 3072,
    "num_heads": 12,
    "num_layers": 12,
    "num_decoder_layers": 12,
    "num_sparse_encoder_layers": 6,
    "num_sparse_decoder_layers": 6,
    "layer_norm_epsilon": 1e-6,
    "vocab_size": 32128,
    "torch_dtype": "float32",
}

# name: (source, configuration)
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "huggingface.co/mistralai/Mixtral-8x7B-v0.1 config.json",
        _MIXTRAL
        | {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
        | {"num_local_experts": 8},
    ),
    "mixtral-8x22b": (
        "huggingface.co/mistralai/Mixtral-8x22B-v0.1 config.json",
        _MIXTRAL
        | {"hidden_size": 6144, "intermediate_size": 16384, "num_hidden_layers": 56, "num_attention_heads": 48}
        | {"num_local_experts": 8},
    ),
    "deepseek-v2-lite": (
        "huggingface.co/deepseek-ai/DeepSeek-V2-Lite config.json",
        _LATENT
        | {"model_type": "deepseek_v2", "hidden_size": 2048, "num_hidden_layers": 27, "num_attention_heads": 16}
        | {"intermediate_size": 10944, "moe_intermediate_size": 1408, "first_k_dense_replace": 1, "q_lora_rank": None}
        | {"n_routed_experts": 64, "num_experts_per_tok": 6, "n_shared_experts": 2, "topk_method": "greedy"}
        | {"norm_topk_prob": False, "routed_scaling_factor": 1.0, "scoring_func": "softmax"}
        | {"vocab_size": 102400, "rms_norm_eps": 1e-6, "rope_theta": 10000},
    ),
    "deepseek-v3": (
        "huggingface.co/deepseek-ai/DeepSeek-V3 config.json, without its multi-token-prediction module",
        _LATENT
        | {"model_type": "deepseek_v3", "hidden_size": 7168, "num_hidden_layers": 61, "num_attention_heads": 128}
        | {"intermediate_size": 18432, "moe_intermediate_size": 2048, "first_k_dense_replace": 3, "q_lora_rank": 1536}
        | {"n_routed_experts": 256, "num_experts_per_tok": 8, "n_shared_experts": 1, "topk_method": "noaux_tc"}
        | {"n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5}
        | {"scoring_func": "sigmoid", "vocab_size": 129280, "rms_norm_eps": 1e-6, "rope_theta": 10000}
        | {"quantization_config": _FP8},
    ),
    "qwen3-30b-a3b": (
        "huggingface.co/Qwen/Qwen3-30B-A3B config.json",
        _QWEN3
        | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768},
    ),
    "qwen3-30b-a3b-fp8": (
        "huggingface.co/Qwen/Qwen3-30B-A3B-FP8 config.json",
        _QWEN3
        | {"hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "moe_intermediate_size": 768}
        | {"quantization_config": _FP8},
    ),
    "qwen3-235b-a22b": (
        "huggingface.co/Qwen/Qwen3-235B-A22B config.json",
        _QWEN3
        | {"hidden_size": 4096, "num_hidden_layers": 94, "num_attention_heads": 64, "moe_intermediate_size": 1536},
    ),
    "olmoe": (
        "huggingface.co/allenai/OLMoE-1B-7B-0924 config.json",
        {"model_type": "olmoe", "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 16}
        | {"num_key_value_heads": 16, "intermediate_size": 1024, "num_experts": 64, "num_experts_per_tok": 8}
        | {"norm_topk_prob": False, "clip_qkv": None, "vocab_size": 50304, "rms_norm_eps": 1e-5}
        | {"rope_theta": 10000.0, "torch_dtype": "bfloat16"},
    ),
    "gpt-oss-20b": (
        "huggingface.co/openai/gpt-oss-20b config.json",
        _GPT_OSS | {"num_hidden_layers": 24, "num_local_experts": 32},
    ),
    "gpt-oss-120b": (
        "huggingface.co/openai/gpt-oss-120b config.json",
        _GPT_OSS | {"num_hidden_layers": 36, "num_local_experts": 128},
    ),
    "longcat-flash": (
        "huggingface.co/meituan-longcat/LongCat-Flash-Chat config.json; a layer is two sub-blocks, so 56 layers here",
        _LATENT
        | {"model_type": "longcat_flash", "hidden_size": 6144, "num_layers": 28, "num_attention_heads": 64}
        | {"ffn_hidden_size": 12288, "expert_ffn_hidden_size": 2048, "q_lora_rank": 1536, "n_routed_experts": 512}
        | {"zero_expert_num": 256, "moe_topk": 12, "routed_scaling_factor": 6.0, "vocab_size": 131072}
        | {"rms_norm_eps": 1e-5, "rope_theta": 10000000.0},
    ),
    "tiny-moe": (
        "moeplan's example: byte-level, trained by examples/tiny_moe",
        _OWN
        | {"hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "head_dim": 32, "vocab_size": 256},
    ),
    "lab-moe": (
        "moeplan's benchmark in the emulated cluster",
        _OWN
        | {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 16}
        | {"num_key_value_heads": 4, "head_dim": 64, "vocab_size": 4096},
    ),
}
PUBLISHED |= {
    f"switch-base-{experts}": (
        f"huggingface.co/google/switch-base-{experts} config.json (arXiv 2101.03961)",
        _SWITCH | {"num_experts": experts},
    )
    for experts in (8, 16, 32, 64, 128, 256)
}
