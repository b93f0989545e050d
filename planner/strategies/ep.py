"""ep: tokens travel to their experts and back, one row per token and distinct destination device."""

import numpy as np

from ...spec.plan import LayerPlan
from ...spec.routing import COPY_PHASES, COPY_STEP, copy_table
from ..graph import Graph
from .layer import Layer, attention, route, shared

COUNT_BYTES = 8  # one int64 per pair, exchanged before the rows


def build(graph: Graph, layer: Layer, plan: LayerPlan) -> None:
    """Emit one layer: attention, route, pack, counts, dispatch, unpack, experts, combine, shared experts."""
    costs, group, n = layer.costs, layer.devices, layer.layout.devices
    rows, counts = dispatched(layer, plan)
    received = rows.sum(0)
    attention(graph, layer)
    route(graph, layer)
    layer.each(graph, "dispatch", "ep_pack", layer.layout.tokens)
    graph.exchange("dispatch", "exchange counts", costs.all_to_all(group, np.full((n, n), COUNT_BYTES)))
    graph.exchange("dispatch", "all_to_all", costs.all_to_all(group, rows * layer.row_bytes))
    layer.each(graph, "dispatch", "ep_unpack", received)
    for device in group:
        seconds = float(costs.expert_ffn(device, layer.block, layer.moe.ffn_size, counts[device]))
        graph.compute(device, "expert", "expert_ffn", seconds)
    graph.exchange("combine", "all_to_all", costs.all_to_all(group, rows.T * layer.activation_bytes))
    layer.each(graph, "combine", "ep_combine", layer.layout.tokens)
    shared(graph, layer)


def dispatched(layer: Layer, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    """Rows sent [source, target], and rows that each expert computes [device, expert]."""
    if plan not in layer.memo:
        layer.memo[plan] = _dispatched(layer, plan)
    return layer.memo[plan]


def _dispatched(layer: Layer, plan: LayerPlan) -> tuple[np.ndarray, np.ndarray]:
    n, experts, source = layer.layout.devices, layer.moe.num_experts, layer.layout.source
    if sum(map(len, plan.slots)) == experts:
        owner = np.empty(experts, int)
        for device, held in enumerate(plan.slots):
            owner[list(held)] = device
        target = owner[layer.experts]
    else:
        table = copy_table(plan.slots, plan.shares, layer.costs.hosts, experts)
        phase = (np.arange(len(source)) * COPY_STEP) % COPY_PHASES
        target = table[source[:, None], layer.experts, phase[:, None]]
    wanted = np.zeros((len(source), n))
    np.put_along_axis(wanted, target, 1, axis=1)
    ends = np.cumsum((0, *layer.layout.tokens))
    rows = np.diff(np.vstack([np.zeros(n), np.cumsum(wanted, axis=0)])[ends], axis=0)
    counts = np.bincount((target * experts + layer.experts).ravel(), minlength=n * experts).reshape(n, experts)
    return rows, counts
