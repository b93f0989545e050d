"""Key/value cache of one device: preallocated, appended in place."""

from collections.abc import Mapping
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


@dataclass(frozen=True, eq=False)
class Stack:
    """The caches of layers with equal heads in one piece: keys, values: [layers * S, kv_heads, capacity, head_dim].

    first: of each of these layers, the row of its first sequence.
    """

    keys: Tensor
    values: Tensor
    first: dict[int, int]

    def places(self, sequences: Mapping[int, Tensor]) -> Tensor:
        """[N] int64 rows of some layers' ``sequences`` (each [n], counted from the first that is held)."""
        found = [self.first[i] + held for i, held in sequences.items() if i in self.first]
        return torch.cat([torch.empty(0, dtype=torch.int64, device=self.keys.device), *found])


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
        self.layers: list[LayerCache | None] = [None] * len(model.layers)
        self._kv: list[Range] = [(0, 0)] * len(model.layers)
        self.stacks: list[Stack] = []
        count, alike = sequences[1] - sequences[0], dict[tuple[int, int], list[int]]()
        for i, block in enumerate(model.layers):
            if block.attention is not None:
                first, last = self._kv[i] = kv_range(block.attention, heads or (0, block.attention.heads))
                alike.setdefault((last - first, block.attention.head_dim), []).append(i)
        for (kv_heads, head_dim), layers in alike.items():
            shape = (len(layers) * count, kv_heads, capacity, head_dim)
            keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.stacks.append(Stack(keys, values, {i: j * count for j, i in enumerate(layers)}))
            for j, i in enumerate(layers):
                own = slice(j * count, (j + 1) * count)
                self.layers[i] = LayerCache(keys[own], values[own])

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
