"""Key/value cache of one device: preallocated, appended in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..spec import Model
from .random_weights import random_tensor
from .weights import Range, kv_range


@dataclass(frozen=True, eq=False)
class LayerCache:
    """keys, values: [sequences, kv_heads, capacity, head_dim]."""

    keys: Tensor
    values: Tensor


class KVCache:
    """The caches of all layers for the sequences and heads that one device holds.

    sequences: range of global sequence numbers; heads: range of query heads (None: all); capacity: positions.
    """

    def __init__(
        self,
        model: Model,
        sequences: Range,
        capacity: int,
        dtype: torch.dtype,
        device: torch.device,
        heads: Range | None = None,
    ) -> None:
        self.sequences, self.capacity = sequences, capacity
        self.layers: list[LayerCache | None] = []
        self._kv: list[Range] = []
        for block in model.layers:
            a = block.attention
            if a is None:
                self.layers.append(None)
                self._kv.append((0, 0))
                continue
            first, last = kv_range(a, heads or (0, a.heads))
            shape = (sequences[1] - sequences[0], last - first, capacity, a.head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.layers.append(LayerCache(keys, values))
            self._kv.append((first, last))

    def fill(self, context: int, seed: int) -> None:
        """Put seeded random keys and values of about unit variance at the first ``context`` positions.

        The value at (layer, sequence, kv head, position) depends on nothing else than these and the seed, so that
        devices that divide sequences and heads in any way together hold what one process would.
        """
        for i, cache in enumerate(self.layers):
            if cache is None:
                continue
            for name, tensor in (("keys", cache.keys), ("values", cache.values)):
                for s in range(tensor.shape[0]):
                    for h in range(tensor.shape[1]):
                        key = (self.sequences[0] + s) << 16 | (self._kv[i][0] + h)
                        random_tensor(tensor[s, h, :context], seed, i, f"cache.{name}", key, fan_in=1)
