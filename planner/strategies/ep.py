"""ep: tokens travel to their experts and back, one row per token and distinct destination device.

In chunks, the dispatch of all is started at once; the experts of one run while the next ones travel, and its rows
travel back while the experts of the next run. In a layer with a shortcut the backbone runs beside all this.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain

import numpy as np

from ...spec.operators import batch_shape
from ...spec.plan import LayerPlan
from ..stages import Stage, compute, exchange, start, wait
from .layer import Layer, attention, dense, route, shared

COUNT_BYTES = 8  # one int64 per pair and chunk, exchanged before the rows


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, counts, dispatch, unpack, experts, combine, shared experts."""
    if layer.block.shortcut != "none":
        return _beside(layer, plans)
    if plans[0].chunks > 1:
        there, compute, back = flight(layer, plans)
        return [*before(layer, plans[0].chunks, tables(layer, plans)), *there, *compute, *back, *shared(layer)]
    costs, group = layer.costs, layer.devices
    sent = layer.choices.dispatch(plans)
    out = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
    home = costs.all_to_all(group, sent.back.times(layer.activation_bytes))
    return [
        *before(layer, decided=tables(layer, plans)),
        exchange("dispatch", "all_to_all", [out]),
        layer.each("dispatch", "ep_unpack", sent.computed),
        layer.experts(sent.experts),
        exchange("combine", "all_to_all", [home]),
        *after(layer),
    ]


def flight(layer: Layer, plans: Sequence[LayerPlan]) -> tuple[list[Stage], list[Stage], list[Stage]]:
    """Starts of all dispatches; each chunk awaited, its experts, the start of its way back; all awaited and added up.

    The dispatch of chunk c is collective c, its way back collective ``chunks`` + c.
    """
    costs, group, count = layer.costs, layer.devices, plans[0].chunks
    starts, compute, ends = list[Stage](), list[Stage](), list[Stage]()
    for c, part in enumerate(layer.chunks(count)):
        sent = part.choices.dispatch(plans)
        there = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
        back = costs.all_to_all(group, sent.back.times(layer.activation_bytes))
        starts.append(start("dispatch", f"all_to_all {c}", there, costs.busy(there), c))
        compute += [
            wait("dispatch", len(group), c),
            part.each("dispatch", "ep_unpack", sent.computed),
            part.experts(sent.experts),
            start("combine", f"all_to_all {c}", back, costs.busy(back), count + c),
        ]
        ends += [wait("combine", len(group), count + c), part.each("combine", "ep_combine", part.tokens)]
    return starts, compute, ends


def _beside(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Experts beside the operators of the shortcut's window, before the one that the plan's slot says."""
    first, operators = window(layer)
    there, compute, back = flight(layer, plans)
    operators.insert(plans[0].slot, compute)
    return [
        *first,
        *before(layer, plans[0].chunks, tables(layer, plans)),
        *there,
        *(stage for part in operators for stage in part),
        *back,
    ]


def window(layer: Layer) -> tuple[list[Stage], list[list[Stage]]]:
    """What comes before the state that the experts read, and the operators of ``spec.shortcut.WINDOWS``."""
    own = [attention(layer), [*dense(layer), *shared(layer)]]
    if layer.before is None:
        return [], own
    earlier = [
        [replace(stage, earlier=True) for stage in stages] for stages in (attention(layer.before), dense(layer.before))
    ]
    if layer.block.shortcut == "mid":
        return earlier[0], [earlier[1], *own]
    return [], [*earlier, *own]


def tables(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Where shares are decided by batch: the counts of all devices added up, and tables made of them."""
    if plans[0].speeds is None:
        return []
    experts = layer.moe.num_experts
    copied = np.array([[sum(n > 1 for n in Counter(chain(*plan.slots)).values())] for plan in plans])
    added = layer.costs.all_reduce(layer.devices, COUNT_BYTES * experts)
    seconds = layer.costs.operator(
        "by_batch", batch_shape(layer.block, len(layer.devices)), copied=np.maximum(copied, 1)
    )
    return [exchange("dispatch", "all_reduce", [added]), compute("dispatch", "by_batch", seconds)]


def before(layer: Layer, chunks: int = 1, decided: Sequence[Stage] = (), told: int = 0) -> list[Stage]:
    """What no placement changes, up to the exchange of rows; decided: before tokens are packed; told: numbers that
    every device is told beside how many rows come."""
    counts = layer.costs.scatter(layer.devices, np.full((1, len(layer.devices)), COUNT_BYTES * (chunks + told)))
    pack = [part.each("dispatch", "ep_pack", part.tokens) for part in layer.chunks(chunks)]
    backbone = attention(layer) if layer.block.shortcut == "none" else []
    return [*backbone, *route(layer), *decided, *pack, exchange("dispatch", "exchange counts", [counts])]


def after(layer: Layer) -> list[Stage]:
    """What no placement changes, from when the rows are back."""
    combine = layer.each("combine", "ep_combine", layer.tokens)
    return [combine, *shared(layer)] if layer.block.shortcut == "none" else [combine]


def least(layer: Layer) -> float:
    """Seconds that the exchange of rows takes at least, one way: what whoever takes part spends."""
    return layer.costs.least("all_to_all", layer.devices)
