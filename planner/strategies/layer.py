"""What the strategies' builders have in common: a layer's input, attention, router and shared experts.

Letters: T tokens, D model, K top-k.
"""

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...spec.model import Block, Moe
from ...spec.operators import Shape, attention_shape, dense_shape, exchange_shape, route_shape, row_bytes
from ...spec.plan import LayerPlan
from ..costs import Costs
from ..graph import Graph
from ..layout import Layout


@dataclass(frozen=True)
class Layer:
    """One layer of a step: block, the step's tokens on their devices, and their experts (ids [T, K]; None if dense)."""

    costs: Costs
    block: Block
    layout: Layout
    ids: np.ndarray | None = None
    memo: dict[LayerPlan, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)  # what ``ep.dispatched`` found

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(range(self.layout.devices))

    @property
    def moe(self) -> Moe:
        assert self.block.moe is not None
        return self.block.moe

    @property
    def experts(self) -> np.ndarray:
        assert self.ids is not None
        return self.ids

    @property
    def activation_bytes(self) -> int:
        """Bytes of one token's activation."""
        return self.block.hidden_size * self.costs.element_bytes

    @property
    def row_bytes(self) -> int:
        return row_bytes(self.block, self.costs.element_bytes)

    @cached_property
    def shape(self) -> Shape:
        return exchange_shape(self.block, self.layout.devices)

    @cached_property
    def own_counts(self) -> np.ndarray:
        """[devices, experts] tokens of each device that chose each expert."""
        experts = self.moe.num_experts
        key = self.layout.source[:, None] * experts + self.experts
        return np.bincount(key.ravel(), minlength=self.layout.devices * experts).reshape(-1, experts)

    def each(self, graph: Graph, part, operator: str, rows) -> None:
        """One call of an exchange operator on every device with its number of rows."""
        for device, tokens in enumerate(rows):
            seconds = self.costs.operator(device, operator, self.shape, tokens=int(tokens))
            graph.compute(device, part, operator, seconds)


def attention(graph: Graph, layer: Layer) -> None:
    """Attention of each group's sequences.

    With the heads divided over a group: all-gather of its tokens, the heads' part of the output for all of them,
    reduce-scatter back to the tokens' devices. Norms over all heads add one small all-reduce.
    """
    spec = layer.block.attention
    if spec is None:
        return
    costs, layout = layer.costs, layer.layout
    workload, shape = layout.workload, attention_shape(layer.block, layout.tensor)
    for group, sequences in zip(layout.groups(), layout.sequences, strict=True):
        own = np.array([layout.tokens[device] for device in group]) * layer.activation_bytes
        if layout.tensor > 1:
            graph.exchange("attention", "all_gather", costs.all_gather(group, own))
            if spec.qk_norm == "full":
                sums = 8 * sequences * workload.length  # f32 square sums of queries and keys of each token
                graph.exchange("attention", "all_reduce", costs.all_reduce(group, sums))
        for device in group:
            if workload.phase == "prefill":
                at, operator = {"sequences": sequences, "length": workload.length}, "attention_prefill"
                seconds = costs.operator(device, operator, shape, **at)
            else:
                # The operator needs at least one token of context in its curve's sense.
                at, operator = {"sequences": sequences, "context": max(workload.context, 1)}, "attention_decode"
                seconds = costs.operator(device, operator, shape, **at)
            graph.compute(device, "attention", operator, seconds)
        if layout.tensor > 1:
            graph.exchange("attention", "reduce_scatter", costs.reduce_scatter(group, own))


def route(graph: Graph, layer: Layer) -> None:
    for device, tokens in enumerate(layer.layout.tokens):
        seconds = layer.costs.operator(device, "route", route_shape(layer.block), tokens=tokens)
        graph.compute(device, "route", "route", seconds)


def shared(graph: Graph, layer: Layer) -> None:
    """Shared experts, on each device's own tokens with replicated weights."""
    size = layer.moe.shared_ffn_size
    if size:
        _dense(graph, layer, "shared", dense_shape(layer.block, size, gated=True))


def dense(graph: Graph, layer: Layer) -> None:
    """The feed-forward network of a layer without routed experts."""
    spec = layer.block.dense
    if spec is not None:
        _dense(graph, layer, "dense", dense_shape(layer.block, spec.ffn_size, spec.gated))


def _dense(graph: Graph, layer: Layer, part, shape: Shape) -> None:
    for device, tokens in enumerate(layer.layout.tokens):
        graph.compute(device, part, "dense_ffn", layer.costs.operator(device, "dense_ffn", shape, tokens=tokens))
