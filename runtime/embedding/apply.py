"""``apply_plan``: a loaded Transformers model that runs under a plan."""

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from ...spec.errors import MoeplanError
from ...spec.model import Moe
from ...spec.plan import LayerPlan, Plan
from ..groups import Group, Levels, open_levels
from ..strategies import LayerContext, Region
from .adapters import adapt
from .agreement import agree, check_group, own_group
from .form import ELSE, Form, experts_modules, form_of, tensors_of
from .layer import ATTRIBUTE, NAME, PlannedLayer, planned_forward
from .package import transformers_package
from .part import own_part

APPLIED = ("ep", "hierarchical", "sharded", "gathered")
"""Strategies that a user's model can run under."""


class Asked(NamedTuple):
    """One layer of the model beside its plan."""

    name: str
    module: nn.Module
    form: Form
    plan: LayerPlan
    moe: Moe


def apply_plan(model: Any, plan: Plan | str | Path, group: Group = None) -> Any:
    """The same model, whose experts are divided over the ranks of ``group`` as ``plan`` says.

    model: a Transformers model with its weights, the same on every rank. plan: a document or its path, for as many
    devices as the group has ranks. group: by default all ranks of torch.distributed, which is initialised. Every rank
    calls this at the same time, and then the model as before, each with sequences of its own, as often as the others:
    one that has none calls ``idle`` in its place. Of the experts only this rank's part stays in memory; all other
    parameters stay whole.

    Raises MoeplanError on all ranks, and leaves the model as it is, where one of them cannot; see ``docs``.
    """
    transformers = transformers_package()
    check_group(group)
    own = own_group() if group is None else group
    found: list[Asked] = []
    problem, subject, hosts = None, "", []
    try:
        document = document_of(plan)
        found = check(model, document, dist.get_world_size(group), everyone(group))
        hosts = hosts_of(document)
        subject = repr((hosts, [(a.form, a.plan, a.moe.top_k, dtype_of(a)) for a in found]))
    except MoeplanError as error:
        problem = error
    agree(subject, problem, _device(model), own)
    if document.degrees.tensor > 1:
        warnings.warn(
            f"the plan divides attention over {document.degrees.tensor} devices, here it stays whole on every rank: "
            "the predicted time and memory do not hold",
            stacklevel=2,
        )
    levels = open_levels(hosts) if any(a.plan.strategy == "hierarchical" for a in found) else None
    transformers.integrations.moe.ALL_EXPERTS_FUNCTIONS.register(NAME, planned_forward)
    region = Region(dtype_of(found[0]), _device(model))
    adapt(model)
    for asked in found:
        _install(asked, hosts, own, region, levels)
    model.save_pretrained = _refuse_saving
    return model


def check(model: Any, plan: Plan, ranks: int, everyone: bool) -> list[Asked]:
    """Every layer with experts beside its plan. everyone: the group has all ranks. Raises MoeplanError."""
    if not isinstance(model, nn.Module):
        raise MoeplanError(f"apply_plan: expected a loaded Transformers model, got {type(model).__name__}")
    if len(plan.devices) != ranks:
        raise MoeplanError(
            f"the plan is for {len(plan.devices)} devices, the group has {ranks} ranks: start one process for each"
        )
    modules = experts_modules(model)
    if len(modules) != len(plan.layers):
        raise MoeplanError(
            f"the model has {len(modules)} layers with experts, the plan of {plan.model.name} has {len(plan.layers)}"
        )
    return [
        _check_layer(name, module, plan, ordinal, everyone) for ordinal, (name, module) in enumerate(modules.items())
    ]


