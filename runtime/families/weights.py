"""Memory and values for modules that were built on the meta device."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Draw = Callable[[str, Tensor], Tensor]
"""Values for a parameter of two or more dimensions, by its name and the meta tensor that it replaces."""


def materialise(net: Any, modules: Iterable[tuple[str, nn.Module]], draw: Draw, device: torch.device) -> None:
    """Give modules of ``net``, a Transformers model, memory and values, each by itself (children are listed too).

    What has memory already is left as it is. Matrices come from ``draw``; vectors, scalars and buffers are what the
    family's own initialisation makes of them, for which torch's generator decides where it is random.
    """
    listed = [(name, module) for name, module in modules if _any_meta(module)]
    for _, module in listed:
        for key, value in module.named_parameters(recurse=False):
            if value.is_meta and value.dim() < 2:
                module._parameters[key] = fixed(torch.zeros(value.shape, dtype=value.dtype, device=device))
        for key, buffer in module.named_buffers(recurse=False):
            if buffer.is_meta:
                module._buffers[key] = torch.zeros(buffer.shape, dtype=buffer.dtype, device=device)
    with torch.no_grad():
        for _, module in listed:
            net._init_weights(module)
    for name, module in listed:
        for key, value in module.named_parameters(recurse=False):
            if value.is_meta:
                drawn = draw(f"{name}.{key}" if name else key, value)
                module._parameters[key] = fixed(drawn.view(value.shape))


def _any_meta(module: nn.Module) -> bool:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return any(tensor.is_meta for tensor in own)


def fixed(values: Tensor) -> nn.Parameter:
    """A parameter that is not trained."""
    return nn.Parameter(values, requires_grad=False)


def fan_in(shape: torch.Size) -> int:
    """Values that one output of a matrix [outputs, inputs, ...] reads."""
    return max(1, math.prod(shape[1:]))
