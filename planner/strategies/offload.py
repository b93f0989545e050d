"""offload: as ``ep``, with experts that are read from a slow tier beside what is computed.

When an expert is there depends on what was read before it, in earlier layers too, so a plan is walked through as a
whole, in the order that ``spec.offload`` states.
"""

# G devices, E experts

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ...spec.offload import padded, reading_order
from ...spec.plan import LayerPlan
from ..clock import run
from ..costs import Costs
from ..stages import Stage, compute, exchange
from .ep import after, before
from .layer import Layer, attention, dense


class Cold(NamedTuple):
    """One layer's experts on one device: seconds of those in memory; of each that it reads and needs, in order; and
    whether those that it reads ahead, in order, are needed."""

    hot: float
    seconds: list[float]
    ahead: list[bool]


@dataclass
class Reading:
    """One device's reader: when it is free, and when each of its places is.

    read: seconds of one expert. begun: when it could begin to read ahead for the layer that comes.
    """

    read: float
    places: list[float]
    begun: float = 0.0
    free: float = 0.0

    def layer(self, now: float, cold: Cold) -> tuple[float, float]:
        """Seconds in which the device waits for experts, and computes them; ``now``: when its tokens are there."""
        there: list[float] = []
        for wanted in cold.ahead:
            if not self.places:
                break
            begin = max(self.free, self.begun, self.places[0])
            if begin >= now:  # it is known by now what is needed
                break
            heapq.heappop(self.places)
            self.free = begin + self.read
            if wanted:
                there.append(self.free)
            else:
                heapq.heappush(self.places, max(self.free, now))
        ready, waited = now + cold.hot, 0.0
        for i, seconds in enumerate(cold.seconds):
            if i < len(there):
                come = there[i]
            else:
                self.free = come = max(self.free, now, heapq.heappop(self.places)) + self.read
            waited += max(come - ready, 0.0)
            ready = max(come, ready) + seconds
            heapq.heappush(self.places, ready)
        self.begun = now
        return waited, cold.hot + sum(cold.seconds)


@dataclass(frozen=True)
class Walk:
    """Every layer in turn, each with its plan (None: without experts)."""

    costs: Costs
    layers: Sequence[tuple[Layer, LayerPlan | None]]
    readings: list[Reading]

    @classmethod
    def of(
        cls, costs: Costs, layers: Sequence[Layer], plans: Sequence[LayerPlan | None], places: Sequence[int]
    ) -> "Walk":
        """places: experts that each device has room for beside those that stay."""
        size = expert_bytes(costs, layers)
        readings = [
            Reading(float(rate), [0.0] * count) for rate, count in zip(read_seconds(costs, size), places, strict=True)
        ]
        return cls(costs, list(zip(layers, plans, strict=True)), readings)

    def stages(self, now: np.ndarray) -> Iterator[tuple[int, list[Stage]]]:
        """Of every layer; now: [1, G] when the first begins."""
        first = True
        for i, (layer, plan) in enumerate(self.layers):
            if plan is None:
                stages = [*attention(layer), *dense(layer)]
                now = run(self.costs, stages, now)
            else:
                if first:
                    for reading, begin in zip(self.readings, now[0].tolist(), strict=True):
                        reading.begun = begin
                first = False
                stages = self._arrival(layer, plan)
                now = run(self.costs, stages, now)
                come = zip(self.readings, now[0].tolist(), self._experts(layer, plan), strict=True)
                waits, works = np.array([reading.layer(at, cold) for reading, at, cold in come]).T
                rest = [
                    compute("expert", "expert_ffn", works),
                    compute("gather", "experts read", waits),
                    *self._home(layer, plan),
                ]
                now = run(self.costs, rest, now)
                stages += rest
            yield i, stages

    def _arrival(self, layer: Layer, plan: LayerPlan) -> list[Stage]:
        sent = layer.choices.dispatch([plan])
        out = self.costs.all_to_all(layer.devices, sent.rows.times(layer.row_bytes))
        return [
            *before(layer),
            exchange("dispatch", "all_to_all", [out]),
            layer.each("dispatch", "ep_unpack", sent.computed),
            layer.each("expert", "offload_order", sent.computed),
        ]

    def _home(self, layer: Layer, plan: LayerPlan) -> list[Stage]:
        sent = layer.choices.dispatch([plan])
        home = self.costs.all_to_all(layer.devices, sent.back.times(layer.activation_bytes))
        return [exchange("combine", "all_to_all", [home]), *after(layer)]

    def _experts(self, layer: Layer, plan: LayerPlan) -> list[Cold]:
        """[G]"""
        assert plan.resident is not None
        assert plan.ahead is not None
        rows = layer.choices.dispatch([plan]).experts.devices[0]  # [G, E]
        hot = rows.copy()
        orders = []
        for g, (slots, stays, early) in enumerate(zip(plan.slots, plan.resident, plan.ahead, strict=True)):
            order = [slots[i] for i in reading_order(rows[g, list(slots)], slots, stays, early)]
            hot[g, order] = 0
            orders.append(order)
        width, devices = layer.moe.ffn_size, np.arange(len(rows))
        together = self.costs.expert_ffn(layer.block, width, hot, devices)
        of = np.repeat(devices, [len(order) for order in orders])
        counts = rows[of, np.array([e for order in orders for e in order], int)]
        alone = self.costs.expert_ffn(layer.block, width, counts[:, None], of) + self._visits(layer, counts, of)
        single = np.split(alone, np.cumsum([len(order) for order in orders])[:-1])
        return [
            Cold(float(seconds), own.tolist(), [bool(rows[g, expert]) for expert in plan.ahead[g]])
            for g, (seconds, own) in enumerate(zip(together, single, strict=True))
        ]

    def _visits(self, layer: Layer, counts: np.ndarray, of: np.ndarray) -> np.ndarray:
        """[N] seconds of selecting an expert's rows and adding its outputs up; of: [N] devices."""
        if not len(of):
            return np.zeros(0)
        rows = np.zeros((len(counts), layer.layout.devices))
        rows[np.arange(len(of)), of] = counts
        return self.costs.operator("offload_visit", layer.shape, tokens=rows).sum(1)


def expert_bytes(costs: Costs, layers: Sequence[Layer]) -> int:
    """Of a place: the largest expert, in whole pages."""
    sizes = [layer.moe.expert_parameters(layer.block.hidden_size) for layer in layers if layer.block.moe is not None]
    return padded(max(sizes) * costs.element_bytes)


def read_seconds(costs: Costs, size: int) -> np.ndarray:
    """[G] seconds of reading ``size`` bytes into each device's memory; infinite where no tier was measured."""
    found = []
    for device in costs.representatives:
        curve = costs.cluster.kind_of(device).slow_tier
        found.append(np.inf if curve is None else curve.at(bytes=size).seconds)
    return np.array(found)[costs.kinds]