def _check_layer(name: str, module: nn.Module, plan: Plan, ordinal: int, everyone: bool) -> Asked:
    if hasattr(module, ATTRIBUTE):
        raise MoeplanError(f"{name}: a plan is applied already: load the model again for another")
    form, block, layer = form_of(name, module), plan.model.moe_block(ordinal), plan.layers[ordinal]
    moe = block.moe
    assert moe is not None
    sizes = (
        ("experts", form.experts, moe.num_experts),
        ("FFN columns", form.ffn, moe.ffn_size),
        ("hidden size", form.hidden, block.hidden_size),
        ("matrices before the activation", form.matrices, 2 if moe.gated else 1),
    )
    for what, got, planned in sizes:
        if got != planned:
            raise MoeplanError(
                f"layer {plan.model.moe_layers[ordinal]} ({name}): {got} {what}, the plan of {plan.model.name} has "
                f"{planned}: solve for this model"
            )
    if layer.strategy not in APPLIED:
        raise MoeplanError(
            f"layer {plan.model.moe_layers[ordinal]}: {layer.strategy} runs in `moeplan run` only; apply_plan takes "
            f"{', '.join(APPLIED)}: solve with --strategy ep"
        )
    if layer.strategy == "sharded" and form.post_norm:
        raise MoeplanError(
            f"{name}: a norm follows every expert, which needs whole outputs: not sharded, but ep; {ELSE}"
        )
    if layer.strategy == "hierarchical" and not everyone:
        raise MoeplanError(f"{name}: hierarchical needs a group of all ranks, in their order")
    return Asked(name, module, form, layer, moe)


def document_of(plan: object) -> Plan:
    """A plan, or what is read from its path."""
    if isinstance(plan, str | Path):
        return Plan.read(plan)
    if not isinstance(plan, Plan):
        raise MoeplanError(f"apply_plan: expected a Plan or its path, got {type(plan).__name__}")
    return plan


def dtype_of(asked: Asked) -> torch.dtype:
    return next(tensors_of(asked.module, asked.form)).dtype


def hosts_of(plan: Plan) -> list[int]:
    """Number of each device's host."""
    names = list(dict.fromkeys(device.host for device in plan.devices))
    return [names.index(device.host) for device in plan.devices]


def everyone(group: Group) -> bool:
    """Whether the group has all ranks, in their order."""
    return group is None or dist.get_process_group_ranks(group) == list(range(dist.get_world_size()))


def _install(asked: Asked, hosts: Sequence[int], group: Group, region: Region, levels: Levels | None) -> None:
    """From now on the module's experts are those of its plan."""
    module, form, plan = asked.module, asked.form, asked.plan
    rank, device = dist.get_rank(group), next(tensors_of(module, form)).device
    context = LayerContext(rank, list(hosts), asked.moe, form.hidden, device, region, levels, group=group)
    layer, tensors = PlannedLayer(plan, context, form), list(tensors_of(module, form))
    adds_bias = plan.split is None or rank == next(g for g, count in enumerate(plan.split) if count)
    kept = own_part(tensors, form, layer.stored.experts, layer.stored.columns, adds_bias)
    for key, whole, tensor in zip(form.names, tensors, kept, strict=True):
        learns = whole.requires_grad and (adds_bias or key != "down_proj_bias")  # zeros that another device has
        setattr(module, key, nn.Parameter(tensor, requires_grad=learns))
    layer.hold(module)
    setattr(module, ATTRIBUTE, layer)
    # Of its own: models made from one configuration share it, and Transformers changes it for all of them.
    config: Any = copy.copy(module.config)
    config._experts_implementation_internal = NAME
    module.config = config


def idle(model: Any) -> None:
    """What a rank without sequences calls where the others call the model: Transformers' models take no empty batch,
    and the others wait for the experts that are here. Raises MoeplanError for a model without a plan."""
    layers = [module for module in model.modules() if hasattr(module, ATTRIBUTE)]
    if not layers:
        raise MoeplanError("idle: no plan is applied to this model: call apply_plan first")
    for module in layers:
        getattr(module, ATTRIBUTE).idle(module)


def _device(model: Any) -> torch.device:
    """Of a model's parameters: what collectives of this rank need."""
    parameters = model.parameters() if isinstance(model, nn.Module) else iter(())
    fallback = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    return next((p.device for p in parameters if not p.is_meta), fallback)


def _refuse_saving(*_: object, **__: object) -> None:
    raise MoeplanError("save_pretrained: this rank holds only its part of the experts: save before apply_plan")
