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
    there = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
    back = costs.all_to_all(group, sent.back.times(layer.activation_bytes))
    return [
        *before(layer),
        exchange("dispatch", "all_to_all", [there]),
        layer.each("dispatch", "ep_unpack", sent.computed),
        layer.experts(sent.experts),
        exchange("combine", "all_to_all", [back]),
        *after(layer),
    ]


def before(layer: Layer) -> list[Stage]:
    """What no placement changes, up to the exchange of rows."""
    counts = layer.costs.scatter(layer.devices, np.full((1, len(layer.devices)), COUNT_BYTES))
    pack = layer.each("dispatch", "ep_pack", layer.tokens)
    return [*attention(layer), *route(layer), pack, exchange("dispatch", "exchange counts", [counts])]


def after(layer: Layer) -> list[Stage]:
    """What no placement changes, from when the rows are back."""
    return [layer.each("combine", "ep_combine", layer.tokens), *shared(layer)]


def least(layer: Layer) -> float:
    """Seconds that the exchange of rows takes at least, one way: what whoever takes part spends."""
    return layer.costs.least("all_to_all", layer.devices)
