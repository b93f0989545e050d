"""One rank of a plan whose layers are Transformers' own modules, with moeplan's experts in them.

Letters: T this device's tokens, B its sequences, D model, V vocabulary, K top-k.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ...spec import Plan
from ...spec.errors import MoeplanError
from ...spec.operators import Part
from ...spec.routing import Routing
from ..embedding.apply import APPLIED, hosts_of
from ..embedding.form import Form
from ..embedding.layer import ATTRIBUTE, NAME, PlannedLayer, planned_forward
from ..executor import DTYPES, Output, StepLap, no_lap
from ..groups import open_levels
from ..layout import Layout
from ..reference import forced_choice
from ..router import Choice, Chooser, choose
from ..strategies import LayerContext, Region
from ..timers import OUTSIDE, Timers
from .experts import form_of_meta
from .net import Net, build
from .past import Past
from .source import FamilyWeights
from .weights import fixed


class TimedLayer(PlannedLayer):
    """A planned layer of a step whose layout is known: its parts are timed, and its experts may be given.

    forced: [T, K] experts in the place of the router's; asleep: nothing is computed, and zeros are given.
    """

    def __init__(self, plan: Any, context: LayerContext, form: Form, layout: Layout) -> None:
        super().__init__(plan, context, form)
        self.forced: Tensor | None = None
        self.asleep, self.lap, self._of = False, _nobody, layout

    def begin(self) -> bool:
        """Before the layer's mixer; whether anything travels beside it."""
        return not self.asleep and self._strategy.start()

    def __call__(self, module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.asleep:
            return torch.zeros_like(hidden)
        self.lap("mixer")
        ids = ids if self.forced is None else self.forced.view(ids.shape)
        return super().__call__(module, hidden, ids, weights)

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return self._strategy.forward(x, ids, weights, torch.zeros_like(x), self._of, self.lap)


class FamilyExecutor:
    """As ``runtime.executor.Executor``, for plans of models with a ``family_config``.

    Every rank constructs its executor at the same time. Raises MoeplanError for strategies that need moeplan's own
    attention, and for a Transformers that builds another model than the plan is for.
    """

    def __init__(self, plan: Plan, rank: int, source: FamilyWeights, *, device: torch.device) -> None:
        for i, asked in zip(plan.model.moe_layers, plan.layers, strict=True):
            if asked.strategy not in APPLIED:
                raise MoeplanError(
                    f"layer {i}: {asked.strategy} needs attention of moeplan's own, {plan.model.family} has "
                    f"Transformers': solve with --strategy {' or '.join(APPLIED)}"
                )
        self.model, self.device, self.layout = plan.model, device, Layout.of(plan, rank)
        self.net = build(plan.model, DTYPES[plan.dtype])
        source.fill(self.net)
        self._planned = dict(self._install(plan, rank, source))
        self._lap: StepLap = no_lap
        for i, layer in enumerate(self.net.layers):
            layer.register_forward_pre_hook(partial(self._before, i))
            layer.register_forward_hook(partial(self._after, i))
        self._last: Tensor | None = None
        layers = len(self.net.layers)
        self.cache = Past(self.net, self.layout.group_sequences, self._one_token, layers)

    def _install(self, plan: Plan, rank: int, source: FamilyWeights) -> Iterator[tuple[int, TimedLayer]]:
        """This rank's part of every layer's experts, in the place of the module's own."""
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(NAME, planned_forward)
        hosts, region = hosts_of(plan), Region(DTYPES[plan.dtype], self.device)
        levels = open_levels(hosts) if any(layer.strategy == "hierarchical" for layer in plan.layers) else None
        shared: dict[tuple, list[nn.Parameter]] = {}
        for i, layer_plan in zip(plan.model.moe_layers, plan.layers, strict=True):
            module, block = self.net.experts[i], plan.model.layers[i]
            assert block.moe is not None
            form = form_of_meta(module)
            context = LayerContext(rank, hosts, block.moe, block.hidden_size, self.device, region, levels)
            planned = TimedLayer(layer_plan, context, form, self.layout)
            key = i % source.stored, planned.stored.experts, planned.stored.columns
            if key not in shared:
                adds = layer_plan.split is None or rank == next(g for g, n in enumerate(layer_plan.split) if n)
                shared[key] = [fixed(t) for t in source.experts(i, form, *planned.stored[:2], adds)]
            for name, part in zip(form.names, shared[key], strict=True):
                module._parameters[name] = part
            planned.hold(module)
            setattr(module, ATTRIBUTE, planned)
            config: Any = copy.copy(module.config)
            config._experts_implementation_internal = NAME
            module.config = config
            planned.lap = partial(self._timed, i)
            yield i, planned

    def reads(self) -> tuple[int, ...]:
        """Nothing rests outside memory."""
        return ()

    def forced(self, routing: Routing, layout: Layout) -> list[Choice]:
        """This device's tokens of a routing, on the device, one entry per mixture-of-experts layer."""
        return [forced_choice(routing, j, self.device, layout.own) for j in range(len(self._planned))]

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
        """As ``Executor.step``, for the step that the plan is for; with ``layers`` after a context filled anew."""
        self._lap = timers.lap if timers is not None else no_lap
        for j, planned in enumerate(self._planned.values()):
            planned.forced = None if forced is None else forced[j][0]
        count = len(self.net.layers) if layers is None else layers
        if not len(inputs):
            return self._idle(count)
        past = self.cache.again() if layers is None else self.cache.anew()
        with first_layers(self.net, count):
            found = self.net.model(
                input_ids=inputs.view(-1, layout.length), past_key_values=past, use_cache=True, logits_to_keep=1
            )
        self._lap(OUTSIDE, "head")
        assert self._last is not None
        dtype = self.net.model.dtype
        return Output(self._last.reshape(len(inputs), -1).to(dtype), found.logits[:, -1].to(dtype))

    def _idle(self, layers: int) -> Output:
        """A device without tokens takes part in every exchange."""
        hidden = self.model.layers[0].hidden_size
        none = torch.empty((0, hidden), dtype=self.net.model.dtype, device=self.device)
        for i, planned in self._planned.items():
            if i < layers:
                moe = self.model.layers[i].moe
                assert moe is not None
                ids = torch.empty((0, moe.top_k), dtype=torch.long, device=self.device)
                planned.begin()
                planned(self.net.experts[i], none, ids, ids.float())
        streams = getattr(self.net.config, "hc_mult", 1)  # of hidden states that a layer gives side by side
        return Output(none.new_empty((0, streams * hidden)), none.new_empty((0, self.model.vocab_size)))

    def _one_token(self, ids: Tensor, past: Any) -> None:
        for planned in self._planned.values():
            planned.asleep = True
        try:
            with torch.inference_mode():
                self.net.base(input_ids=ids, past_key_values=past, use_cache=True)
        finally:
            for planned in self._planned.values():
                planned.asleep = False

    def _before(self, index: int, layer: nn.Module, args: Any) -> None:
        if index == 0:
            self._timed(OUTSIDE, "embed")
        planned = self._planned.get(index)
        if planned is not None and planned.begin():
            self._timed(index, "gather")

    def _after(self, index: int, layer: nn.Module, args: Any, output: Any) -> None:
        self._last = output[0] if isinstance(output, tuple) else output
        self._timed(index, "mixer")

    def _timed(self, layer: int, part: Part) -> None:
        self._lap(layer, part)


@contextmanager
def first_layers(net: Net, count: int) -> Iterator[None]:
    """Within it the model ends after so many layers."""
    name = next(name for name, module in net.base.named_children() if module is net.layers)
    if count < len(net.layers):
        setattr(net.base, name, nn.ModuleList(list(net.layers)[:count]))
    try:
        yield
    finally:
        setattr(net.base, name, net.layers)


def _nobody(part: Part) -> None:
    """Nobody measures."""
