"""coherent: a token lives on the device of its highest-weight expert, and its next layer begins there.

What a layer costs depends on where the layer before left the tokens, so a plan is walked through as a whole.
"""

# T tokens, one of each sequence; K top-k, G devices

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ...spec.model import Block
from ...spec.operators import NUMBER_BYTES, attention_shape, cache_row_bytes, cache_shape
from ...spec.plan import LayerPlan
from ..choices import Choices, Rows, counted, flows, of_expert
from ..costs import Costs
from ..layout import Layout
from ..stages import Stage, compute, exchange
from ..traffic import Traffic
from .ep import COUNT_BYTES
from .layer import Layer, dense, route, shared


@dataclass(frozen=True, eq=False)
class Scattered(Layout):
    """One token of each sequence, wherever it is: ``device_of`` [T]."""

    device_of: np.ndarray

    @classmethod
    def at(cls, layout: Layout, device_of: np.ndarray) -> "Scattered":
        counts = tuple(np.bincount(device_of, minlength=layout.devices).tolist())
        return cls(layout.workload, 1, counts, counts, device_of)

    @cached_property
    def source(self) -> np.ndarray:
        return self.device_of

    @cached_property
    def stretches(self) -> np.ndarray:
        """[G] stretches of consecutive sequences on each device."""
        first = np.append(True, self.device_of[1:] != self.device_of[:-1])
        return np.bincount(self.device_of[first], minlength=self.devices)


@dataclass(frozen=True)
class Moved:
    """What a layer's experts move and compute.

    rows, partial: rows on their way to experts, and partial outputs; received: [1, G] rows that each device computes;
    experts: rows of each expert; after: the layer with its tokens where they end it.
    """

    rows: Traffic
    partial: Traffic
    received: np.ndarray
    experts: Rows
    after: Layer


@dataclass(frozen=True)
class Walk:
    """Every layer in turn with its tokens where they begin it, what moves in those with experts, and the end of it."""

    costs: Costs
    layout: Layout
    layers: list[tuple[Layer, Moved | None]]

    @classmethod
    def of(
        cls, costs: Costs, blocks: Sequence[Block], layout: Layout, ids: np.ndarray, plans: Sequence[LayerPlan]
    ) -> "Walk":
        """ids: [mixture-of-experts layers, T, K] experts."""
        here, layers = Scattered.at(layout, layout.source), []
        chosen = iter(zip(ids, plans, strict=True))
        for block in blocks:
            layer = Layer(costs, block, here)
            moved = None if block.moe is None else _moved(layer, here, *next(chosen))
            if moved is not None:
                here = Scattered.at(layout, moved.after.layout.source)
            layers.append((layer, moved))
        return cls(costs, layout, layers)

    def stages(self) -> Iterator[tuple[int, list[Stage]]]:
        """Of every layer, and of the step's end as layer -1."""
        for i, (layer, moved) in enumerate(self.layers):
            begin = _attention(layer)
            yield i, [*begin, *(dense(layer) if moved is None else _experts(layer, moved))]
        if self.layout.devices > 1:
            yield -1, self._end()

    def _end(self) -> list[Stage]:
        """Tokens home, then new keys and values to everybody; layers with equal heads together."""
        costs, group, home = self.costs, tuple(range(self.layout.devices)), self.layout.source
        last, moved = self.layers[-1]
        here = last if moved is None else moved.after
        size = here.activation_bytes + NUMBER_BYTES
        back = Traffic(1, len(group), *flows(here.layout.source, home[None, :, None], len(group))[0]).times(size)
        alike: dict[tuple[int, int], list[Layer]] = {}
        for layer, _ in self.layers:
            if (a := layer.block.attention) is not None:
                alike.setdefault((a.kv_heads, a.head_dim), []).append(layer)
        counts = costs.scatter(group, np.full((1, len(group)), COUNT_BYTES * (1 + len(alike))))
        packed = (here.tokens + np.array(self.layout.tokens)) / 2  # those that leave, and those that come
        found = [
            here.each("combine", "coherent_home", packed),
            exchange("combine", "exchange counts", [counts]),
            exchange("combine", "all_to_all", [costs.all_to_all(group, back)]),
        ]
        for layers in alike.values():
            block, own = layers[0].block, np.sum([layer.tokens for layer in layers], axis=0)
            seconds = costs.operator("coherent_cache", cache_shape(block, len(group)), tokens=own.sum())
            gather = costs.all_gather(group, own[None] * cache_row_bytes(block, costs.element_bytes))
            found += [compute("gather", "coherent_cache", seconds), exchange("gather", "all_gather", [gather])]
        return found

    def activations(self) -> np.ndarray:
        """[G] largest sum of buffers alive at once in any layer: rows sent and received, partial outputs, f32 sums, the
        largest expert's intermediate; in attention, those of all tokens that are here; at the end, everybody's keys."""
        peak = np.zeros(self.layout.devices)
        for layer, moved in self.layers:
            hidden, a, tokens = layer.block.hidden_size, layer.block.attention, layer.tokens
            if a is not None:
                peak = np.maximum(peak, tokens * (4 * hidden + (3 * a.heads + 4 * a.kv_heads) * a.head_dim))
            if moved is not None:
                peak = np.maximum(peak, _values(layer, moved))
        ends = [layer.block.attention.cache_values() for layer, _ in self.layers if layer.block.attention]
        peak = np.maximum(peak, 3 * self.layout.workload.sequences * sum(ends))
        return np.ceil(peak * self.costs.element_bytes).astype(np.int64)


