"""What the readers share: depth, activation, attention and rotary fields."""

from itertools import groupby
from typing import Any

from ..document import show
from ..model import MAX_LAYERS, Activation, Attention, Block
from .fields import Fields

ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def depth(f: Fields, name: str = "num_hidden_layers") -> int:
    """Number of layers."""
    count = f.integer(name)
    if count > MAX_LAYERS:
        raise f.error(name, f"at most {MAX_LAYERS} layers (got {count})")
    return count


def activation_of(f: Fields) -> Activation:
    return f.choice("hidden_act", among=ACTIVATIONS, default="silu")


def rotary(f: Fields, default: float) -> tuple[float, bool]:
    """Base of the rotary embedding, and whether it is scaled or partial.

    Before Transformers 5 these were ``rope_theta`` and ``rope_scaling``, since then ``rope_parameters`` holds both.
    """
    parameters, scaling = f.table("rope_parameters"), f.table("rope_scaling")
    theta = parameters.number("rope_theta", default=f.number("rope_theta", default=default))
    kinds = [table.body.get(name) for table in (parameters, scaling) for name in ("rope_type", "type")]
    part = parameters.number("partial_rotary_factor", default=f.number("partial_rotary_factor", default=1.0))
    return theta, any(kind not in ("default", None) for kind in kinds) or part != 1.0


def grouped_query(f: Fields, **details: Any) -> Attention:
    """Grouped-query attention; null key/value heads mean as many as heads, no head size means hidden / heads."""
    heads = f.integer("num_attention_heads")
    kv_heads = f.integer("num_key_value_heads", default=heads)
    head_dim = f.integer("head_dim", default=f.integer("hidden_size") // heads)
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **details)


def latent(f: Fields) -> Attention:
    """Multi-head latent attention (DeepSeek, LongCat)."""
    heads = f.integer("num_attention_heads")
    return Attention(
        kind="mla",
        heads=heads,
        kv_heads=heads,
        head_dim=f.integer("qk_nope_head_dim"),
        bias=f.flag("attention_bias", default=False),
        q_lora_rank=f.nullable("q_lora_rank", default=1536),
        kv_lora_rank=f.integer("kv_lora_rank"),
        rope_head_dim=f.integer("qk_rope_head_dim"),
        v_head_dim=f.integer("v_head_dim"),
    )


def windows(f: Fields, window: int | None, kinds: list[str]) -> list[int | None]:
    """Sliding window of each layer from ``layer_types``, or from ``kinds`` where the configuration has none."""
    kinds = f.items("layer_types", str) or kinds
    layers = depth(f)
    if len(kinds) != layers or not set(kinds) <= {"sliding_attention", "full_attention"}:
        rule = f"expected sliding_attention or full_attention for each of {layers} layers"
        raise f.error("layer_types", f"{rule} (got {show(kinds)})")
    return [window if kind == "sliding_attention" else None for kind in kinds]


def merge_runs(layers: list[Block]) -> tuple[Block, ...]:
    """Equal neighbours become one block with a count."""
    runs = [(block, len(list(run))) for block, run in groupby(layers)]
    return tuple(block.model_copy(update={"count": count}) for block, count in runs)
