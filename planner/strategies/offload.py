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

from ...spec.foresight import Foresight, foreseen
from ...spec.offload import Reads, padded, reading_order
from ...spec.plan import LayerPlan
from ..clock import run
from ..costs import Costs
from ..stages import Stage, compute, exchange, start, wait
from .ep import after, before, window
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

    read: seconds of one expert. begun: when it could begin to read ahead for the layer that comes. needed, listed,
    ahead, vain: experts so far, see ``spec.offload.Reads``.
    """

    read: float
    places: list[float]
    begun: float = 0.0
    free: float = 0.0
    needed: int = 0
    listed: int = 0
    ahead: int = 0
    vain: int = 0

    def layer(self, known: float, now: float, cold: Cold) -> tuple[float, float]:
        """Seconds in which the device waits for experts, and computes them; ``known``: when it knows what its tokens
        need; ``now``: when they are there, and their experts' turn has come."""
        self.needed += len(cold.seconds)
        self.listed += len(cold.ahead)
        self.ahead += sum(cold.ahead)
        there: list[float] = []
        for wanted in cold.ahead:
            if not self.places:
                break
            begin = max(self.free, self.begun, self.places[0])
            if begin >= known:  # from then on only what is needed is read
                break
            heapq.heappop(self.places)
            self.free = begin + self.read
            if wanted:
                there.append(self.free)
            else:
                self.vain += 1
                heapq.heappush(self.places, max(self.free, known))
        ready, waited = now + cold.hot, 0.0
        for i, seconds in enumerate(cold.seconds):
            if i < len(there):
                come = there[i]
            else:
                self.free = come = max(self.free, known, heapq.heappop(self.places)) + self.read
            waited += max(come - ready, 0.0)
            ready = max(come, ready) + seconds
            heapq.heappush(self.places, ready)
        self.begun = known
        return waited, cold.hot + sum(cold.seconds)


@dataclass(frozen=True)
class Walk:
    """Every layer in turn, each with its plan (None: without experts); foresight: in place of lists to read ahead."""

    costs: Costs
    layers: Sequence[tuple[Layer, LayerPlan | None]]
    readings: list[Reading]
    foresight: Foresight | None = None

    @classmethod
    def of(
        cls,
        costs: Costs,
        layers: Sequence[Layer],
        plans: Sequence[LayerPlan | None],
        places: Sequence[int],
        foresight: Foresight | None,
    ) -> "Walk":
        """places: experts that each device has space for beside those that stay."""
        size = expert_bytes(costs, layers)
        readings = [
            Reading(float(rate), [0.0] * count) for rate, count in zip(read_seconds(costs, size), places, strict=True)
        ]
        return cls(costs, list(zip(layers, plans, strict=True)), readings, foresight)

    def reads(self) -> Reads:
        """Of all devices, once all stages were asked for."""
        return Reads(**{name: sum(getattr(reading, name) for reading in self.readings) for name in Reads.model_fields})

    def stages(self, now: np.ndarray) -> Iterator[tuple[int, list[Stage]]]:
        """Of every layer; now: [1, G] when the first begins, and with it the reading."""
        for reading, begin in zip(self.readings, now[0].tolist(), strict=True):
            reading.begun = begin
        ordinal, last = 0, None
        for i, (layer, plan) in enumerate(self.layers):
            if plan is None:
                stages = [] if layer.joined else [*attention(layer), *dense(layer)]
                now = run(self.costs, stages, now)
                yield i, stages
                continue
            routed, arrival, home = self._around(layer, plan)
            known = run(self.costs, routed, now)
            here = run(self.costs, arrival, known)
            cold = self._experts(layer, plan, self._early(ordinal, last, plan))
            ordinal, last = ordinal + 1, layer
            times = zip(self.readings, known[0].tolist(), here[0].tolist(), cold, strict=True)
            waits, works = np.array([reading.layer(told, turn, own) for reading, told, turn, own in times]).T
            rest = [compute("expert", "expert_ffn", works), compute("gather", "experts read", waits), *home]
            now = run(self.costs, rest, here)
            yield i, [*routed, *arrival, *rest]

    def _around(self, layer: Layer, plan: LayerPlan) -> tuple[list[Stage], list[Stage], list[Stage]]:
        """Stages until it is known what the tokens need; from then until its experts' turn comes; and after them.

        With a shortcut the turn comes before the operator of the window that the plan's slot says."""
        costs, group, sent = self.costs, layer.devices, layer.choices.dispatch([plan])
        out = costs.all_to_all(group, sent.rows.times(layer.row_bytes))
        back = costs.all_to_all(group, sent.back.times(layer.activation_bytes))
        routed = before(layer, told=max(map(len, plan.slots)) + (layer.moe.num_experts if self.foresight else 0))
        there = [
            layer.each("dispatch", "ep_unpack", sent.computed),
            layer.each("expert", "offload_order", sent.computed),
        ]
        if layer.block.shortcut == "none":
            arrival = [exchange("dispatch", "all_to_all", [out]), *there]
            return routed, arrival, [exchange("combine", "all_to_all", [back]), *after(layer)]
        first, operators = window(layer)
        sooner = [stage for stages in operators[: plan.slot] for stage in stages]
        later = [stage for stages in operators[plan.slot :] for stage in stages]
        leave = start("dispatch", "all_to_all", out, costs.busy(out))
        arrival = [leave, *sooner, wait("dispatch", len(group)), *there]
        home = [start("combine", "all_to_all", back, costs.busy(back), 1), *later, wait("combine", len(group), 1)]
        return [*first, *routed], arrival, [*home, *after(layer)]

    def _early(self, ordinal: int, last: Layer | None, plan: LayerPlan) -> Sequence[Sequence[int]]:
        """[G] what each device reads ahead, behind the ``last`` layer with experts."""
        assert plan.resident is not None
        assert plan.ahead is not None
        if self.foresight is None or last is None:
            return plan.ahead
        chosen, top_k = last.choices.total[0], last.moe.top_k
        return [
            foreseen(self.foresight, ordinal, plan.slots, plan.resident, top_k, g).ahead(chosen)
            for g in range(len(plan.slots))
        ]

    def _experts(self, layer: Layer, plan: LayerPlan, early: Sequence[Sequence[int]]) -> list[Cold]:
        """[G]; early: what each device reads ahead."""
        assert plan.resident is not None
        rows = layer.choices.dispatch([plan]).experts.devices[0]  # [G, E]
        hot = rows.copy()
        orders = []
        for g, (slots, stays, first) in enumerate(zip(plan.slots, plan.resident, early, strict=True)):
            order = [slots[i] for i in reading_order(rows[g, list(slots)], slots, stays, first)]
            hot[g, order] = 0
            orders.append(order)
        width, devices = layer.moe.ffn_size, np.arange(len(rows))
        together = self.costs.expert_ffn(layer.block, width, hot, devices)
        of = np.repeat(devices, [len(order) for order in orders])
        counts = rows[of, np.array([e for order in orders for e in order], int)]
        alone = self.costs.expert_ffn(layer.block, width, counts[:, None], of) + self._visits(layer, counts, of)
        single = np.split(alone, np.cumsum([len(order) for order in orders])[:-1])
        return [
            Cold(float(seconds), own.tolist(), [bool(rows[g, expert]) for expert in early[g]])
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