def _moved(layer: Layer, here: Scattered, ids: np.ndarray, plan: LayerPlan) -> Moved:
    costs, devices, experts = layer.costs, here.devices, layer.moe.num_experts
    served = Choices(ids[None], here, costs.cluster.host_index, experts).targets(ids[None], [plan])[0]
    # A token stays with its first expert that has weights; one that chose identity experts alone, where it is.
    first = np.take_along_axis(served, (served >= 0).argmax(1)[:, None], 1)
    stays = np.where(first < 0, here.source[:, None], first)
    target = np.where(served < 0, stays, served)[None]  # the way to an identity expert is one that is gone anyway
    stays = stays[:, 0]
    (rows, kept), (partial, _) = flows(here.source, target, devices), flows(stays, target, devices)
    counts = counted(of_expert(target, ids[None], experts), devices * experts).reshape(1, devices, experts)
    there = Traffic(1, devices, *rows)
    return Moved(
        there,
        Traffic(1, devices, *partial).back(),
        there.received() + kept,
        Rows(counts, np.arange(devices)),
        Layer(costs, layer.block, Scattered.at(here, stays)),
    )


def _attention(layer: Layer) -> list[Stage]:
    """Of the sequences that are here: between one call for sequences side by side and one for each, by stretches."""
    if layer.block.attention is None:
        return []
    assert isinstance(layer.layout, Scattered)
    count, shape = layer.tokens, attention_shape(layer.block)
    context = max(layer.layout.workload.context, 1)
    together = layer.costs.operator("attention_decode", shape, sequences=count, context=context)
    apart = layer.costs.operator("attention_scattered", shape, sequences=count, context=context)
    share = np.maximum(layer.layout.stretches - 1, 0) / np.maximum(count - 1, 1)
    return [compute("attention", "attention_scattered", together + share * (apart - together))]


def _experts(layer: Layer, moved: Moved) -> list[Stage]:
    """Route, pack, counts, rows, unpack, experts, partial outputs, sum, shared experts."""
    costs, group = layer.costs, layer.devices
    counts = costs.scatter(group, np.full((1, len(group)), COUNT_BYTES))
    there = costs.all_to_all(group, moved.rows.times(layer.row_bytes + NUMBER_BYTES))
    found = [
        *route(layer),
        layer.each("dispatch", "coherent_pack", layer.tokens),
        exchange("dispatch", "exchange counts", [counts]),
        exchange("dispatch", "all_to_all", [there]),
        layer.each("dispatch", "coherent_unpack", moved.received),
        layer.experts(moved.experts),
    ]
    if layer.moe.top_k > 1:
        partial = costs.all_to_all(group, moved.partial.times(layer.activation_bytes))
        found.append(exchange("combine", "all_to_all", [partial]))
    return [*found, layer.each("combine", "coherent_combine", moved.received), *shared(moved.after)]


def _values(layer: Layer, moved: Moved) -> np.ndarray:
    """[G] elements of the buffers of one layer's experts."""
    moe, hidden, element = layer.moe, layer.block.hidden_size, layer.costs.element_bytes
    row, matrices = (layer.row_bytes + NUMBER_BYTES) / element, 2 if moe.gated else 1
    came, before, after = moved.received[0], layer.tokens, moved.after.tokens
    sent = (moved.rows.sent() + came - moved.rows.received())[0]
    partial = (moved.partial.sent() + moved.partial.received())[0]
    rows = 2 * before * hidden + sent * row + 2 * came * row + 2 * came * hidden + partial * hidden
    intermediate = moved.experts.largest[0] * (2 * hidden + (matrices + 1) * moe.ffn_size)
    ffn = np.maximum(intermediate, after * (2 * hidden + 3 * moe.shared_ffn_size))
    identity = (1 + 8 / element) * hidden * after if moe.zero_experts else 0.0  # selected, weighed, added up
    return rows + ffn + identity + 2 * 4 / element * hidden * np.maximum(came, after)
