"""Transformers' caches: filled for a context that nobody computed, and put back as they were after a step.

Letters: B sequences, H heads, L tokens in the cache, D size of a head.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Fill = Callable[[tuple[int, ...], Tensor, int, str], Tensor]
"""Values [B, H, L, D] for (shape, a tensor of the same kind, layer, "keys" or "values")."""
FILLED = (
    "DynamicLayer",
    "DynamicSlidingWindowLayer",
    "DynamicIndexedLayer",
    "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer",
    "LinearAttentionAndSlidingWindowAttentionLayer",
    "DummyLayer",
)
"""Classes of cached layers that hold keys and values by token, a state of fixed size, both, or nothing."""
STATES = ("conv_states", "recurrent_states")
"""Of a cached layer, its states of fixed size."""


def empty_cache(config: Any) -> Any:
    """A cache for every layer of a configuration, nothing in it."""
    from transformers import DynamicCache

    return DynamicCache(config=config)


def kept(cache: Any) -> list[dict[str, Any]]:
    """What the layers of a cache hold now; see ``put_back``. States of fixed size are not copied."""
    return [_copied(vars(layer)) for layer in cache.layers]


def put_back(cache: Any, held: Sequence[dict[str, Any]]) -> None:
    """The cache as it was when ``kept`` was asked, but for what was written in place."""
    for layer, attributes in zip(cache.layers, held, strict=True):
        vars(layer).clear()
        vars(layer).update(_copied(attributes))


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    return {key: value.copy() if isinstance(value, dict | list) else value for key, value in attributes.items()}


def pretend(cache: Any, sequences: int, context: int, device: torch.device, but: int = -1) -> None:
    """Have every layer (``but`` one) say that it holds ``context`` tokens, for masks and positions alone."""
    for i, layer in enumerate(cache.layers):
        if i != but and hasattr(layer, "update"):
            layer.is_initialized = True
            length = _remembered(layer, context)
            layer.keys = layer.values = torch.zeros((sequences, 1, length, 1), device=device)


def extend(cache: Any, context: int, fill: Fill, layers: Sequence[int]) -> None:
    """Layers that hold one token, all of kinds that are ``FILLED``, now hold ``context``."""
    for i in layers:
        layer = cache.layers[i]
        if isinstance(index := getattr(layer, "indexer_keys", None), Tensor):  # [B, L, D]
            layer.indexer_keys = fill((index.shape[0], context, index.shape[2]), index, i, "index")
        if getattr(layer, "keys", None) is None or not layer.keys.numel():
            continue
        length = _remembered(layer, context)
        for key in ("keys", "values"):
            one = getattr(layer, key)
            setattr(layer, key, fill((*one.shape[:2], length, one.shape[3]), one, i, key))


def unknown(cache: Any) -> str:
    """The first kind of layers that ``extend`` does not know; "" where there is none."""
    kinds = (type(layer).__name__ for layer in cache.layers)
    return next((kind for kind in kinds if kind not in FILLED), "")


def _remembered(layer: Any, context: int) -> int:
    """Tokens of a context that the layer keeps."""
    if hasattr(layer, "cumulative_length"):
        layer.cumulative_length = context
    return min(context, layer.sliding_window - 1) if getattr(layer, "is_sliding", False) else context


def held_values(cache: Any, tokens: int) -> list[tuple[int, int]]:
    """Of every layer of a cache that holds so many tokens of one sequence: values per token, and in states."""
    return [(_count(_by_token(layer)) // tokens, _count(_states(layer))) for layer in cache.layers]


def _by_token(layer: Any) -> list[Any]:
    return [getattr(layer, key, None) for key in ("keys", "values", "indexer_keys")]


def _states(layer: Any) -> list[Any]:
    held = [getattr(layer, key, None) for key in STATES]
    return [state for states in held if isinstance(states, list | dict) for state in _listed(states)]


def _listed(states: Any) -> list[Any]:
    return list(states.values()) if isinstance(states, dict) else states


def _count(tensors: Sequence[Any]) -> int:
    return sum(t.numel() for t in tensors if isinstance(t, Tensor))


def refill_states(cache: Any, fill: Fill, layers: Sequence[int]) -> None:
    """Other values for the states of fixed size that these layers hold."""
    for i in layers:
        for key in STATES:
            states = getattr(cache.layers[i], key, None)
            for number, state in enumerate(_listed(states)) if isinstance(states, list | dict) else ():
                if isinstance(state, Tensor):
                    state.copy_(fill(tuple(state.shape), state, i, f"{key}.{number}"))
