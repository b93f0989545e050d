"""A whole step: embedding, layers, head; its stages, its prediction, and lower bounds on it."""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np

from ..spec.cluster import Cluster
from ..spec.errors import MoeplanError
from ..spec.executed import check_executed
from ..spec.foresight import Foresight
from ..spec.model import Block, Model
from ..spec.offload import Reads
from ..spec.operators import frame_shape, vocabulary_shape
from ..spec.plan import DeviceMemory, LayerPlan, LayerPrediction, Plan, Prediction
from ..spec.routing import Routing, draw_routing
from ..spec.shortcut import reads_before
from ..spec.trace import Trace
from . import memory
from .choices import Choices
from .clock import Chains, Known, longest_chains, run
from .costs import Costs
from .expected import Expected
from .graph import Graph
from .layout import Layout
from .links import Links
from .simulator import Timeline, simulate
from .stages import Stage, compute
from .strategies import BUILDERS, Layer, offload
from .strategies.coherent import Walk
from .strategies.layer import attention, by_sequences, dense

NUMBERS = 2**24  # of a table [layers, devices, experts] that is held at once


class LayerCost(NamedTuple):
    """B layers, each by itself.

    seconds: [B] from all devices beginning together until the last has ended.
    chains: longest chains of stages from one device's beginning to another's end, nothing slowed.
    stages: where devices compute beside a transfer, or come late to one together, so that a layer's end is more than
    its chains; known: of these.
    """

    seconds: np.ndarray
    chains: Chains
    stages: list[Stage] | None
    known: Known

    def after(self, costs: Costs, begin: np.ndarray, index: int = 0) -> np.ndarray:
        """[1, G] when the devices end one of the layers that they begin at ``begin`` [1, G]."""
        if self.stages is None:
            return self.chains.one(index).ends(begin)
        return run(costs, [stage.only(index) for stage in self.stages], begin, known=self.known)


