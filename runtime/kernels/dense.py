"""Dense products, those of one set of weights that every row passes: of attention, router, head, dense FFNs."""

from typing import cast

import torch
from torch import Tensor

from .activation import activate
from .functions import esmm
from .product import multiply
from .registry import choose, load


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str | None = None) -> Tensor:
    """x [T, I]; weight [O, I]; bias [O] -> x weight^T + bias, [T, O] contiguous; the same as torch's linear.

    On CPUs where ``esmm`` of one expert is faster than torch's product and nobody asked for another implementation, it
    multiplies.
    """
    if x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight, bias)
    if choose(implementation, "cpu", x.dtype) == "cpp" and weight.is_contiguous() and _outruns_vendor(x, weight):
        ids = torch.zeros(len(x), 1, dtype=torch.int32)
        added = None if bias is None else bias[None]
        return esmm(x, weight[None], ids, bias=added, implementation="cpp").squeeze(1)
    y = multiply(weight, x.t()).t().contiguous()
    return y if bias is None else y + bias


def dense_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, implementation: str | None = None
) -> Tensor:
    """x: [T, D]; gate_up: [M, H, D], [0] gate and [1] up with M = 2; down: [D, H] -> [T, D]."""
    hidden = linear(x, gate_up.flatten(0, 1), implementation=implementation)
    return linear(activate(hidden, gate_up.shape[0], activation), down, implementation=implementation)


def _outruns_vendor(x: Tensor, weight: Tensor) -> bool:
    from .cpp.implementation import CppKernels

    return cast(CppKernels, load("cpp")).outruns_vendor(len(x), weight.numel(), x.dtype)
