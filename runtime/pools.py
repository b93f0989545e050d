"""Memory that the calls of operators have in common: pools of random values, and experts' weights cut from them.

Letters: E experts, D model, H ffn columns, M 2 for a gated FFN or 1.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import cycle
from math import prod

import torch
from torch import Tensor

from .families.net import built
from .random_weights import random_tensor
from .tiers import HOST

COLD_BYTES = 256 * 2**20  # weights used again after so many bytes of others are in no cache
MOST_RESTING = 2**12  # experts that are cut, however small they are
_TILE = 2**22  # values drawn; the pool repeats them


class Pool:
    """Random values of one type on one device; weights are cut from it one after the other, round and round.

    Two calls have different memory unless together they need more than the pool holds, and no call waits for gigabytes
    to be drawn: their values do not matter here. One pool is alive at a time.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        tile = torch.empty(_TILE, dtype=dtype, device=device)
        self._tile = random_tensor(tile, 0, 0, "pool", fan_in=2048)
        self._values, self._cursor = self._tile, 0

    def cut(self, *shape: int) -> Tensor:
        """A contiguous view of this shape."""
        count = prod(shape)
        size = max(count, COLD_BYTES // self._tile.element_size())
        if len(self._values) < size:
            self._values = self._tile.repeat(-(-size // _TILE))
            self._cursor = 0
        if self._cursor + count > len(self._values):
            self._cursor = 0
        first, self._cursor = self._cursor, self._cursor + count
        return self._values[first : self._cursor].view(shape)


@lru_cache(maxsize=1)
def pool(dtype: torch.dtype, device: torch.device) -> Pool:
    return Pool(dtype, device)


def values_of(dtype: torch.dtype, device: torch.device) -> Callable[[tuple[int, ...], torch.dtype], Tensor]:
    """Cuts the pool of ``dtype``; of another type, of which a model has few, a tensor of its own is drawn."""

    def cut(shape: tuple[int, ...], of: torch.dtype) -> Tensor:
        if of == dtype:
            return pool(dtype, device).cut(*shape)
        return random_tensor(torch.empty(shape, dtype=of, device=device), 0, 0, "few", fan_in=2048)

    return cut


@lru_cache(maxsize=1)
def expert_weights(
    experts: int, matrices: int, ffn: int, hidden: int, layers: int, dtype: torch.dtype, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Weights of one layer after the other, endlessly; all calls of one shape take turns on one iterator.

    As many layers as the model has, or as many as are cold when their turn comes again.
    """
    each = experts * (matrices + 1) * ffn * hidden
    count = max(1, min(layers, -(-COLD_BYTES // (each * dtype.itemsize))))
    flat = pool(dtype, device).cut(count, each)
    inner = experts * matrices * ffn * hidden
    return cycle([(w[:inner].view(experts, matrices, ffn, hidden), w[inner:].view(experts, hidden, ffn)) for w in flat])


@lru_cache(maxsize=1)
def resting_weights(matrices: int, ffn: int, hidden: int, dtype: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Those of one expert after the other in memory of the host, endlessly, as ``expert_weights``."""
    each = (matrices + 1) * ffn * hidden
    count = min(max(1, -(-COLD_BYTES // (each * dtype.itemsize))), MOST_RESTING)
    flat = Pool(dtype, HOST).cut(count, each)
    inner = matrices * ffn * hidden
    return cycle([(w[:inner].view(1, matrices, ffn, hidden), w[inner:].view(1, hidden, ffn)) for w in flat])


def forget() -> None:
    """Free the memory that calls have in common."""
    expert_weights.cache_clear()
    resting_weights.cache_clear()
    pool.cache_clear()
    built.cache_clear()
