"""One rank of a plan: a transformer whose tokens, heads and experts are divided over devices.

Letters: T this device's tokens, D model, V vocabulary, K top-k.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..spec import Plan
from ..spec.operators import Part
from ..spec.plan import LayerPlan
from ..spec.routing import Routing
from .attention import RotaryEmbedding, attention
from .cache import KVCache
from .collectives import all_gather, all_reduce, reduce_scatter
from .dense import dense
from .groups import consecutive_group, open_levels
from .layout import Layout
from .norms import rms_norm
from .reference import forced_choice
from .router import Choice, Chooser, choose, routed
from .shortcut import Beside
from .strategies import LayerContext, Region, Stored, Strategy, strategy_of
from .strategies.resting import Resting
from .timers import OUTSIDE, Timers
from .vocabulary import embed, head
from .weights import LayerWeights, Range, WeightSource, check_supported

StepLap = Callable[[int, Part], None]
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


class Output(NamedTuple):
    """hidden: [T, D] after the last layer; logits: [sequences that end here, V], none without a vocabulary."""

    hidden: Tensor
    logits: Tensor | None


class Holder(Protocol):
    """What stores a layer's experts; see ``strategies.Strategy``."""

    stored: Stored

    def prepare(self, gate_up: Tensor, down: Tensor) -> None: ...


