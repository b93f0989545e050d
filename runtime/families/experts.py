"""Experts modules whose weights are elsewhere: their form, functions and switches are all that is used of them."""

import copy
import hashlib

import torch
from torch import nn

from ..embedding.form import Form, form_of
from .weights import fixed


def without_weights(module: nn.Module) -> nn.Module:
    """A copy whose own tensors have one value each, seen as often as their shapes say."""
    copied = copy.copy(module)
    vars(copied).update({key: dict(vars(module)[key]) for key in ("_parameters", "_modules", "_buffers")})
    for key, tensor in module.named_parameters(recurse=False):
        copied._parameters[key] = fixed(torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))
    for key, child in module.named_children():
        copied._modules[key] = copy.deepcopy(child)
    return copied


def form_of_meta(module: nn.Module) -> Form:
    """How a module on the meta device keeps its experts. Raises MoeplanError for what is no known form."""
    return form_of(type(module).__name__, without_weights(module))


def experts_digest(module: nn.Module) -> str:
    """Of class, form, sizes and activation: experts of one digest take one time."""
    act = type(getattr(module, "act_fn", None)).__name__
    of = type(module).__name__, act, *form_of_meta(module)
    return hashlib.sha256(repr(of).encode()).hexdigest()[:16]
