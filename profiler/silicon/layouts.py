"""The layout of every kind of file: which operator it is, what its columns are called here, and in which unit it is.

Layout of aiconfigurator-core 0.12.0 (736 files of 48 kinds) and of the collections that keep it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

# Columns as files name them -> as tables name them. What is not here keeps its name.
NAMES: Mapping[str, str] = {
    "kernel_source": "kernel",
    "num_tokens": "tokens",
    "num_token": "tokens",
    "hidden_size": "hidden",
    "inter_size": "ffn",
    "intermediate_size": "ffn",
    "topk": "top_k",
    "num_topk": "top_k",
    "num_experts": "experts",
    "num_slots": "slots",
    "moe_tp_size": "tp",
    "tp_size": "tp",
    "moe_ep_size": "ep",
    "ep_size": "ep",
    "distribution": "routing",
    "num_gpus": "gpus",
    "node_num": "nodes",
    "message_size": "bytes",
    "batch_size": "batch",
    "isl": "new_tokens",
    "seq_len": "new_tokens",
    "step": "past_tokens",
    "num_heads": "heads",
    "nheads": "heads",
    "num_key_value_heads": "kv_heads",
    "window_size": "window",
    "kv_cache_dtype": "kv_dtype",
    "gemm_type": "gemm_dtype",
    "model_name": "model",
    "comm_backend": "backend",
    "implementation": "backend",
}
TEXTS = frozenset(
    {"kernel", "dtype", "kv_dtype", "gemm_dtype", "routing", "phase", "collective", "backend", "model", "part"}
    | {"architecture", "score_mode", "source_policy", "buffer_policy"}
)


@dataclass(frozen=True)
class Layout:
    """One kind of file.

    ``columns``: what it must have, as tables name it: those in ``TEXTS`` are texts, all others whole numbers.
    ``own``: columns with a name of their own here, beside ``NAMES``. ``optional``: columns that some files lack, and
    what stands for them. ``constant``: columns that the file never has. ``axes``: the columns along which a curve
    runs; all others but ``kernel`` name it. ``seconds``: columns whose sum is the time, and their unit in seconds.
    ``differences``: times are differences of two, and may be zero or negative.
    """

    file: str
    operator: str
    columns: tuple[str, ...]
    axes: tuple[str, ...] = ("tokens",)
    own: Mapping[str, str] = field(default_factory=dict)
    optional: Mapping[str, int | str] = field(default_factory=dict)
    constant: Mapping[str, int | str] = field(default_factory=dict)
    seconds: tuple[str, ...] = ("latency",)
    unit: float = 1e-3
    differences: bool = False


_MOE = ("dtype", "tokens", "hidden", "ffn", "top_k", "experts", "tp", "ep", "routing")
_SEQUENCES = ("batch", "new_tokens", "past_tokens")
_MODULE = ("dtype", "kv_dtype", "gemm_dtype", "heads", "tp", *_SEQUENCES)
_LINEAR = ("phase", "batch", "new_tokens", "tokens", "d_model", "d_conv", "model")
_DELTA = (*_LINEAR, "num_k_heads", "head_k_dim", "num_v_heads", "head_v_dim")
_DEEPEP = ("nodes", "hidden", "top_k", "experts", "tokens")
_US = 1e-6


def _attention(file: str, operator: str) -> Layout:
    columns = ("dtype", "kv_dtype", "heads", "kv_heads", "head_dim", *_SEQUENCES)
    return Layout(file, operator, columns, _SEQUENCES, own={"attn_dtype": "dtype"}, optional={"window": 0})


def _module(file: str, operator: str, *more: str, differences: bool = False) -> Layout:
    """A whole attention of the DeepSeek kind, projections included where the name says module."""
    columns = (*_MODULE, *more)
    optional: dict[str, int | str] = {"model": "", "gemm_dtype": ""}
    columns = tuple(name for name in columns if name not in optional)
    own = {"mla_dtype": "dtype", **({"op_name": "part"} if "part" in more else {})}
    return Layout(file, operator, columns, _SEQUENCES, own=own, optional=optional, differences=differences)


def _deepep(file: str, phase: str, backend: str, dtype: str, times: tuple[str, ...], sms: str) -> Layout:
    """Half a file of DeepEP's own benchmark, which has both directions in a row; its dtypes are DeepEP's defaults."""
    return Layout(
        file,
        "moe_alltoall",
        (*_DEEPEP, *(("sms",) if sms else ())),
        own={sms: "sms"} if sms else {},
        constant={"phase": phase, "backend": backend, "dtype": dtype, **({} if sms else {"sms": 0})},
        seconds=times,
        unit=_US,
    )


LAYOUTS: tuple[Layout, ...] = (
    Layout("gemm", "gemm", ("dtype", "m", "n", "k"), ("m",), own={"gemm_dtype": "dtype"}),
    Layout("moe", "moe", _MOE, own={"moe_dtype": "dtype"}),
    Layout(
        "wideep_moe",
        "moe_wideep",
        (*_MOE, "slots", "dp_num_tokens", "rank0_num_tokens"),
        ("tokens", "dp_num_tokens", "rank0_num_tokens"),
        own={"moe_dtype": "dtype"},
        constant={"phase": "any"},
    ),
    Layout("wideep_context_moe", "moe_wideep", _MOE, own={"moe_dtype": "dtype"}, constant={"phase": "context"}),
    Layout("wideep_generation_moe", "moe_wideep", _MOE, own={"moe_dtype": "dtype"}, constant={"phase": "generation"}),
    Layout(
        "dsv4_megamoe_module",
        "moe_mega",
        (*_MOE, "phase", "global_num_tokens", "source_policy", "buffer_policy"),
        ("tokens", "global_num_tokens"),
        own={"moe_dtype": "dtype"},
    ),
    Layout(
        "wideep_context_mlp",
        "mlp_wideep",
        ("dtype", "tokens", "hidden", "ffn"),
        own={"quant_type": "dtype"},
        constant={"phase": "context"},
        seconds=("avg_ms",),
    ),
    Layout(
        "wideep_generation_mlp",
        "mlp_wideep",
        ("dtype", "tokens", "hidden", "ffn"),
        own={"quant_type": "dtype"},
        constant={"phase": "generation"},
        seconds=("avg_ms",),
    ),
    _attention("context_attention", "context_attention"),
    _attention("generation_attention", "generation_attention"),
    Layout(
        "encoder_attention",
        "encoder_attention",
        ("dtype", "heads", "head_dim", "batch", "new_tokens"),
        ("batch", "new_tokens"),
        own={"attn_dtype": "dtype"},
    ),
    _module("context_mla", "context_mla"),
    _module("generation_mla", "generation_mla"),
    _module("wideep_context_mla", "context_mla_wideep"),
    _module("wideep_generation_mla", "generation_mla_wideep"),
    _module("mla_context_module", "context_mla_module"),
    _module("mla_generation_module", "generation_mla_module"),
    Layout("mla_bmm", "mla_bmm", ("dtype", "tokens", "heads", "part"), own={"bmm_dtype": "dtype", "op_name": "part"}),
    _module("msa_context_module", "context_msa_module"),
    _module("msa_generation_module", "generation_msa_module"),
    _module("dsa_context_module", "context_dsa_module", "part"),
    _module("dsa_generation_module", "generation_dsa_module", "part"),
    _module("dsv4_csa_context_module", "context_csa_module", "compress_ratio"),
    _module("dsv4_csa_generation_module", "generation_csa_module", "compress_ratio"),
    _module("dsv4_hca_context_module", "context_hca_module", "compress_ratio"),
    _module("dsv4_hca_generation_module", "generation_hca_module", "compress_ratio"),
    _module("dsv4_csa_topk_calib", "csa_topk_calibration", "compress_ratio", "score_mode", differences=True),
    _module("dsv4_hca_attn_module", "hca_attention", "compress_ratio"),
    _module("dsv4_paged_mqa_logits_module", "csa_indexer_logits", "compress_ratio"),
    _module("glm5_dsa_attn_module", "dsa_attention", "compress_ratio"),
    _module("glm5_mqa_logits_module", "dsa_indexer_logits", "compress_ratio"),
    _module("glm5_topk_module", "dsa_topk", "compress_ratio", "score_mode", differences=True),
    Layout("gdn", "gated_delta", _DELTA, ("batch", "new_tokens", "tokens")),
    Layout("kda", "kimi_delta", _DELTA, ("batch", "new_tokens", "tokens")),
    Layout(
        "mamba2",
        "mamba2",
        (*_LINEAR, "d_state", "heads", "head_dim", "n_groups", "chunk_size"),
        ("batch", "new_tokens", "tokens"),
    ),
    Layout(
        "mhc_module",
        "hyper_connection",
        ("architecture", "tokens", "num_sites", "hc_mult", "hidden", "sinkhorn_iters", "part"),
        own={"op_name": "part"},
    ),
    Layout(
        "computescale", "quantize_scale", ("dtype", "m", "k"), ("m",), own={"quant_dtype": "dtype"}, differences=True
    ),
    Layout("scale_matrix", "quantize", ("dtype", "m", "k"), ("m",), own={"quant_dtype": "dtype"}),
    Layout(
        "custom_allreduce",
        "all_reduce",
        ("dtype", "gpus", "bytes"),
        ("bytes",),
        own={"allreduce_dtype": "dtype"},
        optional={"backend": ""},
    ),
    Layout(
        "nccl",
        "nccl",
        ("dtype", "gpus", "bytes", "collective"),
        ("bytes",),
        own={"nccl_dtype": "dtype", "op_name": "collective"},
    ),
    Layout(
        "oneccl",
        "oneccl",
        ("dtype", "gpus", "bytes", "collective"),
        ("bytes",),
        own={"nccl_dtype": "dtype", "op_name": "collective"},
    ),
    Layout(
        "moe_a2a",
        "moe_alltoall",
        ("backend", "phase", "dtype", "ep", "nodes", "hidden", "top_k", "experts", "tokens", "sms"),
        own={"comm_dtype": "dtype"},
        seconds=("transmit_us", "notify_us"),
        unit=_US,
    ),
    Layout(
        "trtllm_alltoall",
        "moe_alltoall",
        ("phase", "dtype", "ep", "hidden", "top_k", "experts", "tokens", "routing"),
        own={"moe_dtype": "dtype", "op_name": "phase"},
        constant={"backend": "trtllm_alltoall"},
    ),
    _deepep("wideep_deepep_ll", "dispatch", "deepep_ll", "fp8", ("dispatch_avg_t_us",), ""),
    _deepep("wideep_deepep_ll", "combine", "deepep_ll", "bfloat16", ("combine_avg_t_us",), ""),
    _deepep(
        "wideep_deepep_normal",
        "dispatch",
        "deepep_ht",
        "fp8",
        ("dispatch_transmit_us", "dispatch_notify_us"),
        "dispatch_sms",
    ),
    _deepep(
        "wideep_deepep_normal",
        "combine",
        "deepep_ht",
        "bfloat16",
        ("combine_transmit_us", "combine_notify_us"),
        "combine_sms",
    ),
)