@dataclass(frozen=True)
class Step:
    """A step of ``model`` with its tokens laid out on devices and their routing.

    places, foresight: of ``offload`` plans, for experts that each device reads.
    """

    costs: Costs
    model: Model
    layout: Layout
    routing: Routing
    places: tuple[int, ...] = ()
    foresight: Foresight | None = None
    _memos: dict[Block, dict[str, list[Stage]]] = field(default_factory=dict)
    _dense: dict[tuple[Block, bool], LayerCost] = field(default_factory=dict)
    counted: dict[tuple[int, ...], Choices | Expected] = field(default_factory=dict)  # by layers; see ``_choices``

    @classmethod
    def of(cls, plan: Plan, cluster: Cluster, trace: Trace | None = None) -> "Step":
        """The step that ``plan`` decides, on the cluster and trace that it was made for."""
        layout = Layout(plan.workload, plan.degrees.tensor, plan.sequences, plan.tokens)
        routing = draw_routing(trace, plan.model, plan.workload, plan.routing.seed)
        tiers = (plan.offload.places, plan.offload.foresight) if plan.offload is not None else ()
        return cls(Costs(cluster, plan.model, plan.dtype), plan.model, layout, routing, *tiers)

    @cached_property
    def _ordinals(self) -> dict[int, int]:
        return {index: j for j, index in enumerate(self.model.moe_layers)}

    @cached_property
    def blocks(self) -> list[Block]:
        """One per layer; equal ones are one object."""
        known: dict[Block, Block] = {}
        return [known.setdefault(block, block) for block in self.model.layers]

    def layer(self, indices: Sequence[int]) -> Layer:
        """Layers of one block, costed together; what lies before them is of one block, too."""
        index = indices[0]
        block = self.blocks[index]
        memo = self._memos.setdefault(block, {})
        if block.moe is None:
            return Layer(self.costs, block, self.layout, None, memo, joined=self._joined(index))
        before = None
        if reads_before(block):
            other = self.blocks[index - 1]
            before = Layer(self.costs, other, self.layout, None, self._memos.setdefault(other, {}), joined=True)
        choices = self._choices(tuple(indices), block.moe.num_experts)
        return Layer(self.costs, block, self.layout, choices, memo, before)

    def _joined(self, index: int) -> bool:
        """Whether a layer's operators are stages of the next one, whose experts run beside them."""
        return index + 1 < len(self.blocks) and reads_before(self.blocks[index + 1])

    def _choices(self, indices: tuple[int, ...], experts: int) -> Choices | Expected:
        """Remembered where layers are costed together: they are asked for with every option. Steps of layouts with the
        same tokens on every device may share ``counted``."""
        if indices in self.counted:
            return self.counted[indices]
        ids = self.routing.by_layer[[self._ordinals[i] for i in indices]]
        of = Choices if self.routing.scale == 1 else Expected
        choices = of(ids, self.layout, self.costs.cluster.host_index, experts)
        if len(indices) > 1:
            self.counted[indices] = choices
        return choices

    def alike(self) -> list[list[int]]:
        """Ordinals of the mixture-of-experts layers of each block, behind the same block where that counts."""
        found: dict[tuple[int, ...], list[int]] = {}
        for j, i in enumerate(self.model.moe_layers):
            before = (id(self.blocks[i - 1]),) if reads_before(self.blocks[i]) else ()
            found.setdefault((id(self.blocks[i]), *before), []).append(j)
        return list(found.values())

    @property
    def layers(self) -> list[Layer]:
        """Each layer by itself."""
        return [self.layer([i]) for i in range(len(self.model.layers))]

    @cached_property
    def most_together(self) -> int:
        """Layers that are costed together at most."""
        moe = self.model.moe_block().moe
        assert moe is not None
        return max(1, NUMBERS // (self.layout.devices * moe.num_experts))

    def by_layer(self, plans: Sequence[LayerPlan]) -> list[LayerPlan | None]:
        """One entry per layer, None for dense layers, from one per mixture-of-experts layer."""
        given = iter(plans)
        return [next(given) if block.moe else None for block in self.blocks]

    def runs(self, plans: Sequence[LayerPlan]) -> Iterator[tuple[list[int], list[LayerPlan] | None]]:
        """Layers that follow each other, of one block and form of plan, and their plans (None: dense layers)."""
        by_layer = self.by_layer(plans)
        kinds = [
            (id(block), plan.form if plan else self._joined(i))
            for i, (block, plan) in enumerate(zip(self.blocks, by_layer, strict=True))
        ]
        first = 0
        for i in range(1, len(kinds) + 1):
            if i == len(kinds) or kinds[i] != kinds[first] or i - first == self.most_together:
                own = [plan for plan in by_layer[first:i] if plan is not None]
                yield list(range(first, i)), own or None
                first = i

    def cost(self, layer: Layer, plans: Sequence[LayerPlan] | None) -> LayerCost:
        """Layers by themselves under plans of one strategy, one per layer (None: a dense layer)."""
        stages = build(layer, plans)
        count, devices = len(plans) if plans else 1, self.layout.devices
        known: Known = {}
        ends = run(self.costs, stages, np.zeros((count, devices)), known=known)
        slowed = any(stage.kind == "start" or stage.level is not None for stage in stages)
        return LayerCost(ends.max(1), longest_chains(stages, count, devices), stages if slowed else None, known)

    def dense(self, index: int) -> LayerCost:
        """The cost of a layer without experts."""
        key = self.blocks[index], self._joined(index)
        if key not in self._dense:
            self._dense[key] = self.cost(self.layer([index]), None)
        return self._dense[key]

    def outside(self, operator: str) -> np.ndarray:
        """[devices] seconds of the embedding of all tokens, or of the head for the last token of each sequence."""
        rows = self.layout.tokens if operator == "embed" else self.layout.last_counts
        if not self.model.vocab_size:
            return np.zeros(self.layout.devices)
        if operator == "embed" and self.model.family_config is not None:
            return by_sequences(self.costs, "frame", frame_shape(self.model), self.layout)
        return self.costs.operator(operator, vocabulary_shape(self.model), tokens=np.array(rows))

    def _built(self, plans: Sequence[LayerPlan]) -> Iterator[tuple[list[int], list[Stage]]]:
        """The stages of the whole step, of all layers of a run at once; -1 is what stands outside the layers."""
        yield [-1], [compute("embed", "embed", self.outside("embed"))]
        if plans[0].strategy == "coherent":
            yield from (([layer], stages) for layer, stages in self._walk(plans).stages())
        elif plans[0].strategy == "offload":
            walk = self._reading(plans)
            yield from (([layer], stages) for layer, stages in walk.stages(self.outside("embed")[None]))
        else:
            for layers, own in self.runs(plans):
                yield layers, build(self.layer(layers), own)
        yield [-1], [compute("head", "head", self.outside("head"))]

    def pieces(self, plans: Sequence[LayerPlan]) -> Iterator[tuple[int, list[Stage]]]:
        """The same layer by layer."""
        for layers, stages in self._built(plans):
            for index, layer in enumerate(layers):
                yield layer, [stage.only(index) for stage in stages]

    def _walk(self, plans: Sequence[LayerPlan]) -> Walk:
        """The whole step under a coherent plan."""
        return Walk.of(self.costs, self.blocks, self.layout, self.routing.by_layer, plans)

    def _reading(self, plans: Sequence[LayerPlan]) -> offload.Walk:
        """The same under an offload plan."""
        return offload.Walk.of(self.costs, self.layers, self.by_layer(plans), self.places, self.foresight)

    def hosting(self, plans: Sequence[LayerPlan]) -> list[LayerPlan]:
        """The same ``offload`` plans, with what is best computed by the hosts of GPUs (``host_rows``): layer by layer,
        on every device what is done first."""
        walk = replace(self._reading(plans), hosting=[])
        deque(walk.stages(self.outside("embed")[None]), maxlen=0)
        return walk.hosting or []

    def reads(self, plans: Sequence[LayerPlan]) -> Reads | None:
        """Experts that the step reads; None where none rests outside memory."""
        if not any(self.places):
            return None
        walk = self._reading(plans)
        deque(walk.stages(self.outside("embed")[None]), maxlen=0)
        return walk.reads()

    def seconds(self, plans: Sequence[LayerPlan]) -> float:
        """Predicted step time."""
        now = np.zeros((1, self.layout.devices))
        for _, stages in self.pieces(plans):
            now = run(self.costs, stages, now)
        return float(now.max())

    def timeline(self, plans: Sequence[LayerPlan]) -> Timeline:
        """Every operation of the step, simulated."""
        graph = Graph(self.costs, range(self.layout.devices), [0.0] * self.layout.devices)
        for layer, stages in self.pieces(plans):
            graph.add(stages, 0, layer)
        return simulate(graph.operations)

    def memory(self, plans: Sequence[LayerPlan], stored: int, limits: Sequence[int]) -> tuple[DeviceMemory, ...]:
        """Bytes on each device; the first ``stored`` layers have storage."""
        model, element, layout = self.model, self.costs.element_bytes, self.layout
        blocks = self.blocks
        replicated = memory.replicated_weights(
            blocks[:stored], model.vocab_size, model.tie_embeddings, layout.tensor, element
        )
        weights = np.full(layout.devices, replicated)
        regions = np.zeros((2, layout.devices), np.int64)
        regions[1] = memory.outside_activations(blocks, model.vocab_size, layout, element)
        coherent = plans[0].strategy == "coherent"
        for layers, own in self.runs(plans):
            if own is None:
                continue
            if not coherent:
                regions[1] = np.maximum(regions[1], memory.layer_activations(self.layer(layers), own).max(0))
            for i, plan in zip(layers, own, strict=True):
                weights += memory.expert_weights(blocks[i], plan, element) if i < stored else 0
                regions[0] = np.maximum(regions[0], memory.gathered_region(blocks[i], plan, element))
        if self.places:
            regions[0] = np.array(self.places) * offload.expert_bytes(self.costs, self.layers)
        if self.foresight is not None:
            weights += memory.foresight_tables(plans, blocks[self.model.moe_layers[0]])
        if coherent:
            regions[1] = np.maximum(regions[1], self._walk(plans).activations())
        kept = memory.cache(blocks, layout, element, replicated=coherent)
        return memory.total(kept, weights, regions, limits)

    def predict(self, plans: Sequence[LayerPlan], stored: int, limits: Sequence[int]) -> Prediction:
        """The prediction of the whole step, part by part."""
        parts: dict[int, dict[str, float]] = {i: {} for i in range(-1, len(self.model.layers))}
        links = Links(self.costs)
        now = np.zeros((1, self.layout.devices))
        for layers, stages in self._built(plans):
            links.add(stages, len(layers))
            for index, layer in enumerate(layers):

                def watch(stage: Stage, before: np.ndarray, after: np.ndarray, layer: int = layer) -> None:
                    # Waiting counts in the part that waits.
                    entry = parts[layer - stage.earlier]
                    entry[stage.part] = entry.get(stage.part, 0.0) + float((after - before).mean())

                now = run(self.costs, [stage.only(index) for stage in stages], now, watch)
        return Prediction(
            step_seconds=float(now.max()),
            layers=tuple(
                LayerPrediction(layer=i, parts={part: s for part, s in entry.items() if s > 0})
                for i, entry in parts.items()
            ),
            memory=self.memory(plans, stored, limits),
            traffic=links.traffic(),
            reads=self.reads(plans),
        )


def build(layer: Layer, plans: Sequence[LayerPlan] | None) -> list[Stage]:
    """The stages of layers under plans of one strategy, or of a dense layer."""
    if plans is None:
        if layer.joined:
            return []
        return [*attention(layer), *dense(layer)]
    return BUILDERS[plans[0].strategy](layer, plans)


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
