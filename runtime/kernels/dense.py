"""Dense products, those of one set of weights that every row passes: of attention, router, head, dense FFNs."""

import torch
from torch import Tensor

from .activation import activate
from .functions import esmm
from .product import SLOW_HALVES, multiply
from .registry import choose

FEW, SOME = 64, 512
"""Rows of which reading the weight takes most of a product's time; rows of an expert that the benchmark has."""
WORTH_A_CALL = 2**20
"""Multiplications, or values of a weight, that outweigh the 50 microseconds that a call costs beyond torch's."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, implementation: str | None = None) -> Tensor:
    """x [T, I]; weight [O, I]; bias [O] -> x weight^T + bias, [T, O] contiguous; the same as torch's linear.

    Who multiplies is chosen as for experts (``registry.choose``, which raises MoeplanError for a name that cannot run);
    the C++ kernels do where they are faster than torch's product and the weight is contiguous, else torch does.
    """
    if x.device.type != "cpu":
        return torch.nn.functional.linear(x, weight, bias)
    if choose(implementation, "cpu", x.dtype) == "cpp" and weight.is_contiguous() and _esmm_is_faster(x, weight):
        ids = torch.zeros(len(x), 1, dtype=torch.int32)
        added = None if bias is None else bias[None]
        return esmm(x, weight[None], ids, bias=added, implementation="cpp").squeeze(1)
    return multiply(weight, x.t(), bias).t().contiguous()


def dense_ffn(
    x: Tensor, gate_up: Tensor, down: Tensor, *, activation: str, implementation: str | None = None
) -> Tensor:
    """x: [T, D]; gate_up: [M, H, D], [0] gate and [1] up with M = 2; down: [D, H] -> [T, D]. Raises as ``linear``."""
    hidden = linear(x, gate_up.flatten(0, 1), implementation=implementation)
    return linear(activate(hidden, gate_up.shape[0], activation), down, implementation=implementation)


def _esmm_is_faster(x: Tensor, weight: Tensor) -> bool:
    """Than ``multiply``, with the C++ kernels.

    Measured on an AMD processor with AVX2, weights of 1024 x 4096 and 4096 x 4096, one thread and two: halves 1.5 to
    4.2 times up to 16 rows, 1.0 to 1.7 with 64, 1.0 to 1.4 with 256 and more; float32 (one thread) 1.4 to 2.5 times
    from 2 to 16 rows, 1.0 to 1.2 with 64, 0.8 to 1.1 with one row and with 256 and more. Where torch multiplies halves
    too, only as many rows of bfloat16 as the benchmark's experts have (1.05 times and more there), and few of float16.
    """
    rows, values = len(x), weight.numel()
    if x.dtype == torch.float32:
        return 2 <= rows <= FEW and values >= WORTH_A_CALL
    if SLOW_HALVES:
        return rows * values >= WORTH_A_CALL
    return 1 <= rows <= (SOME if x.dtype == torch.bfloat16 else FEW) and values >= WORTH_A_CALL
