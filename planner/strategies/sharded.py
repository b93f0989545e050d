"""sharded: all tokens to all devices; each computes its FFN columns of every expert; the partial sums travel back.

In chunks, the all-gathers of all start at once, one after another; the experts of one run while the next ones travel,
and its partial sums travel back while the experts of the next run.
"""

from collections.abc import Sequence

import numpy as np

from ...spec.plan import LayerPlan
from ..costs import Exchange
from ..stages import Stage, compute, exchange, start, wait
from .layer import Layer, attention, route, shared


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, all-gather, unpack, experts, partials back, sum, shared experts."""
    columns = np.array([plan.split for plan in plans])
    before = [*attention(layer), *route(layer), layer.each("dispatch", "sharded_pack", layer.tokens)]
    if plans[0].chunks > 1:
        return [*before, *_flight(layer, columns, plans[0].chunks), *shared(layer)]
    gather, partials = _moved(layer)
    return [
        *before,
        exchange("dispatch", "all_gather", [gather]),
        *_computed(layer, columns),
        exchange("combine", "all_to_all", [partials]),
        layer.each("combine", "sharded_combine", layer.tokens),
        *shared(layer),
    ]


def _flight(layer: Layer, columns: np.ndarray, count: int) -> list[Stage]:
    """Tokens in chunks; the all-gather of chunk c is collective c, its partial sums are collective ``count`` + c."""
    costs, devices = layer.costs, layer.layout.devices
    starts, computed, ends = list[Stage](), list[Stage](), list[Stage]()
    for c, part in enumerate(layer.chunks(count)):
        gather, partials = _moved(part)
        starts.append(start("dispatch", f"all_gather {c}", gather, costs.busy(gather), c))
        computed += [
            wait("dispatch", devices, c),
            *_computed(part, columns),
            start("combine", f"all_to_all {c}", partials, costs.busy(partials), count + c),
        ]
        ends += [wait("combine", devices, count + c), part.each("combine", "sharded_combine", part.tokens)]
    return [*starts, *computed, *ends]


def _moved(layer: Layer) -> tuple[Exchange, Exchange]:
    """All tokens to all devices, and to each token's owner the partial rows of all others."""
    costs, group, own = layer.costs, layer.devices, layer.tokens[None]
    return costs.all_gather(group, own * layer.row_bytes), costs.scatter(group, own * layer.activation_bytes)


def _computed(layer: Layer, columns: np.ndarray) -> list[Stage]:
    """Of all tokens; columns: [B, G]."""
    unpack = layer.each("dispatch", "sharded_unpack", layer.tokens.sum())
    return [unpack, compute("expert", "expert_ffn", _experts(layer, columns))]


def _experts(layer: Layer, columns: np.ndarray) -> np.ndarray:
    """[B, G] seconds of [B, G] columns of all experts; devices of one kind with equal columns are read once."""
    costs = layer.costs
    index = np.broadcast_to(np.arange(len(columns))[:, None], columns.shape)
    calls = np.stack([index, np.broadcast_to(costs.kinds, columns.shape), columns]).reshape(3, -1)
    distinct, first, place = np.unique(calls, axis=1, return_index=True, return_inverse=True)
    counts = layer.choices.total[distinct[0]]
    seconds = costs.expert_ffn(layer.block, distinct[2], counts, first % columns.shape[1])
    return seconds[place.ravel()].reshape(columns.shape)