class Executor:
    """Executes steps of ``plan`` as ``rank``; torch.distributed is initialised with one rank per device.

    Every rank constructs its executor at the same time. The source gives tensors of the plan's dtype on ``device``.
    ``capacity``: positions per sequence in the cache.
    Raises MoeplanError for what the runtime does not execute.
    """

    def __init__(self, plan: Plan, rank: int, source: WeightSource, *, device: torch.device, capacity: int) -> None:
        model = plan.model
        check_supported(model)
        self.resting: Resting | None = None  # experts of offload layers that are not in memory
        self.model, self.layout, self.device = model, Layout.of(plan, rank), device
        self._group = consecutive_group(plan.degrees.tensor) if plan.degrees.tensor > 1 else None
        self._rope = RotaryEmbedding(model.rope_theta) if model.rope_theta is not None else None
        self._holders = self._make_holders(plan, rank)
        self._layers = [self._load(i, source) for i in range(len(model.layers))]
        if model.vocab_size:
            self._embedding, self._norm = source.embedding(), source.final_norm()
            self._head = self._embedding if model.tie_embeddings else source.head()
        heads = self._heads(0)
        self.cache = KVCache(model, self._sequences(), capacity, DTYPES[plan.dtype], device, heads)

    def _make_holders(self, plan: Plan, rank: int) -> Mapping[int, Holder]:
        """One for each mixture-of-experts layer."""
        self._strategies: dict[int, Strategy] = {
            i: strategy_of(layer, context) for i, layer, context in self._contexts(plan, rank)
        }
        return self._strategies

    def _contexts(self, plan: Plan, rank: int) -> Iterator[tuple[int, LayerPlan, LayerContext]]:
        """Every mixture-of-experts layer's index, plan and surroundings."""
        names = list(dict.fromkeys(device.host for device in plan.devices))
        hosts = [names.index(device.host) for device in plan.devices]
        region = Region(DTYPES[plan.dtype], self.device)
        hierarchical = any(layer.strategy == "hierarchical" for layer in plan.layers)
        levels = open_levels(hosts) if hierarchical else None
        if plan.offload is not None:
            self.resting = Resting(plan, rank, DTYPES[plan.dtype], self.device)
        for ordinal, (i, layer_plan) in enumerate(zip(self.model.moe_layers, plan.layers, strict=True)):
            block = self.model.layers[i]
            assert block.moe is not None
            here = rank, hosts, block.moe, block.hidden_size, self.device, region, levels
            yield i, layer_plan, LayerContext(*here, ordinal, self.resting)

    def _sequences(self) -> Range:
        """Those whose keys and values this device keeps."""
        return self.layout.group_sequences

    def _heads(self, index: int) -> tuple[int, int] | None:
        """Query heads that this device holds; None where it holds all."""
        a, tensor = self.model.layers[index].attention, self.layout.tensor
        if a is None or tensor == 1:
            return None
        each, member = a.heads // tensor, self.layout.rank % tensor
        return member * each, (member + 1) * each

    def _load(self, index: int, source: WeightSource) -> LayerWeights:
        if index not in self._holders:
            return source.layer(index, heads=self._heads(index))
        holder = self._holders[index]
        experts, columns, resting = holder.stored
        for expert in resting:
            assert self.resting is not None
            (gate_up,), (down,) = source.experts(index, [expert], columns)
            self.resting.put(self.model.moe_layers.index(index), expert, gate_up, down)
        weights = source.layer(index, experts=experts, columns=columns, heads=self._heads(index))
        assert weights.gate_up is not None
        assert weights.down is not None
        holder.prepare(weights.gate_up, weights.down)
        return weights

    def reads(self) -> tuple[int, ...]:
        """``Needs`` of all steps so far; empty where nothing rests outside memory."""
        return self.resting.needs() if self.resting is not None else ()

    def forced(self, routing: Routing, layout: Layout) -> list[Choice]:
        """This device's tokens of a routing, on the device, one entry per mixture-of-experts layer."""
        return [forced_choice(routing, j, self.device, layout.own) for j in range(len(self._holders))]

    @torch.inference_mode()
    def step(
        self,
        inputs: Tensor,
        layout: Layout,
        context: int,
        *,
        forced: list[Choice] | None = None,
        timers: Timers | None = None,
        layers: int | None = None,
        chooser: Chooser = choose,
    ) -> Output:
        """Process ``layout``'s new tokens after ``context`` tokens in the cache; all ranks together.

        inputs: this device's token ids [T], or hidden states [T, D] for a model without a vocabulary. ``forced`` (see
        ``forced``) replaces the routers' choices. ``layers``: stop after so many. ``chooser``: how experts are
        chosen in a decoding step; prompts are routed by the gates.
        """
        chooser = chooser if layout.length == 1 else choose
        lap = timers.lap if timers is not None else no_lap
        x = self._begin(inputs, lap)
        if self.resting is not None:
            self.resting.begin()
        ordinals = {layer: ordinal for ordinal, layer in enumerate(self._strategies)}

        def choice(layer: int) -> Choice | None:
            return forced[ordinals[layer]] if forced is not None else None

        beside = Beside(self.model, self._layers[:layers], self._strategies, layout, choice, lap, chooser)
        for i, weights in enumerate(self._layers[:layers]):
            beside.read(i, x, "output")
            beside.read(i + 1, x, "input")
            strategy = self._strategies.get(i)
            if strategy is not None and strategy.start():
                lap(i, "gather")
            beside.turn()
            if weights.attention is not None:
                x = x + self._attention(x, i, layout, context)
                lap(i, "attention")
            beside.read(i + 1, x, "mid")
            beside.turn()
            if strategy is not None and self.model.layers[i].shortcut == "none":
                x = self._experts(x, i, strategy, layout, choice(i), chooser, partial(lap, i))
            x = self._ffn(x, i, partial(lap, i))
            x = beside.join(i, x)
        return self._finish(x, layout, lap)

    def _begin(self, inputs: Tensor, lap: StepLap) -> Tensor:
        """Embedding, where there is a vocabulary."""
        if not self.model.vocab_size:
            return inputs
        x = embed(inputs, self._embedding)
        lap(OUTSIDE, "embed")
        return x

    def _finish(self, x: Tensor, layout: Layout, lap: StepLap) -> Output:
        """Output projection, where there is a vocabulary."""
        if not self.model.vocab_size:
            return Output(x, None)
        logits = head(x[layout.last_rows], self._norm, self.model.norm_eps, self._head)
        lap(OUTSIDE, "head")
        return Output(x, logits)

    def _ffn(self, x: Tensor, index: int, lap: partial[None]) -> Tensor:
        """The dense FFN of a layer, and the shared experts of one whose routed experts read elsewhere."""
        weights = self._layers[index]
        if weights.dense is not None:
            x = x + dense(x, weights.dense)
            lap("dense")
        if weights.shared is not None and self.model.layers[index].shortcut != "none":
            assert weights.router is not None
            x = x + dense(rms_norm(x, weights.router.norm, weights.router.eps), weights.shared)
            lap("shared")
        return x

    def _attention(self, x: Tensor, index: int, layout: Layout, context: int) -> Tensor:
        """Attention output for this device's tokens; with divided heads the group's tokens are brought together."""
        weights, cache, batch = self._layers[index].attention, self.cache.layers[index], layout.batch(context)
        assert weights is not None
        if layout.tensor == 1:
            return attention(x, weights, cache, self._rope, batch)
        together = all_gather(x, layout.group_tokens, self._group)
        add_up = partial(all_reduce, group=self._group)
        part = attention(together, weights, cache, self._rope, batch, sum_over_group=add_up)
        return reduce_scatter(part, layout.group_tokens, self._group)

    def _experts(
        self,
        x: Tensor,
        index: int,
        strategy: Strategy,
        layout: Layout,
        forced: Choice | None,
        chooser: Chooser,
        lap: partial[None],
    ) -> Tensor:
        moe, weights = self.model.layers[index].moe, self._layers[index]
        assert moe is not None
        assert weights.router is not None
        tokens = routed(x, weights.router, moe, forced, chooser=chooser)
        residual = tokens.onto(x)
        lap("route")
        x = strategy.forward(tokens.normed, tokens.ids, tokens.weights, residual, layout, lap)
        if weights.shared is not None:
            x = x + dense(tokens.normed, weights.shared)
            lap("shared")
        return x


def no_lap(layer: int, part: Part) -> None:
    """Nobody measures."""
