"""What a document keeps of a family's model so that it can be measured, planned and run by Transformers."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ...spec.counted import Counted, Peak
from ...spec.errors import MoeplanError
from ...spec.family import FamilyConfig
from .cache import empty_cache, held_values, unknown
from .experts import experts_digest
from .frame import tuple_size
from .net import Net, located, rest, signature
from .package import configuration, first_line, import_transformers, without_code, without_experts
from .peak import peaks

LEFT_OUT = ("architectures", "transformers_version", "quantization_config")
"""Fields of a configuration that say nothing of the model's layers; how checkpoints are stored does not matter here."""
TOKENS = 2


class Kept(NamedTuple):
    """The configuration, and what ``Counted`` says of every layer: of a model that cannot run no more than before."""

    config: FamilyConfig
    layers: list[Counted]


def kept(config: Any, layers: Sequence[Counted], with_experts: Sequence[int], where: str) -> Kept:
    """Of a model by the configuration of its text part; layers: as they were counted; where: its file, for errors.

    with_experts: numbers of the layers that have routed experts.
    """
    transformers = import_transformers(where)
    body = {key: value for key, value in without_code(config.to_dict()).items() if key not in LEFT_OUT}
    try:
        net = _executable(transformers, body, len(layers), with_experts, where)
        family = FamilyConfig.of(transformers.__version__, body)
        held = _held(net, where)
        highest = _highest(net)
    except (MoeplanError, ValueError, TypeError) as error:
        reduced = {"model_type": body.get("model_type")}
        missing = FamilyConfig.of(transformers.__version__, reduced, _reason(error, where))
        return Kept(missing, list(layers))
    return Kept(family, [_described(net, i, counted, held[i], highest[i]) for i, counted in enumerate(layers)])


def _reason(error: Exception, where: str) -> str:
    return first_line(error).removeprefix(f"{where}: ")


def _executable(transformers: Any, body: dict[str, Any], layers: int, with_experts: Sequence[int], where: str) -> Net:
    """The causal language model as every rank builds it. Raises MoeplanError with what is missing."""
    config = configuration(transformers, body, where)
    try:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config, trust_remote_code=False).train(False)
    except Exception as error:
        raise MoeplanError(f"its text part is no causal language model by itself ({first_line(error)})") from None
    net = located(model)
    if len(net.layers) != layers or sorted(net.experts) != list(with_experts):
        others = sorted(set(with_experts) - set(net.experts))
        raise MoeplanError(
            f"experts of layer {others[0]} do not go through Transformers' experts interface"
            if others
            else "its text part by itself has other layers"
        )
    without_experts(net.config)
    return net


def _held(net: Net, where: str) -> list[tuple[int, int]]:
    """Of every layer, values that its cache holds per token and per sequence: after a few tokens without memory."""
    cache, ids = empty_cache(net.config), torch.zeros((1, TOKENS), dtype=torch.long, device="meta")
    try:
        with torch.no_grad():
            net.base(input_ids=ids, past_key_values=cache, use_cache=True)
        found = held_values(cache, TOKENS)
    except Exception as error:
        raise MoeplanError(
            f"its layers do not run without memory, to see what they cache ({first_line(error)})"
        ) from None
    tuple_size(net)
    if kind := unknown(cache):
        raise MoeplanError(f"a layer keeps its context in a {kind}, which moeplan does not know")
    if len(found) != len(net.layers):
        raise MoeplanError(f"its cache has {len(found)} layers, the model {len(net.layers)}")
    return found


def _highest(net: Net) -> list[Peak]:
    """What every layer holds while it computes."""
    try:
        return peaks(net)
    except Exception as error:
        raise MoeplanError(
            f"its layers do not run without memory, to see what they hold ({first_line(error)})"
        ) from None


def _described(net: Net, index: int, counted: Counted, held: tuple[int, int], peak: Peak) -> Counted:
    layer, experts = net.layers[index], net.experts.get(index)
    kinds = getattr(net.config, "layer_types", None) or [""] * len(net.layers)
    projections = (module for _, module in rest(layer, experts) if isinstance(module, nn.Linear))
    return counted.model_copy(
        update={
            "kind": str(kinds[index]),
            "signature": signature(layer, experts),
            "experts": "" if experts is None else experts_digest(experts),
            "whole_outputs": bool(getattr(experts, "has_post_expert_norm", False)),
            "held_values": held[0],
            "state_values": held[1],
            "peak": peak,
            "widths": sum(int(module.out_features) for module in projections),
        }
    )
