"""sharded: all tokens to all devices; each computes its FFN columns of every expert; the partial sums travel back."""

from collections.abc import Sequence

import numpy as np

from ...spec.plan import LayerPlan
from ..stages import Stage, compute, exchange
from .layer import Layer, attention, route, shared


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, all-gather, unpack, experts, partials back, sum, shared experts."""
    costs, group, tokens = layer.costs, layer.devices, layer.tokens
    gather = costs.all_gather(group, tokens[None] * layer.row_bytes)
    partials = costs.scatter(group, tokens[None] * layer.activation_bytes)  # to each owner, its tokens' rows
    return [
        *attention(layer),
        *route(layer),
        layer.each("dispatch", "sharded_pack", tokens),
        exchange("dispatch", "all_gather", [gather]),
        layer.each("dispatch", "sharded_unpack", tokens.sum()),
        compute("expert", "expert_ffn", _experts(layer, np.array([plan.split for plan in plans]))),
        exchange("combine", "all_to_all", [partials]),
        layer.each("combine", "sharded_combine", tokens),
        *shared(layer),
    ]


def _experts(layer: Layer, columns: np.ndarray) -> np.ndarray:
    """[B, G] seconds of [B, G] columns of all experts; devices of one kind with equal columns are read once."""
    costs = layer.costs
    index = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
    calls = np.stack([index, np.broadcast_to(costs.kinds, columns.shape), columns]).reshape(3, -1)
    distinct, first, place = np.unique(calls, axis=1, return_index=True, return_inverse=True)
    counts = layer.choices.total[distinct[0]]
    seconds = costs.expert_ffn(layer.block, distinct[2], counts, first % columns.shape[1])
    return seconds[place.ravel()].reshape(columns.shape)
