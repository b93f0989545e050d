"""What a pass through a model has to compute, layer kind by layer kind, from its configuration."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...spec.errors import MoeplanError
from ...spec.model import Model


@dataclass(frozen=True)
class Mixer:
    """What mixes tokens: attention, or a recurrence in its place.

    ``kind``: ``gqa``, ``mla`` (DeepSeek's latent attention), ``dsa`` (the same, sparse) or ``gdn`` (gated delta net).
    """

    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int = 0
    """gdn: of each value head; mla: of each head."""
    window: int = 0
    """Tokens that one token attends to, 0 for all."""
    gated: bool = False
    """The query projection also gives a gate of the same size (Qwen3.5)."""
    full_norm: bool = False
    """Queries and keys are normed over all heads, so that ranks that share the heads exchange sums (MiniMax-M2)."""
    q_rank: int = 0
    kv_rank: int = 0
    rope_dim: int = 0


@dataclass(frozen=True)
class Layers:
    """``count`` layers of one kind. Without ``experts`` the feed-forward network is dense, of ``ffn`` columns."""

    count: int
    mixer: Mixer
    ffn: int
    experts: int = 0
    top_k: int = 0
    shared: int = 0


@dataclass(frozen=True)
class Architecture:
    """A decoder for text."""

    name: str
    hidden: int
    vocab: int
    layers: tuple[Layers, ...]
    experts_format: str = ""
    """``mxfp4`` where the published weights of the experts are."""

    @property
    def depth(self) -> int:
        return sum(layers.count for layers in self.layers)


def of_model(model: Model) -> Architecture:
    """From moeplan's own document. Raises MoeplanError where it does not say what its layers compute."""
    if model.family_config is not None:
        body = model.family_config.body
        if "num_hidden_layers" in body.get("text_config", body):
            return of_config(body, model.name)
    groups: list[Layers] = []
    for block in model.blocks:
        if block.attention is None or block.counted is not None or block.attention.kind == "window":
            raise MoeplanError(f"model {model.name}: its layers are known by size only; give its config.json instead")
        attention = block.attention
        mixer = Mixer(
            "mla" if attention.kind == "mla" else "gqa",
            attention.heads,
            attention.kv_heads,
            attention.head_dim,
            value_dim=attention.v_head_dim or 0,
            window=attention.sliding_window or 0,
            full_norm=attention.qk_norm == "full",
            q_rank=attention.q_lora_rank or 0,
            kv_rank=attention.kv_lora_rank or 0,
            rope_dim=attention.rope_head_dim or 0,
        )
        moe = block.moe
        if moe is not None:
            groups.append(Layers(block.count, mixer, moe.ffn_size, moe.num_experts, moe.top_k, moe.shared_ffn_size))
        elif block.dense is not None:
            groups.append(Layers(block.count, mixer, block.dense.ffn_size))
    stored = model.moe_block().moe.storage  # type: ignore[union-attr]  # a moe_block has moe
    native = "mxfp4" if stored is not None and stored.name == "mxfp4" else ""
    return Architecture(model.name, model.layers[0].hidden_size, model.vocab_size, merged(groups), native)


def of_config(body: Mapping[str, Any], name: str) -> Architecture:
    """From a Hugging Face configuration."""
    text = body.get("text_config", body)
    try:
        return _read(text, name)
    except (KeyError, TypeError) as error:
        raise MoeplanError(f"model {name}: its configuration lacks {error}") from None


def _read(text: Mapping[str, Any], name: str) -> Architecture:
    depth = int(text["num_hidden_layers"])
    experts = _first(text, "n_routed_experts", "num_local_experts", "num_experts")
    expert_ffn = _first(text, "moe_intermediate_size", "intermediate_size")
    top_k = _first(text, "num_experts_per_tok", "experts_per_token")
    shared = int(text.get("shared_expert_intermediate_size") or text.get("shared_intermediate_size") or 0)
    shared = shared or int(text.get("n_shared_experts") or 0) * expert_ffn
    dense_first = int(text.get("first_k_dense_replace") or 0)
    groups = []
    for layer in range(depth):
        mixer = _mixer(text, layer)
        if layer < dense_first:
            groups.append(Layers(1, mixer, int(text["intermediate_size"])))
        else:
            groups.append(Layers(1, mixer, expert_ffn, experts, top_k, shared))
    stored = text.get("quantization_config") or {}
    native = "mxfp4" if stored.get("quant_method") == "mxfp4" else ""
    return Architecture(name, int(text["hidden_size"]), int(text["vocab_size"]), merged(groups), native)


def _mixer(text: Mapping[str, Any], layer: int) -> Mixer:
    kinds = text.get("layer_types")
    kind = kinds[layer] if isinstance(kinds, list) else "full_attention"
    heads = int(text["num_attention_heads"])
    if kind == "linear_attention":
        return Mixer(
            "gdn",
            int(text["linear_num_value_heads"]),
            int(text["linear_num_key_heads"]),
            int(text["linear_key_head_dim"]),
            value_dim=int(text["linear_value_head_dim"]),
        )
    if text.get("kv_lora_rank"):
        return Mixer(
            "dsa" if text.get("index_topk") else "mla",
            heads,
            heads,
            int(text["qk_nope_head_dim"]),
            value_dim=int(text["v_head_dim"]),
            q_rank=int(text.get("q_lora_rank") or 0),
            kv_rank=int(text["kv_lora_rank"]),
            rope_dim=int(text["qk_rope_head_dim"]),
        )
    return Mixer(
        "gqa",
        heads,
        int(text.get("num_key_value_heads") or heads),
        int(text.get("head_dim") or text["hidden_size"] // heads),
        window=int(text.get("sliding_window") or 0) if kind == "sliding_attention" else 0,
        gated=bool(text.get("attn_output_gate")),
        full_norm=bool(text.get("use_qk_norm")) and text.get("qk_norm_type") == "per_layer",
    )


def merged(groups: list[Layers]) -> tuple[Layers, ...]:
    """Layers of one kind counted together: their order does not change the time of a pass."""
    counts: dict[Layers, int] = {}
    for group in groups:
        kind = Layers(1, group.mixer, group.ffn, group.experts, group.top_k, group.shared)
        counts[kind] = counts.get(kind, 0) + group.count
    return tuple(
        Layers(count, kind.mixer, kind.ffn, kind.experts, kind.top_k, kind.shared) for kind, count in counts.items()
    )


def _first(text: Mapping[str, Any], *names: str) -> int:
    for name in names:
        if text.get(name):
            return int(text[name])
    raise KeyError(" or ".join(names))
