"""sharded: all tokens to all devices; each computes its FFN columns of every expert; the partial sums travel back."""

import numpy as np

from ...spec.plan import LayerPlan
from ..graph import Graph
from .layer import Layer, attention, route, shared


def build(graph: Graph, layer: Layer, plan: LayerPlan) -> None:
    """Emit one layer: attention, route, pack, all-gather, unpack, experts, partials back, sum, shared experts."""
    assert plan.split is not None
    costs, group, n = layer.costs, layer.devices, layer.layout.devices
    tokens = np.array(layer.layout.tokens)
    counts = layer.own_counts.sum(0)
    attention(graph, layer)
    route(graph, layer)
    layer.each(graph, "dispatch", "sharded_pack", tokens)
    graph.exchange("dispatch", "all_gather", costs.all_gather(group, tokens * layer.row_bytes))
    layer.each(graph, "dispatch", "sharded_unpack", [tokens.sum()] * n)
    for device, columns in enumerate(plan.split):
        seconds = float(costs.expert_ffn(device, layer.block, columns, counts))
        graph.compute(device, "expert", "expert_ffn", seconds)
    partials = np.tile(tokens * layer.activation_bytes, (n, 1))  # to each owner, its tokens' rows
    graph.exchange("combine", "all_to_all", costs.all_to_all(group, partials))
    layer.each(graph, "combine", "sharded_combine", tokens)
    shared(graph, layer)
