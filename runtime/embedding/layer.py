"""One layer of a user's model under a plan: what stands in the place of its experts' own forward.

T tokens of this device, D model, K top-k, G devices, E experts.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ...spec.errors import MoeplanError
from ...spec.operators import Part
from ...spec.plan import LayerPlan
from ..collectives import exchange_counts
from ..layout import Layout
from ..strategies import LayerContext, strategy_of
from ..strategies.gathered import Gathered
from .compute import experts_from, own_experts
from .form import Form, tensors_of
from .gradients import Backward, Planned

NAME = "moeplan"
"""Of the experts implementation that Transformers is told."""
ATTRIBUTE = "moeplan_layer"
"""Of an experts module: its ``PlannedLayer``."""


class PlannedLayer:
    """A strategy, and what it must be told of batches that it did not plan.

    Every device calls it with tokens of its own, also with none, in the same order of layers. ``stored`` says what the
    device keeps; ``hold`` is told the module that has it.
    """

    def __init__(self, plan: LayerPlan, context: LayerContext, form: Form) -> None:
        self._form, self._experts, self._top_k = form, context.moe.num_experts, context.moe.top_k
        self._rank, self._devices, self._group = context.rank, len(plan.slots), context.group
        self._counted = plan.split is not None
        self._strategy = strategy_of(plan, context)
        self._backward = Backward(plan, context)
        self.stored = self._strategy.stored

    def hold(self, module: nn.Module) -> None:
        """The module whose tensors are now this device's part, in the form of the whole."""
        if isinstance(self._strategy, Gathered):
            self._strategy.hold(list(tensors_of(module, self._form)), partial(experts_from, module, self._form))
        else:
            self._strategy.hold(own_experts(module, self._form))  # type: ignore[attr-defined]

    def __call__(self, module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [..., D], ids [..., K], weights [..., K] -> [..., D]; an id outside 0..E - 1 is no expert. Raises
        MoeplanError for another K than the plan's, by which rows are read."""
        if ids.shape[-1] != self._top_k:
            raise MoeplanError(
                f"{type(module).__name__}: {ids.shape[-1]} experts per token, the plan's model has {self._top_k}: "
                "solve for this model"
            )
        x = hidden.reshape(-1, hidden.shape[-1])
        ids = ids.reshape(-1, ids.shape[-1]).long()
        ids = ids.masked_fill((ids < 0) | (ids >= self._experts), -1)
        weights = weights.reshape(ids.shape).to(torch.promote_types(torch.float32, x.dtype))
        own = self._own(module)
        if torch.is_grad_enabled() and any(part.requires_grad for part in (x, weights, *own)):
            y = Planned.apply(self._run, self._backward, module, self._form, ids, x, weights, *own)
        else:
            with torch.no_grad():
                y = self._run(x, ids, weights)
        return y.view(hidden.shape)

    def idle(self, module: nn.Module) -> None:
        """The same without tokens."""
        like = next(tensors_of(module, self._form))
        ids = torch.empty((0, self._top_k), dtype=torch.long, device=like.device)
        with torch.no_grad():
            self(module, like.new_empty((0, self._form.hidden)), ids, like.new_empty(ids.shape))

    def _own(self, module: nn.Module) -> Sequence[Tensor]:
        """The experts' tensors, then the module's other parameters."""
        own = list(tensors_of(module, self._form))
        return [*own, *(part for child in module.children() for part in child.parameters())]

    def _run(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        self._strategy.start()
        return self._strategy.forward(x, ids, weights, torch.zeros_like(x), self._layout(x), _no_lap)

    def _layout(self, x: Tensor) -> Layout:
        """Tokens of every device: told where the strategy needs them, else as many as here. Those decide only which
        of several copies serves a token."""
        tokens = [len(x)] * self._devices
        if self._counted:
            tokens = exchange_counts(torch.full((self._devices,), len(x), device=x.device), self._group).tolist()
        return Layout(self._rank, 1, tuple(tokens), tuple(tokens), 1)


def planned_forward(module: nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The experts implementation that is registered with Transformers."""
    layer = getattr(module, ATTRIBUTE, None)
    if layer is None:
        raise MoeplanError(
            f'{type(module).__name__}: experts_implementation="{NAME}" is what apply_plan sets: call '
            "moeplan.transformers.apply_plan(model, plan) on the loaded model"
        )
    result: Tensor = layer(module, hidden, ids, weights)
    return result


def _no_lap(part: Part) -> None:
    """Nobody measures."""
