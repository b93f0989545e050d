"""A context that nobody computed: random, the same however devices divide the sequences."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..random_weights import random_tensor
from .cache import empty_cache, extend, kept, put_back, refill_states
from .net import Net


class Past:
    """The cache of a net for the sequences [first, end) of a step.

    one_token: called with ids [B, 1] and an empty cache; it runs the net's layers so that the cache takes shape.
    """

    def __init__(
        self, net: Net, sequences: tuple[int, int], one_token: Callable[[Tensor, Any], None], layers: int
    ) -> None:
        self._net, self._sequences, self._one_token = net, sequences, one_token
        self._layers, self.cache = layers, empty_cache(net.config)
        self._held = kept(self.cache)
        self._filled = (0, 0)

    @torch.inference_mode()
    def fill(self, context: int, seed: int) -> None:
        """``context`` random tokens in every layer."""
        self.cache, self._filled = empty_cache(self._net.config), (context, seed)
        first, end = self._sequences
        if context and end > first:
            ids = torch.zeros((end - first, 1), dtype=torch.long, device=self._net.model.device)
            self._one_token(ids, self.cache)

            def draw(shape: tuple[int, ...], like: Tensor, layer: int, name: str) -> Tensor:
                out = torch.empty(shape, dtype=like.dtype, device=like.device)
                for s in range(shape[0]):
                    random_tensor(out[s], seed, layer, f"cache.{name}", first + s, fan_in=1)
                return out

            extend(self.cache, context, draw, range(self._layers))
            refill_states(self.cache, draw, range(self._layers))
        self._held = kept(self.cache)

    def again(self) -> Any:
        """The cache as it was filled; what a step changed in place stays changed."""
        put_back(self.cache, self._held)
        return self.cache

    def anew(self) -> Any:
        """The cache, filled once more."""
        self.fill(*self._filled)
        return self.cache
