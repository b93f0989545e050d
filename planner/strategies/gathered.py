"""gathered: the layer's experts travel to every device while attention runs; tokens stay."""

from collections.abc import Sequence

import numpy as np

from ...spec.plan import LayerPlan
from ..choices import held
from ..stages import Stage, compute, start, wait
from .layer import Layer, attention, route, shared


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Start of the gather, attention, route, wait for weights, experts, residual, shared experts."""
    costs, group = layer.costs, layer.devices
    expert_bytes = layer.moe.expert_parameters(layer.block.hidden_size) * costs.element_bytes
    own = np.array([held(plan) for plan in plans]) * expert_bytes
    own = own[:1] if (own == own[0]).all() else own  # layers whose experts rest alike are one gather
    gather = costs.all_gather(group, own)
    bandwidth = np.array([kind.stream_bandwidth for kind in costs.cluster.kinds])[costs.kinds]
    return [
        start("gather", "all_gather", gather, costs.busy(gather)),
        # Its own experts are copied into the region while the others' are under way: read and written once each.
        compute("gather", "copy own experts", 2 * own / bandwidth),
        *attention(layer),
        *route(layer),
        wait("gather", len(group)),
        layer.experts(layer.choices.own),
        layer.each("combine", "gathered_combine", layer.tokens),
        *shared(layer),
    ]
