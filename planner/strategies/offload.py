"""offload: as ``ep``, with experts that are read from a slow tier beside what is computed.

When an expert is there depends on what was read before it, in earlier layers too, so a plan is walked through as a
whole, in the order that ``spec.offload`` states.
"""

# G devices, E experts

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ...spec.foresight import Foresight, foreseen
from ...spec.model import Block
from ...spec.offload import Reads, cold_experts, padded
from ...spec.operators import expert_shape
from ...spec.plan import LayerPlan
from ..clock import run
from ..costs import Costs
from ..stages import Stage, compute, exchange, start, wait
from .ep import after, before, window
from .layer import Layer, attention, dense
from .reading import Needed, Reading


@dataclass(frozen=True)
class Walk:
    """Every layer in turn, each with its plan (None: without experts); foresight: in place of lists to read ahead.

    hosting: None, or the plans of the layers that were walked through, each with the best ``host_rows`` for it.
    """

    costs: Costs
    layers: Sequence[tuple[Layer, LayerPlan | None]]
    readings: list[Reading]
    foresight: Foresight | None = None
    hosting: list[LayerPlan] | None = None

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
            needed = self._experts(layer, plan, self._early(ordinal, last, plan))
            ordinal, last = ordinal + 1, layer
            times = list(zip(self.readings, known[0].tolist(), here[0].tolist(), needed, strict=True))
            few = plan.host_rows or (0,) * len(times)
            if self.hosting is not None:
                few = tuple(own.best(reading, told, turn) for reading, told, turn, own in times)
                self.hosting.append(plan.model_copy(update={"host_rows": few if any(few) else None}))
            cold = [own.cold(rows) for (*_, own), rows in zip(times, few, strict=True)]
            pairs = zip(times, cold, strict=True)
            waits, works = np.array([reading.layer(told, turn, own) for (reading, told, turn, _), own in pairs]).T
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

    def _experts(self, layer: Layer, plan: LayerPlan, early: Sequence[Sequence[int]]) -> list[Needed]:
        """[G]; early: what each device reads ahead."""
        assert plan.resident is not None
        rows = layer.choices.dispatch([plan]).experts.devices[0]  # [G, E]
        hot = rows.copy()
        orders = []
        for g, (slots, stays, first) in enumerate(zip(plan.slots, plan.resident, early, strict=True)):
            order = [slots[i] for i in cold_experts(rows[g, list(slots)], slots, stays, first).read]
            hot[g, order] = 0
            orders.append(order)
        width, devices = layer.moe.ffn_size, np.arange(len(rows))
        together = self.costs.expert_ffn(layer.block, width, hot, devices)
        of = np.repeat(devices, [len(order) for order in orders])
        counts = rows[of, np.array([e for order in orders for e in order], int)]
        visits = self._visits(layer, counts, of)
        alone = self.costs.expert_ffn(layer.block, width, counts[:, None], of) + visits
        hosted = self._hosted(layer, counts, of) + visits
        parts = np.cumsum([len(order) for order in orders])[:-1]
        own = [np.split(values, parts) for values in (counts, alone, hosted)]
        return [
            Needed(
                hot=float(together[g]),
                rows=own[0][g],
                alone=own[1][g],
                hosted=own[2][g],
                early=len(set(order).intersection(early[g])),
                ahead=[bool(rows[g, expert]) for expert in early[g]],
            )
            for g, order in enumerate(orders)
        ]

    def _hosted(self, layer: Layer, counts: np.ndarray, of: np.ndarray) -> np.ndarray:
        """[N] seconds of an expert's rows on the host of a device, with their way there and back; of: [N] devices."""
        can = np.isfinite(least_host_seconds(self.costs, [layer.block]))[of]
        rows = np.zeros((len(counts), layer.layout.devices))
        rows[np.flatnonzero(can), of[can]] = counts[can]
        if not can.any():
            return np.full(len(counts), np.inf)
        seconds = self.costs.operator("offload_host", expert_shape(layer.block), tokens=rows).sum(1)
        return np.where(can, seconds, np.inf)

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


def least_host_seconds(costs: Costs, blocks: Sequence[Block]) -> np.ndarray:
    """[G] seconds that a device's host takes at least for an expert of these blocks that rests in its memory; infinite
    where none computes there: on a disk, or where it was not measured."""
    least = np.full(len(costs.cluster.kinds), np.inf)
    for k, kind in enumerate(costs.cluster.kinds):
        for block in blocks if kind.type == "cuda" else ():
            curve = kind.find("offload_host", expert_shape(block), costs.dtype) if block.moe else None
            least[k] = least[k] if curve is None else min(least[k], *curve.median)
    return least[costs.kinds]
