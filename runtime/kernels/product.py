"""Matrix products with a weight, the operands in the order and the precision that run fastest.

Where torch has no products of bf16 and f16 for the processor (``SLOW_HALVES``) it multiplies them at a few GFLOP/s, and
slower still where an operand is strided. There the operands are widened to float32, a piece of the weight at a time, so
that the extra memory is that of one piece (autograd would keep them all); sums are float32 and rounded once.
"""

import torch
from torch import Tensor

SLOW_HALVES = torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2")
"""Whether torch has no products of bf16 and f16 for this processor."""
FEW = 4
PIECE = 2**20
"""Values of a weight that are widened at once: 4 MiB, which stay in a cache. 2 ** 18 and 2 ** 22 take longer."""


def multiply(weight: Tensor, columns: Tensor, bias: Tensor | None = None) -> Tensor:
    """weight [O, I] times columns [I, n], usually the transposed view of row-major rows, plus bias [O] -> [O, n].

    On CPUs the weight on the left runs faster: 1.4 to 1.6 times in bf16 from 4 to 128 rows (oneDNN), up to 1.5 times in
    float32 from 4 to 32 rows (MKL), about equal above. Below 4 rows in float32 the rows on the left are about 1.8 times
    faster. Measured on one thread of a Xeon with AMX, weights of 2048 x 1536 to 7168 x 4096. Widened, halves took as
    long as torch's product with 4 rows, a third with 16, a fifth with 256 (4096 x 4096, two threads of an AMD processor
    with AVX2).
    """
    few = columns.shape[1] < FEW
    if _widens(weight) and not few:
        return _multiply_widened(weight, columns, bias)
    if few and (_widens(weight) or weight.dtype == torch.float32):
        # With the usual strides, those of a single row too, or torch takes several times as long in bf16.
        rows = columns.t().reshape(-1).view(columns.shape[1], columns.shape[0])
        return (torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())).t()
    return torch.mm(weight, columns) if bias is None else torch.addmm(bias.unsqueeze(1), weight, columns)


def multiply_back(rows: Tensor, weight: Tensor) -> Tensor:
    """rows [n, O] times weight [O, I] -> [n, I], in float32 at least: the gradient of what the weight multiplied."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    if not _widens(weight):
        return torch.mm(rows, weight).to(wide)
    rows, sums = rows.float(), torch.zeros(len(rows), weight.shape[1])
    for at in _pieces(weight):
        sums.addmm_(rows[:, at], weight[at].float())
    return sums


def multiply_rows(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left [n, O]^T times right [n, I] into out [O, I]: the gradient of a weight."""
    if not _widens(out):
        torch.mm(left.t(), right, out=out)
        return
    columns, right = left.t().float(), right.float()
    for at in _pieces(out):
        out[at] = torch.mm(columns[at], right)


def _multiply_widened(weight: Tensor, columns: Tensor, bias: Tensor | None) -> Tensor:
    # Rows contiguous: with up to 10 of them a product with contiguous columns takes up to three times as long.
    y, columns = weight.new_empty(len(weight), columns.shape[1]), columns.t().float().contiguous().t()
    for at in _pieces(weight):
        product = torch.mm(weight[at].float(), columns)
        y[at] = product if bias is None else product + bias[at, None]
    return y


def _widens(weight: Tensor) -> bool:
    return SLOW_HALVES and weight.device.type == "cpu" and weight.dtype in (torch.bfloat16, torch.float16)


def _pieces(weight: Tensor) -> list[slice]:
    """Of the rows of a weight [O, I]."""
    step = max(1, PIECE // max(1, weight.shape[1]))
    return [slice(first, first + step) for first in range(0, len(weight), step)]
