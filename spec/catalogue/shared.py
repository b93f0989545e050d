"""What the readers share: depth, activation, attention and rotary fields."""

from itertools import groupby
from typing import Any

from ..document import show
from ..model import MAX_LAYERS, Activation, Attention, Block
from .fields import Fields

LAYER_TYPES = {"full_attention", "sliding_attention"}
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}


def depth(f: Fields, name: str = "num_hidden_layers") -> int:
    """Number of layers."""
    count = f.integer(name)
    if count > MAX_LAYERS:
        raise f.error(name, f"at most {MAX_LAYERS:,} layers (got {count:,})")
    return count


def activation_of(f: Fields) -> Activation:
    return f.choice("hidden_act", among=ACTIVATIONS)


def rotary(f: Fields) -> tuple[dict[str, float], bool]:
    """Base of the rotary embedding by layer type ("" for all), and whether any is scaled or partial.

    Before Transformers 5 these were ``rope_theta`` and ``rope_scaling``, since then ``rope_parameters`` holds both, for
    all layers or for each layer type by itself. As there, ``rope_scaling`` replaces ``rope_parameters``, and what they
    do not say is read beside them.
    """
    name = "rope_scaling" if f.body.get("rope_scaling") else "rope_parameters"
    whole = f.table(name)
    nested = [kind for kind, value in whole.body.items() if kind in LAYER_TYPES or isinstance(value, dict)]
    if nested and not set(nested) <= LAYER_TYPES:
        raise f.error(name, f"expected the layer types {', '.join(sorted(LAYER_TYPES))} (got {show(nested)})")
    tables = {kind: whole.table(kind) for kind in nested} or {"": whole}
    theta = f.number("rope_theta")
    bases, scaled = {}, False
    for kind, table in tables.items():
        if kind and table.body == {}:
            raise whole.error(kind, "layers without a rotary embedding are not supported")
        bases[kind] = table.number("rope_theta", default=theta)
        types = [table.body.get(field) for field in ("rope_type", "type")]
        part = table.number("partial_rotary_factor", default=f.number("partial_rotary_factor", default=1.0))
        scaled = scaled or any(given not in ("default", None) for given in types) or part != 1.0
    return bases, scaled


def rotary_by_layer(f: Fields, layers: list[Block], kinds: list[str]) -> tuple[list[Block], float, bool]:
    """The layers, each with its own base where it differs from the first one's; that base; whether any is scaled.

    kinds: the layers' types; empty for a family whose configuration has none.
    """
    bases, scaled = rotary(f)
    if "" in bases:
        return layers, bases[""], scaled
    if not kinds:
        why = f"by layer type ({', '.join(bases)}), which Transformers ignores for a family without layer types"
        raise f.error("rope_parameters", why)
    missing = set(kinds) - set(bases)
    if missing:
        raise f.error("rope_parameters", f"nothing for the {', '.join(sorted(missing))} layers")
    first = bases[kinds[0]]
    found = []
    for kind, block in zip(kinds, layers, strict=True):
        own = {"rope_theta": None if bases[kind] == first else bases[kind]}
        attention = block.attention and block.attention.model_copy(update=own)
        found.append(block.model_copy(update={"attention": attention}))
    return found, first, scaled


def grouped_query(f: Fields, **details: Any) -> Attention:
    """Grouped-query attention; null key/value heads mean as many as heads, null head size means hidden / heads.

    Absent they are what the family's configuration class says, or else the same.
    """
    heads = f.integer("num_attention_heads")
    size = f.integer("hidden_size") // heads
    own = {"num_key_value_heads": heads, "head_dim": size}
    kv_heads, head_dim = (
        f.integer(name, default=same if name in f.body else f.defaults.get(name, same)) for name, same in own.items()
    )
    return Attention(heads=heads, kv_heads=kv_heads, head_dim=head_dim, **details)


def latent(f: Fields) -> Attention:
    """Multi-head latent attention (DeepSeek, LongCat).

    Some DeepSeek-V2 checkpoints have plain attention: they say so by ``use_mla``, or by heads of size 0 (vLLM's rule).
    """
    heads = f.integer("num_attention_heads")
    plain = all(f.body.get(name) == 0 for name in ("qk_nope_head_dim", "qk_rope_head_dim"))
    if plain or not f.flag("use_mla", default=True):
        return Attention(
            heads=heads,
            kv_heads=f.integer("num_key_value_heads", default=heads),
            head_dim=f.integer("hidden_size") // heads,  # whatever head_dim says, which is MLA's
            bias=f.flag("attention_bias"),
        )
    return Attention(
        kind="mla",
        heads=heads,
        kv_heads=heads,
        head_dim=f.integer("qk_nope_head_dim"),
        bias=f.flag("attention_bias"),
        q_lora_rank=f.nullable("q_lora_rank"),
        kv_lora_rank=f.integer("kv_lora_rank"),
        rope_head_dim=f.integer("qk_rope_head_dim"),
        v_head_dim=f.integer("v_head_dim"),
    )


def layer_types(f: Fields, default: list[str]) -> list[str]:
    """``layer_types``, or ``default`` where the configuration has none."""
    kinds = f.items("layer_types", str) or default
    layers = depth(f)
    if len(kinds) != layers or not set(kinds) <= LAYER_TYPES:
        rule = f"expected sliding_attention or full_attention for each of {layers} layers"
        raise f.error("layer_types", f"{rule} (got {show(kinds)})")
    return kinds


def windows(window: int | None, kinds: list[str]) -> list[int | None]:
    """Sliding window of each layer."""
    return [window if kind == "sliding_attention" else None for kind in kinds]


def merge_runs(layers: list[Block]) -> tuple[Block, ...]:
    """Equal neighbours become one block with a count."""
    runs = [(block, len(list(run))) for block, run in groupby(layers)]
    return tuple(block.model_copy(update={"count": count}) for block, count in runs)
