"""What travels with a token: its activation, its top-k expert ids and gate weights, as the bytes of one row.

T tokens, D model, K top-k. A row is D elements of the activation's dtype, then K int32 ids, then K float32 weights
(``spec.operators.row_bytes``); one message instead of three, for any dtype.
"""

import torch
from torch import Tensor


def empty_rows(count: int, x: Tensor, top_k: int, more: int = 0) -> Tensor:
    """[count, row bytes + more] uint8 for tokens like x [T, D]."""
    size = x.shape[1] * x.element_size() + 8 * top_k + more
    return torch.empty((count, size), dtype=torch.uint8, device=x.device)


def fields(rows: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of rows [T, row bytes]: activations [T, D], ids [T, K] int32, weights [T, K] float32."""
    end = hidden * dtype.itemsize
    ids = rows[:, end : end + 4 * top_k].view(torch.int32)
    return rows[:, :end].view(dtype), ids, rows[:, end + 4 * top_k :].view(torch.float32)


def unpack(rows: Tensor, hidden: int, dtype: torch.dtype, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The fields as contiguous tensors, as the kernels read them."""
    x, ids, weights = fields(rows, hidden, dtype, top_k)
    return x.contiguous(), ids.contiguous(), weights.contiguous()
