"""What ends a coherent step, on one device: tokens go home, and everybody gets the new keys and values.

T tokens that are here, D model, G devices, O own tokens, N rows of keys and values.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..spec.operators import NUMBER_BYTES
from .cache import Stack


def pack_home(x: Tensor, number: Tensor, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """x [T, D], number [T] rising, tokens: own ones of each device -> rows [T, bytes of D elements + NUMBER_BYTES] in
    the order of the tokens' own devices; rows for each device [G] int64."""
    ends = torch.tensor(tokens, device=x.device).cumsum(0)
    home = torch.bucketize(number, ends, right=True)
    rows = torch.empty((len(x), x.shape[1] * x.element_size() + NUMBER_BYTES), dtype=torch.uint8, device=x.device)
    rows[:, :-NUMBER_BYTES].view(x.dtype).copy_(x)
    _numbers(rows).copy_(number)
    return rows, torch.bincount(home, minlength=len(tokens))


def unpack_home(rows: Tensor, dtype: torch.dtype, first: int) -> Tensor:
    """rows [O, ...] of the tokens from number ``first`` on, in any order -> [O, D] in order."""
    x = rows[:, :-NUMBER_BYTES].view(dtype)
    return torch.empty(x.shape, dtype=dtype, device=x.device).index_copy_(0, _numbers(rows).long() - first, x)


def pack_cache(stack: Stack, places: Tensor, context: int) -> Tensor:
    """Keys and values at position ``context`` of the rows ``places`` [N] -> [N, cache row bytes]."""
    at = [whole[:, :, context].index_select(0, places).flatten(1) for whole in (stack.keys, stack.values)]
    half = at[0].shape[1] * at[0].element_size()
    rows = torch.empty((len(places), 2 * half + NUMBER_BYTES), dtype=torch.uint8, device=places.device)
    rows[:, :half].view(at[0].dtype).copy_(at[0])
    rows[:, half : 2 * half].view(at[0].dtype).copy_(at[1])
    _numbers(rows).copy_(places)
    return rows


def write_cache(stack: Stack, rows: Tensor, context: int) -> None:
    """Write what devices packed at the places that they say."""
    half, places = (rows.shape[1] - NUMBER_BYTES) // 2, _numbers(rows).long()
    for whole, part in ((stack.keys, rows[:, :half]), (stack.values, rows[:, half : 2 * half])):
        at = whole[:, :, context]
        at.index_copy_(0, places, part.view(whole.dtype).view(len(rows), *at.shape[1:]))


def _numbers(rows: Tensor) -> Tensor:
    """[rows] int32 view of the last bytes."""
    return rows[:, -NUMBER_BYTES:].view(torch.int32)[:, 0]
