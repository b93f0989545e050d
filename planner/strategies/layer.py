"""What the strategies' builders have in common: layers' input, attention, router and shared experts.

Letters: B layers that are costed together, T tokens, D model, K top-k, G devices.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from ...spec.model import Block, Moe
from ...spec.operators import (
    Part,
    Shape,
    attention_shape,
    dense_shape,
    exchange_shape,
    mixer_shape,
    route_shape,
    row_bytes,
)
from ..choices import Choices, Rows
from ..costs import Costs
from ..expected import Expected
from ..layout import Layout
from ..stages import Stage, compute, exchange


@dataclass(frozen=True)
class Layer:
    """B layers with one block: the step's tokens on their devices, and their experts (none in dense layers).

    memo: what all layers of the block have in common.
    before: the layer before, where these layers' experts run beside some of it (``spec.shortcut``); joined: whether
    this is that layer of others, which then has no stages of its own.
    """

    costs: Costs
    block: Block
    layout: Layout
    chosen: Choices | Expected | None = None
    memo: dict[str, list[Stage]] = field(default_factory=dict)
    before: "Layer | None" = None
    joined: bool = False

    @classmethod
    def of(cls, costs: Costs, block: Block, layout: Layout, ids: np.ndarray) -> "Layer":
        """From [B, T, K] expert ids."""
        assert block.moe is not None
        return cls(costs, block, layout, Choices(ids, layout, costs.cluster.host_index, block.moe.num_experts))

    @property
    def devices(self) -> tuple[int, ...]:
        return tuple(range(self.layout.devices))

    @property
    def moe(self) -> Moe:
        assert self.block.moe is not None
        return self.block.moe

    @property
    def choices(self) -> Choices | Expected:
        assert self.chosen is not None
        return self.chosen

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
    def tokens(self) -> np.ndarray:
        """[G]"""
        return np.array(self.layout.tokens)

    def each(self, part: Part, operator: str, rows: np.ndarray) -> Stage:
        """One call of an exchange operator on every device with its number of rows, [G] or [B, G]."""
        return compute(part, operator, self.costs.operator(operator, self.shape, tokens=rows))

    def experts(self, rows: Rows) -> Stage:
        """The grouped FFN on every device."""
        costs = self.costs
        alike = rows.of * len(costs.representatives) + costs.kinds
        _, first, place = np.unique(alike, return_index=True, return_inverse=True)
        seconds = costs.expert_ffn(self.block, self.moe.ffn_size, rows.counts[:, rows.of[first]], first)
        return compute("expert", "expert_ffn", seconds[:, place])

    def chunks(self, count: int) -> list["Layer"]:
        """The same layers with one chunk of every device's tokens each."""
        if count == 1:
            return [self]
        return [Layer(self.costs, self.block, chosen.layout, chosen) for chosen in self.choices.chunks(count)]

    def once(self, name: str, stages: Callable[["Layer"], list[Stage]]) -> list[Stage]:
        """What ``stages`` gives for the first layer of this block."""
        if name not in self.memo:
            self.memo[name] = stages(self)
        return self.memo[name]


def attention(layer: Layer) -> list[Stage]:
    """Attention of each group's sequences.

    With the heads divided over a group: all-gather of its tokens, the heads' part of the output for all of them,
    reduce-scatter back to the tokens' devices. Norms over all heads add one small all-reduce.
    """
    return layer.once("attention", _mixer if layer.block.counted else _attention)


def _mixer(layer: Layer) -> list[Stage]:
    """All of a layer that Transformers computes, its router and shared experts included, but the routed experts."""
    layout, shape = layer.layout, mixer_shape(layer.block)
    return [compute("mixer", f"mixer_{layout.workload.phase}", by_sequences(layer.costs, "mixer", shape, layout))]


def by_sequences(costs: Costs, operator: str, shape: Shape, layout: Layout) -> np.ndarray:
    """[G] seconds of an operator of the workload's phase on each device's sequences, where none divides them."""
    workload = layout.workload
    if workload.phase == "prefill":
        return costs.operator(f"{operator}_prefill", shape, sequences=layout.sequences, length=workload.length)
    # The operator needs at least one token of context in its curve's sense.
    context = max(workload.context, 1)
    return costs.operator(f"{operator}_decode", shape, sequences=layout.sequences, context=context)


def _attention(layer: Layer) -> list[Stage]:
    spec = layer.block.attention
    if spec is None:
        return []
    costs, layout = layer.costs, layer.layout
    workload, shape, groups = layout.workload, attention_shape(layer.block, layout.tensor), layout.groups()
    sequences = np.repeat(layout.sequences, layout.tensor)
    if workload.phase == "prefill":
        seconds = costs.operator("attention_prefill", shape, sequences=sequences, length=workload.length)
    else:
        # The operator needs at least one token of context in its curve's sense.
        context = max(workload.context, 1)
        seconds = costs.operator("attention_decode", shape, sequences=sequences, context=context)
    call = compute("attention", f"attention_{workload.phase}", seconds)
    if layout.tensor == 1:
        return [call]
    own = (layer.tokens * layer.activation_bytes).reshape(len(groups), 1, -1)
    pairs = list(zip(groups, own, strict=True))
    stages = [exchange("attention", "all_gather", [costs.all_gather(group, mine) for group, mine in pairs])]
    if spec.qk_norm == "full":
        # f32 square sums of queries and keys of each token
        sums = [8 * count * workload.length for count in layout.sequences]
        reduced = [costs.all_reduce(group, size) for group, size in zip(groups, sums, strict=True)]
        stages.append(exchange("attention", "all_reduce", reduced))
    scattered = [costs.reduce_scatter(group, mine) for group, mine in pairs]
    return [*stages, call, exchange("attention", "reduce_scatter", scattered)]


def route(layer: Layer) -> list[Stage]:
    if layer.block.counted:
        return []  # part of the mixer
    seconds = layer.costs.operator("route", route_shape(layer.block), tokens=layer.tokens)
    return [compute("route", "route", seconds)]


def shared(layer: Layer) -> list[Stage]:
    """Shared experts, on each device's own tokens with replicated weights."""
    size = layer.moe.shared_ffn_size
    return [_dense(layer, "shared", dense_shape(layer.block, size, gated=True))] if size else []


def dense(layer: Layer) -> list[Stage]:
    """The feed-forward network of a layer without routed experts."""
    spec = layer.block.dense
    return [_dense(layer, "dense", dense_shape(layer.block, spec.ffn_size, spec.gated))] if spec else []


def _dense(layer: Layer, part: Part, shape: Shape) -> Stage:
    return compute(part, "dense_ffn", layer.costs.operator("dense_ffn", shape, tokens=layer.tokens))
