"""ep: tokens travel to their experts and back, one row per token and distinct destination device."""

from collections.abc import Sequence

import numpy as np

from ...spec.plan import LayerPlan
from ..stages import Stage, exchange
from .layer import Layer, attention, route, shared

COUNT_BYTES = 8  # one int64 per pair, exchanged before the rows


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, counts, dispatch, unpack, experts, combine, shared experts."""
    costs, group = layer.costs, layer.devices
    sent = layer.choices.dispatch(plans)
    counts = costs.scatter(group, np.full((1, len(group)), COUNT_BYTES))
    there = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
    back = costs.all_to_all(group, sent.rows.back().times(layer.activation_bytes))
    return [
        *attention(layer),
        *route(layer),
        layer.each("dispatch", "ep_pack", layer.tokens),
        exchange("dispatch", "exchange counts", [counts]),
        exchange("dispatch", "all_to_all", [there]),
        layer.each("dispatch", "ep_unpack", sent.computed),
        layer.experts(layer.moe.ffn_size, sent.counts),
        exchange("combine", "all_to_all", [back]),
        layer.each("combine", "ep_combine", layer.tokens),
        *shared(layer),
    ]
