"""A family's causal language model on the meta device, without memory, and where its layers and experts are."""

import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from ...spec import Model
from ...spec.errors import MoeplanError
from ...spec.operators import OF_FAMILIES
from ..embedding.adapters import adapt, describe
from .package import configuration, first_line, import_transformers, through_the_door, without_experts

STACK = re.compile(r"^(.*?layers)\.(\d+)\.")
BY_FAMILY = (*OF_FAMILIES, "expert_ffn")
"""Operators of blocks that Transformers computes, which ``calls`` has beside."""
NUMBERS = ("layer_idx", "layer_id", "layer_number", "idx", "layer_index", "training")
"""Attributes that differ between layers that do the same."""


@dataclass(frozen=True, eq=False)
class Net:
    """model: with the head; base: the module that goes through ``layers``; experts: their modules by layer."""

    model: Any
    base: Any
    layers: nn.ModuleList
    experts: dict[int, nn.Module]

    @property
    def config(self) -> Any:
        return self.model.config

    def rest(self, index: int) -> Iterator[tuple[str, nn.Module]]:
        """Names and modules of a layer but its routed experts."""
        yield from rest(self.layers[index], self.experts.get(index))


def rest(layer: nn.Module, experts: nn.Module | None) -> Iterator[tuple[str, nn.Module]]:
    inside = set() if experts is None else set(experts.modules())
    yield from ((name, module) for name, module in layer.named_modules() if module not in inside)


def signature(layer: nn.Module, experts: nn.Module | None) -> str:
    """Digest of what a layer but its experts is made of: classes, sizes, and switches that are no fractions.

    Layers of one signature do the same with other weights.
    """
    parts = [
        (
            name,
            type(module).__name__,
            [(key, list(value.shape)) for key, value in module.named_parameters(recurse=False)],
            [
                (key, value)
                for key, value in sorted(vars(module).items())
                if isinstance(value, bool | int | str) and not key.startswith("_") and key not in NUMBERS
            ],
        )
        for name, module in rest(layer, experts)
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def stack_of(net: nn.Module, name: str) -> tuple[nn.Module, nn.ModuleList, int]:
    """Who goes through the layers, the layers, and the number of that with a module of this name."""
    found = STACK.match(name)
    assert found is not None
    layers = net.get_submodule(found[1])
    assert isinstance(layers, nn.ModuleList)
    return net.get_submodule(found[1].rpartition(".")[0]), layers, int(found[2])


@lru_cache(maxsize=1)
def built(model: Model, dtype: torch.dtype) -> Net:
    """What ``build`` gives, built once for all layers that are looked at; its experts give zeros."""
    net = build(model, dtype)
    without_experts(net.config)
    return net


def build(model: Model, dtype: torch.dtype, unmodified: bool = False) -> Net:
    """The model of a document with a ``family_config``, on the meta device; every layer with experts calls them through
    Transformers' interface, but for those that never do, if ``unmodified``.

    Raises MoeplanError without Transformers, and where this one builds other layers than the document has.
    """
    kept = model.family_config
    if kept is None:
        raise MoeplanError(f"{model.name}: the document has no family_config to build it from")
    transformers = import_transformers(model.name)
    config = configuration(transformers, kept.body, model.name)
    try:
        with torch.device("meta"):
            net = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
        net.train(False)
    except Exception as error:
        raise MoeplanError(
            f"{model.name}: Transformers {transformers.__version__} does not build it ({first_line(error)})"
        ) from None
    found = located(net, unmodified)
    _check(found, model, f"Transformers {transformers.__version__}", kept.transformers)
    return found


def located(net: nn.Module, unmodified: bool = False) -> Net:
    """Its layers and their experts; see ``build``. Raises MoeplanError where none goes through Transformers' experts
    interface."""
    describe(net)
    if not unmodified:
        adapt(net)
    names = [name for name, module in net.named_modules() if through_the_door(module) and STACK.match(name)]
    if not names:
        raise MoeplanError(f"{type(net).__name__}: none of its experts goes through Transformers' experts interface")
    base, layers, _ = stack_of(net, names[0])
    return Net(net, base, layers, {stack_of(net, name)[2]: net.get_submodule(name) for name in names})


def _check(net: Net, model: Model, now: str, then: str) -> None:
    counts = len(net.layers), tuple(sorted(net.experts))
    wanted = len(model.layers), model.moe_layers
    if counts != wanted:
        raise MoeplanError(
            f"{model.name}: {now} builds {counts[0]} layers, {len(counts[1])} with experts, version {then} "
            f"{wanted[0]} and {len(wanted[1])}: read its config.json again"
        )
    for i, block in enumerate(model.layers):
        if block.counted is None or signature(net.layers[i], net.experts.get(i)) != block.counted.signature:
            raise MoeplanError(
                f"{model.name}: layer {i}: {now} builds other modules than version {then}: read its config.json again"
            )
