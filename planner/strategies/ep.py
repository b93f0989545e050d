"""ep: tokens travel to their experts and back, one row per token and distinct destination device.

In chunks, the dispatch of all is started at once; the experts of one run while the next ones travel, and its rows
travel back while the experts of the next run.
"""

from collections.abc import Sequence

import numpy as np

from ...spec.plan import LayerPlan
from ..stages import Stage, exchange, start, wait
from .layer import Layer, attention, route, shared

COUNT_BYTES = 8  # one int64 per pair and chunk, exchanged before the rows


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, counts, dispatch, unpack, experts, combine, shared experts."""
    if plans[0].chunks > 1:
        return _chunked(layer, plans, plans[0].chunks)
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


def _chunked(layer: Layer, plans: Sequence[LayerPlan], count: int) -> list[Stage]:
    """Dispatch c is collective c, its way back collective ``count`` + c."""
    costs, group, parts = layer.costs, layer.devices, layer.chunks(count)
    dispatches = [part.choices.dispatch(plans) for part in parts]
    stages = before(layer, count)
    for c, sent in enumerate(dispatches):
        there = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
        stages.append(start("dispatch", f"all_to_all {c}", there, costs.busy(there), c))
    for c, (part, sent) in enumerate(zip(parts, dispatches, strict=True)):
        back = costs.all_to_all(group, sent.back.times(layer.activation_bytes))
        stages += [
            wait("dispatch", len(group), c),
            part.each("dispatch", "ep_unpack", sent.computed),
            part.experts(sent.experts),
            start("combine", f"all_to_all {c}", back, costs.busy(back), count + c),
        ]
    for c, part in enumerate(parts):
        stages += [wait("combine", len(group), count + c), part.each("combine", "ep_combine", part.tokens)]
    return [*stages, *shared(layer)]


def before(layer: Layer, chunks: int = 1) -> list[Stage]:
    """What no placement changes, up to the exchange of rows."""
    counts = layer.costs.scatter(layer.devices, np.full((1, len(layer.devices)), COUNT_BYTES * chunks))
    pack = [part.each("dispatch", "ep_pack", part.tokens) for part in layer.chunks(chunks)]
    return [*attention(layer), *route(layer), *pack, exchange("dispatch", "exchange counts", [counts])]


def after(layer: Layer) -> list[Stage]:
    """What no placement changes, from when the rows are back."""
    return [layer.each("combine", "ep_combine", layer.tokens), *shared(layer)]
