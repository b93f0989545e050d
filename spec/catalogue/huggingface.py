"""Readers of Hugging Face configurations, one small function per ``model_type``.

A reader returns one block per layer. Defaults are those of the Transformers configuration classes, and only for fields
that published configurations leave out; where a field has been renamed over time both names are read. Quantised
checkpoints (fp8, mxfp4) are described in the dtype that the configuration names: the Model document knows no quantised
weights. Multi-token-prediction modules are left out, as Transformers does.
"""

from collections.abc import Callable
from typing import Any

from pydantic import ValidationError

from ..document import describe, show
from ..errors import DocumentError
from ..model import Activation, Attention, Block, Dense, DType, Gate, Model, Moe
from .fields import Fields
from .shared import activation_of, depth, grouped_query, latent, merge_runs, rotary, windows

DTYPES: dict[str, DType] = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}
DTYPES |= {f"torch.{name}": dtype for name, dtype in DTYPES.items()}
ROPE_THETA = {"mixtral": 1e6, "gpt_oss": 150e3, "longcat_flash": 1e7}
# Families that the runtime computes exactly: for them nothing that changes the result may be dropped in silence.
EXECUTED = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe")


def read_config(body: dict[str, Any], where: str, name: str, source: str) -> Model:
    """A Model from the content of a ``config.json``; ``where`` names it in errors."""
    f = Fields(body, where)
    family = body.get("model_type")
    if not isinstance(family, str) or family not in READERS:
        raise f.error("model_type", f"expected one of {', '.join(READERS)} (got {show(family)})")
    try:
        layers = READERS[family](f)
        theta, scaled = rotary(f, default=ROPE_THETA.get(family, 1e4))
        if scaled and family in EXECUTED:
            raise f.error("rope_scaling", "scaled or partial rotary embeddings are not supported; remove the field")
        encoder = family == "switch_transformers"
        return Model(
            name=name,
            family=family,
            source=source,
            vocab_size=f.integer("vocab_size"),
            blocks=merge_runs(layers),
            norm_eps=f.number("layer_norm_epsilon" if encoder else "rms_norm_eps"),
            rope_theta=None if encoder else theta,
            tie_embeddings=f.flag("tie_word_embeddings", default=encoder),
            causal=not encoder,
            dtype=f.choice("dtype", "torch_dtype", among=DTYPES, default="bf16"),
        )
    except ValidationError as error:
        raise DocumentError(f"{where}: {describe(error)}") from None


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
    layers, bias = depth(f), f.flag("qkv_bias", default=True)
    sliding: list[int | None] = [None] * layers
    if f.flag("use_sliding_window", default=False):  # the rule for a missing layer_types changed over time: no default
        sliding = windows(f, f.nullable("sliding_window", default=4096), kinds=[])
    attention = [grouped_query(f, bias=bias, output_bias=False, sliding_window=window) for window in sliding]
    shared = f.integer("shared_expert_intermediate_size")
    return qwen_layers(f, attention, shared_ffn_size=shared, shared_gate=True)


def qwen3_moe(f: Fields) -> list[Block]:
    slides = f.flag("use_sliding_window", default=False)
    attention = grouped_query(
        f,
        bias=f.flag("attention_bias", default=False),
        qk_norm="head",
        sliding_window=f.nullable("sliding_window", default=4096) if slides else None,
    )
    return qwen_layers(f, [attention] * depth(f))


