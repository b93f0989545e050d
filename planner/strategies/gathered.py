"""gathered: the layer's experts travel to every device while attention runs; tokens stay."""

import numpy as np

from ...spec.plan import LayerPlan
from ..graph import Graph
from .layer import Layer, attention, route, shared


def build(graph: Graph, layer: Layer, plan: LayerPlan) -> None:
    """Emit one layer: start of the gather, attention, route, wait for weights, experts, residual, shared experts."""
    costs, group = layer.costs, layer.devices
    expert_bytes = layer.moe.expert_parameters(layer.block.hidden_size) * costs.element_bytes
    held = np.array([len(experts) for experts in plan.resting()])
    pending = graph.start("gather", "all_gather", costs.all_gather(group, held * expert_bytes))
    for device in group:
        # Its own experts are copied into the region while the others' are under way: read and written once each.
        seconds = 2 * held[device] * expert_bytes / costs.cluster.kind_of(device).stream_bandwidth
        graph.compute(device, "gather", "copy own experts", float(seconds))
    attention(graph, layer)
    route(graph, layer)
    graph.wait("gather", pending)
    for device in group:
        seconds = float(costs.expert_ffn(device, layer.block, layer.moe.ffn_size, layer.own_counts[device]))
        graph.compute(device, "expert", "expert_ffn", seconds)
    layer.each(graph, "combine", "gathered_combine", layer.layout.tokens)
    shared(graph, layer)
