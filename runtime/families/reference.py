"""The yardstick of a family's model: Transformers' own, unmodified, in one process.

A layer's experts have memory while they compute.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...spec import Model, Plan
from ...spec.routing import Routing
from ..embedding.adapters import calls_all, for_experts, silent
from ..executor import DTYPES, Output
from ..reference import forced_choice
from .execute import first_layers
from .experts import form_of_meta
from .net import Net, build
from .package import WITHOUT_EXPERTS, without_experts
from .past import Past
from .source import FamilyWeights
from .weights import fixed


@torch.inference_mode()
def family_output(plan: Plan, source: FamilyWeights, layers: int, inputs: Tensor, routing: Routing | None) -> Output:
    """Hidden states [tokens, D] after so many layers and logits [sequences, V] of all tokens of a step."""
    workload = plan.workload
    of = [index for index in plan.model.moe_layers if index < layers]
    chosen = {} if routing is None else {i: forced_choice(routing, j, inputs.device)[0] for j, i in enumerate(of)}
    net = unmodified(plan.model, DTYPES[plan.dtype], source, of, chosen)
    usual = net.config._experts_implementation
    with first_layers(net, layers):
        past = Past(net, (0, workload.sequences), partial(_one_token, net, usual), layers)
        past.fill(workload.context, plan.seed)
        kept: list[Tensor] = []
        net.layers[layers - 1].register_forward_hook(partial(_keep, kept))
        rows = inputs.view(-1, workload.length)
        found = net.model(input_ids=rows, past_key_values=past.cache, use_cache=True, logits_to_keep=1)
    dtype = net.model.dtype
    return Output(kept[-1].reshape(len(inputs), -1).to(dtype), found.logits[:, -1].to(dtype))


def unmodified(
    model: Model, dtype: torch.dtype, source: FamilyWeights, layers: Sequence[int], chosen: Mapping[int, Tensor]
) -> Net:
    """Transformers' model, the experts of these layers with memory while they compute; chosen: ids [T, K] by layer, in
    the place of the router's."""
    net = build(model, dtype, unmodified=True)
    source.fill(net)
    for i in layers:
        module, form = net.experts[i], form_of_meta(net.experts[i])
        empty = dict(module._parameters)
        module.register_forward_pre_hook(partial(_come, source, i, form, chosen.get(i)), with_kwargs=True)
        module.register_forward_hook(partial(_go, empty))
    return net


def _one_token(net: Net, usual: str, ids: Tensor, cache: Any) -> None:
    without_experts(net.config)
    with silent(net.experts.values()):
        net.base(input_ids=ids, past_key_values=cache, use_cache=True)
    net.config._experts_implementation = usual


def _come(
    source: FamilyWeights, index: int, form: Any, forced: Tensor | None, module: nn.Module, args: Any, kwargs: Any
) -> tuple[Any, Any] | None:
    """All experts of a layer, and the routing that the plan is for, in the place of its router's."""
    if module.config._experts_implementation == WITHOUT_EXPERTS:  # type: ignore[union-attr]
        return None
    for name, tensor in zip(form.names, source.experts(index, form, range(form.experts), (0, form.ffn)), strict=True):
        module._parameters[name] = fixed(tensor)
    if forced is None:
        return None
    if calls_all(module):
        return (for_experts(args[0], forced, form.experts),), kwargs
    return replaced(args, kwargs, forced)


def replaced(args: Sequence[Any], kwargs: dict[str, Any], ids: Tensor) -> tuple[Any, Any]:
    """The arguments of an experts module with other ids: the second one, however it is given."""
    if len(args) > 1:
        return (args[0], ids.view(args[1].shape).to(args[1].dtype), *args[2:]), kwargs
    name = next(name for name, value in kwargs.items() if isinstance(value, Tensor) and not value.is_floating_point())
    return tuple(args), kwargs | {name: ids.view(kwargs[name].shape).to(kwargs[name].dtype)}


def _go(empty: dict[str, Any], module: nn.Module, args: Any, output: Any) -> None:
    module._parameters.update(empty)


def _keep(kept: list[Tensor], layer: nn.Module, args: Any, output: Any) -> None:
    kept[:] = [output[0] if isinstance(output, tuple) else output]