def qwen_layers(f: Fields, attention: list[Attention], **shared: Any) -> list[Block]:
    """Experts in every ``decoder_sparse_step``-th layer, but for those listed in ``mlp_only_layers``."""
    hidden, step = f.integer("hidden_size"), f.integer("decoder_sparse_step", default=1)
    dense_only = set(f.items("mlp_only_layers", int))
    moe = Moe(
        num_experts=f.integer("num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=f.integer("moe_intermediate_size"),
        activation=activation_of(f),
        gate=Gate(normalize=f.flag("norm_topk_prob", default=False)),
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
        f, bias=f.flag("attention_bias", default=False), qk_norm="full", clip_qkv=f.number("clip_qkv", default=None)
    )
    moe = Moe(
        num_experts=f.integer("num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=f.integer("intermediate_size"),
        activation=activation_of(f),
        gate=Gate(normalize=f.flag("norm_topk_prob", default=False)),
    )
    return [Block(hidden_size=f.integer("hidden_size"), attention=attention, moe=moe)] * depth(f)


def gpt_oss(f: Fields) -> list[Block]:
    """Sliding and full attention alternate, the first layer slides, unless ``layer_types`` says otherwise."""
    f.refuse("swiglu_limit", unless=7.0, why="only the published clamp of 7.0 is supported")
    f.refuse("swiglu_alpha", unless=1.702, why="only the published gain of 1.702 is supported")
    hidden, bias = f.integer("hidden_size"), f.flag("attention_bias", default=True)
    moe = Moe(
        num_experts=f.integer("num_local_experts", "num_experts"),
        top_k=f.integer("num_experts_per_tok", "experts_per_token"),
        ffn_size=f.integer("intermediate_size"),
        activation="swiglu_clamped",
        bias=True,
        gate=Gate(score="softmax_topk", bias=True),
    )
    kinds = [("sliding_attention", "full_attention")[i % 2] for i in range(depth(f))]
    return [
        Block(hidden_size=hidden, attention=grouped_query(f, bias=bias, sinks=True, sliding_window=window), moe=moe)
        for window in windows(f, f.nullable("sliding_window", default=128), kinds)
    ]


def deepseek_v2(f: Fields) -> list[Block]:
    f.refuse("scoring_func", unless="softmax", why="DeepSeek-V2 scores by softmax")
    f.refuse("mlp_bias", unless=False, why="biases in the FFN are not supported")
    limited = f.choice("topk_method", among={"greedy": False, "group_limited_greedy": True}, default=False)
    gate = Gate(
        normalize=f.flag("norm_topk_prob", default=False),
        scale=f.number("routed_scaling_factor", default=1.0),
        groups=f.integer("n_group") if limited else 1,
        top_groups=f.integer("topk_group") if limited else 1,
    )
    return deepseek_layers(f, gate, shared=2)


def deepseek_v3(f: Fields) -> list[Block]:
    f.refuse("scoring_func", unless="sigmoid", why="DeepSeek-V3 scores by sigmoid")
    f.refuse("topk_method", unless="noaux_tc", why="DeepSeek-V3 chooses by noaux_tc")
    gate = Gate(
        score="sigmoid",
        normalize=f.flag("norm_topk_prob", default=True),
        scale=f.number("routed_scaling_factor", default=2.5),
        correction_bias=True,
        groups=f.integer("n_group"),
        top_groups=f.integer("topk_group"),
    )
    return deepseek_layers(f, gate, shared=1)


def deepseek_layers(f: Fields, gate: Gate, shared: int) -> list[Block]:
    """The first layers are dense; of the others every ``moe_layer_freq``-th has experts."""
    hidden, ffn, attention = f.integer("hidden_size"), f.integer("moe_intermediate_size"), latent(f)
    first, every = f.integer("first_k_dense_replace", low=0), f.integer("moe_layer_freq", default=1)
    moe = Moe(
        num_experts=f.integer("n_routed_experts", "num_experts", "num_local_experts"),
        top_k=f.integer("num_experts_per_tok"),
        ffn_size=ffn,
        activation=activation_of(f),
        shared_ffn_size=ffn * (f.nullable("n_shared_experts", default=shared, low=0) or 0),
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
    activation = f.choice("dense_act_fn", among=known, default="relu")
    gate = Gate(normalize=False, bias=f.flag("router_bias", default=False))
    experts = f.integer("num_experts")
    moe = Moe(num_experts=experts, top_k=1, ffn_size=ffn, gated=False, activation=activation, gate=gate)
    dense = Dense(ffn_size=ffn, gated=False, activation=activation)
    blocks = []
    for stack, layers_field in (("encoder", "num_layers"), ("decoder", "num_decoder_layers")):
        layers, sparse = depth(f, layers_field), f.integer(f"num_sparse_{stack}_layers", low=0)
        step = layers // sparse if sparse else layers
        attention = Attention(heads=heads, kv_heads=heads, head_dim=f.integer("d_kv"), cross=stack == "decoder")
        for i in range(layers):
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
        scale=f.number("routed_scaling_factor", default=6.0),
        bias=f.flag("router_bias", default=False),
        correction_bias=True,
    )
    moe = Moe(
        num_experts=f.integer("n_routed_experts"),
        top_k=f.integer("moe_topk", "num_experts_per_tok"),
        ffn_size=f.integer("expert_ffn_hidden_size", "moe_intermediate_size"),
        activation=activation_of(f),
        zero_experts=f.nullable("zero_expert_num", default=256, low=0) or 0,
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
