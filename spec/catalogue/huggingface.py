"""Readers of Hugging Face configurations, one small function per ``model_type``.

A reader returns one block per layer. Absent fields have the values of Transformers' configuration classes
(``defaults``); where a field has been renamed over time both names are read. How the weights are stored is read from
``quantization_config`` (``stored``). Multi-token-prediction modules are left out, as Transformers does.
"""

from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ValidationError

from ..document import describe, show
from ..errors import DocumentError
from ..model import Activation, Attention, Block, Dense, DType, Gate, Model, Moe
from .defaults import DEFAULTS
from .fields import Fields
from .shared import activation_of, depth, grouped_query, latent, layer_types, merge_runs, rotary_by_layer, windows
from .stored import read_storage

DTYPES: dict[str, DType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
DTYPES |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
# Families that the runtime computes exactly: for them nothing that changes the result may be dropped in silence.
EXECUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def read_config(
    body: dict[str, Any], where: str, name: str, source: str, hf_quant_config: Mapping[str, Any] | None = None
) -> Model:
    """A Model from the content of a ``config.json``; ``where`` names it in errors.

    hf_quant_config: content of modelopt's file of this name beside it. A configuration without a dtype computes in f32,
    as Transformers builds it.
    """
    family = body.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        raise DocumentError(f"{where}: model_type: expected one of {', '.join(READERS)} (got {show(family)})")
    f = Fields(body, where, DEFAULTS[family])
    encoder = family == "switch_transformers"
    theta = None
    try:
        layers = READERS[family](f)
        if not any(block.moe for block in layers):
            raise DocumentError(
                f"{where}: none of its {len(layers)} layers has experts: a mixture-of-experts model needs at least one "
                "block with moe"
            )
        if not encoder:
            layers, theta, scaled = rotary_by_layer(f, layers, _kinds(f, family))
            if scaled and family in EXECUTED:
                raise f.error("rope_scaling", "scaled or partial rotary embeddings are not supported; remove the field")
        tied = f.flag("tie_word_embeddings")
        layers, head = read_storage(body, where, family, layers, hf_quant_config)
        return Model(
            name=name,
            family=family,
            source=source,
            vocab_size=f.integer("vocab_size"),
            blocks=merge_runs(layers),
            norm_eps=f.number("layer_norm_epsilon" if encoder else "rms_norm_eps"),
            rope_theta=theta,
            tie_embeddings=tied,
            causal=not encoder,
            dtype=f.choice("dtype", "torch_dtype", among=DTYPES, default="float32"),
            head_storage=None if tied else head,
        )
    except ValidationError as error:
        raise DocumentError(f"{where}: {describe(error)}") from None


def _kinds(f: Fields, family: str) -> list[str]:
    """Type of each layer; empty where the family's configuration has none."""
    if family == "gpt_oss":
        return layer_types(f, alternating(f))
    return layer_types(f, ["full_attention"] * depth(f)) if family == "qwen2_moe" else []


def alternating(f: Fields) -> list[str]:
    return [("sliding_attention", "full_attention")[i % 2] for i in range(depth(f))]


def mixtral(f: Fields) -> list[Block]:
    moe = Moe(
        num_experts=f.integer("num_local_experts", "num_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=f.integer("intermediate_size"),
        activation=activation_of(f),
    )
    attention = grouped_query(f, sliding_window=f.integer("sliding_window", default=None))
    return [Block(hidden_size=f.integer("hidden_size"), attention=attention, moe=moe)] * depth(f)


def qwen2_moe(f: Fields) -> list[Block]:
    layers, bias = depth(f), f.flag("qkv_bias")
    sliding: list[int | None] = [None] * layers
    if f.flag("use_sliding_window"):  # the rule for a missing layer_types changed over time: no default
        sliding = windows(f.nullable("sliding_window"), layer_types(f, []))
    attention = [grouped_query(f, bias=bias, output_bias=False, sliding_window=window) for window in sliding]
    shared = f.integer("shared_expert_intermediate_size")
    return qwen_layers(f, attention, shared_ffn_size=shared, shared_gate=True)


def qwen3_moe(f: Fields) -> list[Block]:
    slides = f.flag("use_sliding_window")
    attention = grouped_query(
        f,
        bias=f.flag("attention_bias"),
        qk_norm="head",
        sliding_window=f.nullable("sliding_window") if slides else None,
    )
    return qwen_layers(f, [attention] * depth(f))


def qwen_layers(f: Fields, attention: list[Attention], **shared: Any) -> list[Block]:
    """Experts in every ``decoder_sparse_step``-th layer, but for those listed in ``mlp_only_layers``."""
    hidden, step = f.integer("hidden_size"), f.integer("decoder_sparse_step")
    dense_only = set(f.items("mlp_only_layers", int))
    moe = Moe(
        num_experts=f.integer("num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=f.integer("moe_intermediate_size"),
        activation=activation_of(f),
        gate=Gate(normalize=f.flag("norm_topk_prob")),
        **shared,
    )
    blocks = []
    for i, a in enumerate(attention):
        if i not in dense_only and (i + 1) % step == 0:
            blocks.append(Block(hidden_size=hidden, attention=a, moe=moe))
        else:
            dense = Dense(ffn_size=f.integer("intermediate_size"), activation=activation_of(f))
            blocks.append(Block(hidden_size=hidden, attention=a, dense=dense))
    return blocks


def olmoe(f: Fields) -> list[Block]:
    attention = grouped_query(
        f, bias=f.flag("attention_bias"), qk_norm="full", clip_qkv=f.number("clip_qkv", default=None)
    )
    moe = Moe(
        num_experts=f.integer("num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=f.integer("intermediate_size"),
        activation=activation_of(f),
        gate=Gate(normalize=f.flag("norm_topk_prob")),
    )
    return [Block(hidden_size=f.integer("hidden_size"), attention=attention, moe=moe)] * depth(f)


def gpt_oss(f: Fields) -> list[Block]:
    """Sliding and full attention alternate, the first layer slides, unless ``layer_types`` says otherwise."""
    f.refuse("swiglu_limit", unless=7.0, why="only the published clamp of 7.0 is supported")
    f.refuse("swiglu_alpha", unless=1.702, why="only the published gain of 1.702 is supported")
    hidden, bias = f.integer("hidden_size"), f.flag("attention_bias")
    moe = Moe(
        num_experts=f.integer("num_local_experts", "num_experts"),
        top_k=f.integer("num_experts_per_tok", "experts_per_token"),
        ffn_size=f.integer("intermediate_size"),
        activation="swiglu_clamped",
        bias=True,
        gate=Gate(score="softmax_topk", bias=True),
    )
    return [
        Block(hidden_size=hidden, attention=grouped_query(f, bias=bias, sinks=True, sliding_window=window), moe=moe)
        for window in windows(f.nullable("sliding_window"), layer_types(f, alternating(f)))
    ]


def deepseek_v2(f: Fields) -> list[Block]:
    f.refuse("scoring_func", unless="softmax", why="DeepSeek-V2 scores by softmax")
    f.refuse("mlp_bias", unless=False, why="biases in the FFN are not supported")
    limited = f.choice("topk_method", among={"greedy": False, "group_limited_greedy": True})
    gate = Gate(
        normalize=f.flag("norm_topk_prob"),
        scale=f.number("routed_scaling_factor"),
        groups=f.integer("n_group") if limited else 1,
        top_groups=f.integer("topk_group") if limited else 1,
    )
    return deepseek_layers(f, gate)


def deepseek_v3(f: Fields) -> list[Block]:
    f.refuse("scoring_func", unless="sigmoid", why="DeepSeek-V3 scores by sigmoid")
    f.refuse("topk_method", unless="noaux_tc", why="DeepSeek-V3 chooses by noaux_tc")
    gate = Gate(
        score="sigmoid",
        normalize=f.flag("norm_topk_prob"),
        scale=f.number("routed_scaling_factor"),
        correction_bias=True,
        groups=f.integer("n_group"),
        top_groups=f.integer("topk_group"),
    )
    return deepseek_layers(f, gate)


def deepseek_layers(f: Fields, gate: Gate) -> list[Block]:
    """The first layers are dense; of the others every ``moe_layer_freq``-th has experts."""
    hidden, ffn, attention = f.integer("hidden_size"), f.integer("moe_intermediate_size"), latent(f)
    first, every = f.integer("first_k_dense_replace", low=0), f.integer("moe_layer_freq", default=1)
    moe = Moe(
        num_experts=f.integer("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=ffn,
        activation=activation_of(f),
        shared_ffn_size=ffn * (f.nullable("n_shared_experts", low=0) or 0),
        gate=gate,
    )
    dense = Dense(ffn_size=f.integer("intermediate_size"), activation=activation_of(f))
    return [
        Block(hidden_size=hidden, attention=attention, moe=moe)
        if i >= first and i % every == 0
        else Block(hidden_size=hidden, attention=attention, dense=dense)
        for i in range(depth(f))
    ]


def switch_transformers(f: Fields) -> list[Block]:
    """The encoder's layers, then the decoder's with cross-attention; experts in every ``step``-th layer of a stack."""
    hidden, heads, ffn = f.integer("d_model"), f.integer("num_heads"), f.integer("d_ff")
    known: dict[str, Activation] = {"relu": "relu", "gelu": "gelu"}
    activation = f.choice("dense_act_fn", among=known)
    gate = Gate(normalize=False, bias=f.flag("router_bias"))
    experts = f.integer("num_experts")
    moe = Moe(num_experts=experts, top_k=1, ffn_size=ffn, gated=False, activation=activation, gate=gate)
    dense = Dense(ffn_size=ffn, gated=False, activation=activation)
    blocks = []
    for stack, layers_field in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        symmetric = f.body.get(layers_field, 0) is None and stack == "decoder"  # null, which is not absence
        layers = depth(f, "num_layers" if symmetric else layers_field)
        sparse = f.integer(f"num_sparse_{stack}_layers", low=0)
        # What the class derives is overwritten by what a configuration says.
        step = f.integer(f"{stack}_sparse_step", default=layers // sparse if sparse else layers, low=0)
        plain = Attention(heads=heads, kv_heads=heads, head_dim=f.integer("d_kv"), cross=stack == "decoder")
        first = plain.model_copy(update={"position_buckets": f.integer("relative_attention_num_buckets")})
        for i in range(layers):
            attention = plain if i else first
            if step == 1 or (step > 1 and i % step == 1):
                blocks.append(Block(hidden_size=hidden, attention=attention, moe=moe))
            else:
                blocks.append(Block(hidden_size=hidden, attention=attention, dense=dense))
    return blocks


def longcat_flash(f: Fields) -> list[Block]:
    """A layer is two sub-blocks, each with attention and a dense FFN; the experts run beside the second.

    They read the state after the first attention (shortcut ``mid``) and join after the second FFN.
    """
    f.refuse("zero_expert_type", unless="identity", why="only identity experts are supported")
    f.refuse("norm_topk_prob", unless=False, why="LongCat-Flash does not normalise its gate weights")
    gate = Gate(
        normalize=False,
        scale=f.number("routed_scaling_factor"),
        bias=f.flag("router_bias"),
        correction_bias=True,
    )
    moe = Moe(
        num_experts=f.integer("n_routed_experts"),
        top_k=f.integer("moe_topk", "num_experts_per_tok"),
        ffn_size=f.integer("expert_ffn_hidden_size", "moe_intermediate_size"),
        activation=activation_of(f),
        zero_experts=f.nullable("zero_expert_num", low=0) or 0,
        gate=gate,
    )
    dense = Dense(ffn_size=f.integer("ffn_hidden_size", "intermediate_size"), activation=activation_of(f))
    first = Block(hidden_size=f.integer("hidden_size"), attention=latent(f), dense=dense)
    second = first.model_copy(update={"moe": moe, "shortcut": "mid"})
    return [first, second] * depth(f, "num_layers")


READERS: dict[str, Callable[[Fields], list[Block]]] = {
    "mixtral": mixtral,
    "qwen2_moe": qwen2_moe,
    "qwen3_moe": qwen3_moe,
    "olmoe": olmoe,
    "gpt_oss": gpt_oss,
    "deepseek_v2": deepseek_v2,
    "deepseek_v3": deepseek_v3,
    "switch_transformers": switch_transformers,
    "longcat_flash": longcat_flash,
}
