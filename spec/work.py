"""What an operator's call has to do, from its axes alone: how it grows where it was not measured.

Only proportions count. An operator's parts are in one unit of its own, so that their sum is its work:

- ``attention_prefill``: FLOPs of the projections, and of the products of queries with keys and of these with values,
  of which a causal mask leaves half. A window masks, and saves nothing.
- ``attention_decode``, ``attention_scattered``: values that go through the device: the projections' weights, the
  tokens', and the cache's.
- ``mixer_prefill``, ``mixer_decode``: the same parts of a layer that is known by its size: hidden times hidden for a
  token, hidden for a pair of tokens; a mixer whose state has a fixed size is measured to take nothing for pairs.
- all others: rows, times the experts and columns that a row meets.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from .operators import OPERATORS, Shape

BENT = {"attention_prefill": ("length",), "mixer_prefill": ("length",)}
"""Axes along which an operator's work is no straight line."""
TOKEN_ROWS = 8  # rows of the model's size that attention reads or writes for a token: norm, queries, outputs, residual


def work(operator: str, shape: Shape, at: Mapping[str, ArrayLike]) -> np.ndarray:
    """[parts, ...] of calls at these coordinates (one for each axis of the operator), which broadcast to [...].

    Each part is a product of a number of the shape and powers of the coordinates: none falls where a coordinate rises.
    """
    values = np.broadcast_arrays(*(np.asarray(at[axis], float) for axis in OPERATORS[operator].axes))
    if operator == "attention_prefill":
        sequences, length = values
        mixed = int(shape["heads"]) * int(shape["head_dim"])
        return np.stack([2 * _projections(shape) * sequences * length, 2 * mixed * sequences * length**2])
    if operator in ("attention_decode", "attention_scattered"):
        sequences, context = values
        row = 2 * int(shape["kv_heads"]) * int(shape["head_dim"])
        tokens = TOKEN_ROWS * int(shape["hidden"]) * sequences
        return np.stack([np.full(sequences.shape, float(_projections(shape))), tokens, row * sequences * context])
    if operator in ("mixer_prefill", "mixer_decode"):
        (sequences, other), hidden = values, float(shape["hidden"])
        if operator == "mixer_prefill":
            return np.stack([hidden * sequences * other, sequences * other**2]) * hidden
        return np.stack([np.full(sequences.shape, hidden), TOKEN_ROWS * sequences, sequences * other]) * hidden
    return np.prod(values, axis=0)[None]


def _projections(shape: Shape) -> int:
    """Values of the weights of queries, keys, values and output."""
    heads, kv_heads = int(shape["heads"]), int(shape["kv_heads"])
    return int(shape["hidden"]) * int(shape["head_dim"]) * 2 * (heads + kv_heads)
