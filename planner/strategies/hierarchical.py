"""hierarchical: tokens travel to hosts, one row per token and host, then inside them; partial sums come back."""

from collections.abc import Sequence

import numpy as np

from ...spec.levels import across_groups, inside_groups
from ...spec.operators import Part, Shape, levels_shape
from ...spec.plan import LayerPlan
from ..stages import Stage, compute, exchange
from .layer import Layer, attention, route, shared

COUNT_BYTES = 16  # two int64 per pair, one for each level, exchanged before the rows


def build(layer: Layer, plans: Sequence[LayerPlan]) -> list[Stage]:
    """Attention, route, pack, counts, across hosts, relay, inside hosts, unpack, experts, back inside, add, back
    across, combine, shared experts."""
    costs, hosts = layer.costs, layer.costs.hosts
    sent, across, inside = layer.choices.forward(plans), across_groups(hosts), inside_groups(hosts)
    row, activation = layer.row_bytes, layer.activation_bytes
    out = costs.all_to_all_in(across, sent.across.times(row)), costs.all_to_all_in(inside, sent.inside.times(row))
    home = (
        costs.all_to_all_in(inside, sent.inside.back().times(activation)),
        costs.all_to_all_in(across, sent.across.back().times(activation)),
    )
    return [
        *before(layer),
        exchange("dispatch", "across hosts", out[:1]),
        _each(layer, "dispatch", "hierarchical_relay", sent.arrived),
        exchange("dispatch", "inside hosts", out[1:]),
        layer.each("dispatch", "ep_unpack", sent.computed),
        layer.experts(sent.experts),
        exchange("combine", "back inside hosts", home[:1]),
        _each(layer, "combine", "hierarchical_add", sent.arrived),
        exchange("combine", "back across hosts", home[1:]),
        *after(layer),
    ]


def before(layer: Layer) -> list[Stage]:
    """What no placement changes, up to the first exchange of rows."""
    counts = layer.costs.scatter(layer.devices, np.full((1, len(layer.devices)), COUNT_BYTES))
    pack = _each(layer, "dispatch", "hierarchical_pack", layer.tokens)
    return [*attention(layer), *route(layer), pack, exchange("dispatch", "exchange counts", [counts])]


def after(layer: Layer) -> list[Stage]:
    """What no placement changes, from when the rows are back."""
    return [_each(layer, "combine", "hierarchical_combine", layer.tokens), *shared(layer)]


def least(layer: Layer) -> float:
    """Seconds that both exchanges of rows take at least, one way: what whoever takes part spends."""
    levels = (across_groups(layer.costs.hosts), inside_groups(layer.costs.hosts))
    return sum(min(layer.costs.least("all_to_all", group) for group in groups) for groups in levels)


def shape(layer: Layer) -> Shape:
    """Of this strategy's own operators."""
    return levels_shape(layer.block, layer.layout.devices, len(set(layer.costs.hosts)))


def _each(layer: Layer, part: Part, operator: str, rows: np.ndarray) -> Stage:
    """One call of such an operator on every device with its number of rows, [G] or [B, G]."""
    return compute(part, operator, layer.costs.operator(operator, shape(layer), tokens=rows))
