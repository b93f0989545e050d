"""Models of any family that Transformers knows, as its modules say: built on the meta device, without memory.

Of the experts everything is read: how many, their widths, matrices and biases, top-k, which layers have them. The rest
of a layer (attention or another mixer, norms, router, shared experts) is counted whole (``spec.model.Counted``), and
the configuration is kept where Transformers' own modules can stand in for it when the model is measured and run. What a
quantisation scheme does to both is in ``family_storage``.

Letters: E experts, D model, F FFN.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from ..runtime.families.package import own_fields
from ..runtime.families.read import kept
from ..spec import Model
from ..spec.catalogue.huggingface import DTYPES
from ..spec.catalogue.shared import merge_runs
from ..spec.catalogue.stored import Scheme, read_scheme
from ..spec.document import show
from ..spec.errors import DocumentError, MoeplanError
from ..spec.model import MAX_EXPERTS, MAX_LAYERS, Activation, Block, Counted, DType, Gate, Moe
from .family_storage import experts_storage, rest_storage

STACK = re.compile(r"^(.*?layers)\.(\d+)\.")
TOP_K = (
    "top_k",
    "topk",
    "top_k_experts",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "experts_per_token",
    "moe_k",
)
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "swish": "silu", "gelu": "gelu", "relu": "relu"}
# What builds the text part of a model, in turn.
AUTO = ("AutoModelForCausalLM", "AutoModelForImageTextToText", "AutoModelForMultimodalLM", "AutoModel")


class Experts(NamedTuple):
    """The experts of one layer; name: of their module."""

    name: str
    module: nn.Module
    number: int
    ffn_size: int
    gated: bool
    bias: bool


def read_family(body: dict[str, Any], where: str, name: str, source: str) -> Model:
    """The Model of a ``config.json`` of a family that moeplan has no reader for; ``where`` names it in errors.

    Sizes are those of Transformers' modules; parameters count values, and bytes are as the weights are stored. Raises
    MoeplanError without Transformers, and DocumentError, naming the family, field or quantisation scheme, for what it
    does not build or count, or keeps elsewhere.
    """
    transformers = _transformers(body, where)
    family = body["model_type"]
    scheme = read_scheme(body, where)
    config = _config(transformers, body, where)
    text = config.get_text_config()
    text.tie_word_embeddings = tied = _tied(body, config)
    net = _text_part(_built(transformers, config, where))
    found = list(_experts(net, text, where))
    if not found:
        raise DocumentError(
            f"{where}: model_type {show(family)}: none of its layers has experts that Transformers keeps in one "
            f"module: {ELSE}"
        )
    stack = _stack(net, found, where)
    hidden = _integer(text, ("hidden_size", "d_model"), where)
    by_layer: dict[int, Experts] = {}
    for experts in found:
        i = int(STACK.match(experts.name)[2])  # type: ignore[index]
        if i in by_layer:
            raise DocumentError(
                f"{where}: two kinds of experts in one layer ({by_layer[i].name}, {experts.name}): {ELSE}"
            )
        by_layer[i] = experts
    blocks = [_block(layer, by_layer.get(i), text, hidden, where) for i, layer in enumerate(stack)]
    if scheme is not None:
        blocks = [_stored(scheme, *each, by_layer) for each in zip(blocks, enumerate(stack), strict=True)]
    vocab = _integer(text, ("vocab_size",), where)
    executed = kept(text, [block.counted for block in blocks if block.counted], sorted(by_layer), where)
    blocks = [block.model_copy(update={"counted": c}) for block, c in zip(blocks, executed.layers, strict=True)]
    model = Model(
        name=name,
        family=family,
        source=source,
        vocab_size=vocab,
        blocks=merge_runs(blocks),
        rope_theta=None,
        tie_embeddings=tied,
        dtype=_dtype(text, where),
        head_storage=None if tied or scheme is None else scheme.head(),
        family_config=executed.config,
    )
    rest = _parameters(net) - _parameters(stack) + _missing_head(net, text) - model.embedding_parameters()
    if rest < 0:
        raise DocumentError(
            f"{where}: model_type {show(family)}: {-rest:,} parameters fewer outside the layers than embedding and "
            f"head of its vocab_size and hidden_size have: {ELSE}"
        )
    return model.model_copy(update={"other_parameters": rest})


ELSE = "write a Model document for it (docs/schemas/model.schema.json)"


def _transformers(body: Mapping[str, Any], where: str) -> Any:
    family = body.get("model_type")
    try:
        import transformers
    except ImportError:
        raise MoeplanError(
            f"{where}: model_type {show(family)} is read through Transformers: pip install 'moeplan[hf]'"
        ) from None
    transformers.utils.logging.set_verbosity_error()
    if family not in transformers.CONFIG_MAPPING:
        raise DocumentError(
            f"{where}: model_type: neither moeplan nor Transformers {transformers.__version__} knows {show(family)}, "
            f"and code that comes with a model is not run: {ELSE}"
        )
    return transformers


def _config(transformers: Any, body: dict[str, Any], where: str) -> Any:
    """Sizes are looked at first: Transformers makes a module of every layer."""
    for part in (body, *(value for value in body.values() if isinstance(value, dict))):
        for field, value in part.items():
            layers = "layer" in field and "size" not in field and "dim" not in field
            most = MAX_LAYERS if layers else MAX_EXPERTS if "expert" in field else 2**31
            if isinstance(value, int) and not isinstance(value, bool) and value > most and not field.endswith("_id"):
                raise DocumentError(f"{where}: {field}: at most {most} (got {value})")
    try:
        # How its weights are stored is counted here, by the modules as they are without it.
        dropped = ("quantization_config", "compression_config")
        fields = {key: value for key, value in own_fields(body).items() if key not in dropped}
        if isinstance(inner := fields.get("text_config"), dict):
            fields["text_config"] = {key: value for key, value in inner.items() if key not in dropped}
        return transformers.AutoConfig.for_model(body["model_type"], **fields)
    except Exception as error:
        raise DocumentError(f"{where}: Transformers refuses it ({_first_line(error)})") from None


def _built(transformers: Any, config: Any, where: str) -> nn.Module:
    """The model without memory, by the first class that takes its configuration."""
    refused: Exception | None = None
    for given in (config.get_text_config(), config):
        for auto in AUTO:
            if not hasattr(transformers, auto):
                continue
            try:
                with torch.device("meta"):
                    return getattr(transformers, auto).from_config(given, trust_remote_code=False)
            except Exception as error:
                refused = error if refused is None or "Unrecognized configuration" in str(refused) else refused
    raise DocumentError(f"{where}: Transformers {transformers.__version__} does not build it ({_first_line(refused)})")


def _text_part(net: nn.Module) -> nn.Module:
    """Of a model with other inputs its language model, with the head where there is one."""
    inner = getattr(net, "model", net)
    for name in ("language_model", "text_model", "thinker"):
        if isinstance(part := getattr(inner, name, None), nn.Module):
            return _text_part(part)
    return net


def _experts(net: nn.Module, config: Any, where: str) -> Iterator[Experts]:
    hidden = _integer(config, ("hidden_size", "d_model"), where)
    for name, module in net.named_modules():
        own = dict(module.named_parameters(recurse=False))
        down, up = own.get("down_proj"), own.get("gate_up_proj", own.get("up_proj"))
        if down is None or up is None or down.dim() != 3 or up.dim() != 3 or not STACK.match(name):
            continue
        if "shared" in name or "vision" in name:  # every token's, or every picture's: part of the rest
            continue
        count, gated, bias = down.shape[0], "gate_up_proj" in own, any("bias" in key for key in own)
        ffn = down.numel() // (count * hidden)
        moe = Moe(num_experts=count, top_k=1, ffn_size=ffn, gated=gated, bias=bias)
        if count * moe.expert_parameters(hidden) != sum(p.numel() for p in own.values()):
            shapes = ", ".join(f"{key} {list(p.shape)}" for key, p in own.items())
            raise DocumentError(f"{where}: {name}: experts of a form that moeplan does not know ({shapes}): {ELSE}")
        yield Experts(name, module, count, ffn, gated, bias)


def _stack(net: nn.Module, found: list[Experts], where: str) -> nn.ModuleList:
    prefixes = {STACK.match(experts.name)[1] for experts in found}  # type: ignore[index]
    if len(prefixes) > 1:
        raise DocumentError(f"{where}: experts in several stacks of layers ({', '.join(sorted(prefixes))}): {ELSE}")
    stack = net.get_submodule(prefixes.pop())
    assert isinstance(stack, nn.ModuleList)
    return stack


def _block(layer: nn.Module, experts: Experts | None, config: Any, hidden: int, where: str) -> Block:
    counted = Counted(
        made_of=type(layer).__name__,
        parameters=_parameters(layer) - (_parameters(experts.module) if experts else 0),
        cache_values=_cache_values(layer),
    )
    if experts is None:
        return Block(hidden_size=hidden, counted=counted)
    moe = Moe(
        num_experts=experts.number,
        top_k=_top_k(layer, experts, config, where),
        ffn_size=experts.ffn_size,
        gated=experts.gated,
        activation=ACTIVATIONS.get(str(getattr(config, "hidden_act", "")), "own"),
        bias=experts.bias,
        gate=Gate(score="own"),
    )
    return Block(hidden_size=hidden, counted=counted, moe=moe)


def _stored(scheme: Scheme, block: Block, numbered: tuple[int, nn.Module], found: Mapping[int, Experts]) -> Block:
    """The block with how its linear layers and its experts are stored."""
    index, layer = numbered
    experts, counted, moe = found.get(index), block.counted, block.moe
    assert counted is not None
    update: dict[str, Any] = {"storage": rest_storage(scheme, layer, index, experts.module if experts else None)}
    parts: dict[str, Any] = {"counted": counted.model_copy(update=update)}
    if experts is not None and moe is not None:
        inside = experts.name.split(f"layers.{index}.", 1)[1]
        storage = experts_storage(scheme, index, inside, experts.number, experts.gated)
        parts["moe"] = moe.model_copy(update={"storage": storage})
    return block.model_copy(update=parts)


def _top_k(layer: nn.Module, experts: Experts, config: Any, where: str) -> int:
    """As the layer's modules have it, else the configuration."""
    for module in (*layer.modules(), config):
        for name in TOP_K:
            value = getattr(module, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= experts.number:
                return value
    raise DocumentError(f"{where}: {experts.name}: how many experts a token uses is said nowhere: {ELSE}")


def _cache_values(layer: nn.Module) -> int:
    """Values that the layer's attention caches for a token: keys and values, or what they are unfolded from, by the
    names of its projections. Mixers that keep a state of fixed size have none."""
    widths = {
        name.rsplit(".", 1)[-1]: int(module.out_features)
        for name, module in layer.named_modules()
        if isinstance(module, nn.Linear)
    }
    return widths.get("kv_a_proj_with_mqa") or widths.get("k_proj", 0) + widths.get("v_proj", 0)


def _tied(body: Mapping[str, Any], config: Any) -> bool:
    """Whether the head is the embedding: as the whole model says, else its text part, else by default."""
    inner = body.get("text_config")
    for part in (body, inner if isinstance(inner, dict) else {}):
        if isinstance(said := part.get("tie_word_embeddings"), bool):
            return said
    return bool(getattr(config, "tie_word_embeddings", False))


def _missing_head(net: nn.Module, config: Any) -> int:
    """Values of an output projection that was not built: the text part of a model with other inputs comes without."""
    if getattr(config, "tie_word_embeddings", False) or hasattr(net, "lm_head"):
        return 0
    return int(config.vocab_size) * int(config.hidden_size)


def _dtype(config: Any, where: str) -> DType:
    """What it computes in; f32 where the configuration says nothing, as Transformers builds it."""
    said = getattr(config, "dtype", None)
    if said is not None and str(said) not in DTYPES:
        raise DocumentError(f"{where}: dtype: expected one of bfloat16, float16, float32 (got {show(str(said))})")
    return DTYPES[str(said)] if said is not None else "f32"


def _parameters(net: nn.Module) -> int:
    return sum(parameter.numel() for parameter in net.parameters())


def _integer(config: Any, names: tuple[str, ...], where: str) -> int:
    for name in names:
        if isinstance(value := getattr(config, name, None), int):
            return value
    raise DocumentError(f"{where}: {names[0]}: the configuration has none: {ELSE}")


def _first_line(error: Exception | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]
