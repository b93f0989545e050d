"""A whole step: embedding, layers, head; its operations, its prediction, and lower bounds on it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..spec.cluster import Cluster
from ..spec.errors import MoeplanError
from ..spec.executed import check_executed
from ..spec.model import Model
from ..spec.operators import vocabulary_shape
from ..spec.plan import DeviceMemory, LayerPlan, LayerPrediction, LinkTraffic, Plan, Prediction
from ..spec.routing import Routing, draw_routing
from ..spec.trace import Trace
from . import memory
from .costs import Costs
from .graph import Graph
from .layout import Layout
from .simulator import Timeline, longest_chains, simulate
from .strategies import BUILDERS, Layer
from .strategies.layer import attention, dense


class LayerCost(NamedTuple):
    """One layer by itself.

    seconds: from all devices beginning together until the last has ended.
    chains: [from device, to device] longest chain of operations from one's beginning to the other's end, nothing
    slowed; -inf where there is none.
    """

    seconds: float
    chains: np.ndarray


@dataclass(frozen=True)
class Step:
    """A step of ``model`` with its tokens laid out on devices and their routing."""

    costs: Costs
    model: Model
    layout: Layout
    routing: Routing
    _alone: dict[tuple[int, LayerPlan | None], LayerCost] = field(default_factory=dict)

    @classmethod
    def of(cls, plan: Plan, cluster: Cluster, trace: Trace | None = None) -> "Step":
        """The step that ``plan`` decides, on the cluster and trace that it was made for."""
        layout = Layout(plan.workload, plan.degrees.tensor, plan.sequences, plan.tokens)
        routing = draw_routing(trace, plan.model, plan.workload, plan.routing.seed)
        return cls(Costs(cluster, plan.model, plan.dtype), plan.model, layout, routing)

    @cached_property
    def layers(self) -> list[Layer]:
        ordinals = {index: j for j, index in enumerate(self.model.moe_layers)}
        return [
            Layer(self.costs, block, self.layout, self.routing.expert_ids[:, ordinals[i]] if i in ordinals else None)
            for i, block in enumerate(self.model.layers)
        ]

    def by_layer(self, plans: Sequence[LayerPlan]) -> list[LayerPlan | None]:
        """One entry per layer, None for dense layers, from one per mixture-of-experts layer."""
        given = iter(plans)
        return [next(given) if block.moe else None for block in self.model.layers]

    def graph(self, plans: Sequence[LayerPlan]) -> Graph:
        """All operations of the step."""
        graph = Graph(self.layout.devices)
        self._outside(graph, "embed")
        for i, plan in enumerate(self.by_layer(plans)):
            self._layer(graph, i, plan)
        graph.layer = -1
        self._outside(graph, "head")
        return graph

    def seconds(self, plans: Sequence[LayerPlan]) -> float:
        """Predicted step time by simulating the whole graph."""
        return simulate(self.graph(plans).operations).makespan

    def alone(self, index: int, plan: LayerPlan | None) -> LayerCost:
        """One layer by itself (memoised): what a search over layers adds up."""
        key = index, plan
        if key not in self._alone:
            graph = Graph(self.layout.devices)
            self._layer(graph, index, plan)
            chains = longest_chains(graph.operations, range(self.layout.devices))[:, [c[-1] for c in graph.chains]]
            self._alone[key] = LayerCost(simulate(graph.operations).makespan, chains)
        return self._alone[key]

    def lower_bound(self, options: Sequence[Sequence[LayerPlan]]) -> float:
        """No choice of one option for each mixture-of-experts layer is predicted faster than this.

        Device by device, the earliest end of each layer: the longest chain over the best option for that device. Every
        operation takes at least its time alone, so induction over the layers gives a bound on every device's end.
        """
        end = self._outside_seconds("embed")
        given = iter(options)
        for i, block in enumerate(self.model.layers):
            choices = next(given) if block.moe else [None]
            end = np.min([(end[:, None] + self.alone(i, plan).chains).max(0) for plan in choices], axis=0)
        return float((end + self._outside_seconds("head")).max())

    def slowest_arrival(self, index: int, plan: LayerPlan | None) -> float:
        """Least seconds from the last device's beginning of a layer to the last end, whichever device is last.

        Summed over the layers, with the slowest embedding and the fastest head, a lower bound that is additive.
        """
        return float(self.alone(index, plan).chains.max(1).min())

    def outside_bounds(self) -> float:
        """The part of the additive bound that stands outside the layers."""
        return float(self._outside_seconds("embed").max() + self._outside_seconds("head").min())

    def memory(self, plans: Sequence[LayerPlan], stored: int, limits: Sequence[int]) -> tuple[DeviceMemory, ...]:
        model = self.model
        return memory.total(self.layers, self.by_layer(plans), model.vocab_size, model.tie_embeddings, stored, limits)

    def predict(self, plans: Sequence[LayerPlan], stored: int, limits: Sequence[int]) -> tuple[Prediction, Timeline]:
        """The prediction of the whole graph, part by part, and its timeline."""
        graph = self.graph(plans)
        timeline = simulate(graph.operations)
        parts: dict[int, dict[str, float]] = {i: {} for i in range(-1, len(self.model.layers))}
        for (layer, part), seconds in graph.parts(timeline).items():
            parts[layer][part] = seconds
        prediction = Prediction(
            step_seconds=timeline.makespan,
            layers=tuple(LayerPrediction(layer=i, parts=entry) for i, entry in parts.items()),
            memory=self.memory(plans, stored, limits),
            traffic=tuple(
                LinkTraffic(source=int(i), target=int(j), bytes=round(graph.traffic[i, j]))
                for i, j in np.argwhere(graph.traffic > 0)
            ),
        )
        return prediction, timeline

    def _layer(self, graph: Graph, index: int, plan: LayerPlan | None) -> None:
        graph.layer = index
        layer = self.layers[index]
        if plan is not None:
            BUILDERS[plan.strategy](graph, layer, plan)
        else:
            attention(graph, layer)
            dense(graph, layer)

    def _outside(self, graph: Graph, part) -> None:
        for device, seconds in enumerate(self._outside_seconds(part)):
            graph.compute(device, part, part, float(seconds))

    def _outside_seconds(self, operator: str) -> np.ndarray:
        """[devices] seconds of the embedding of all tokens, or of the head for the last token of each sequence."""
        rows = self.layout.tokens if operator == "embed" else self.layout.last_counts
        if not self.model.vocab_size:
            return np.zeros(self.layout.devices)
        shape = vocabulary_shape(self.model)
        return np.array([self.costs.operator(d, operator, shape, tokens=n) for d, n in enumerate(rows)])


def check_supported(model: Model, asked: str = "") -> None:
    """Raise MoeplanError naming the first thing of ``model`` that keeps it from being solved for.

    asked: what the user typed for it; by default its name.
    """
    check_executed(model, asked)
    first = model.moe_block()
    assert first.moe is not None
    for i, block in enumerate(model.layers):
        if block.moe and (block.moe.num_experts, block.moe.top_k) != (first.moe.num_experts, first.moe.top_k):
            raise MoeplanError(
                f"{asked or model.name}: layer {i}: layers with unequal experts or top-k cannot be planned yet"
            )
