"""Backward through a plan: what fine-tuning needs.

The forward pass is the strategy's own and keeps its inputs only. Backward, tokens and the gradients of their outputs
travel once more, by ``ep``'s way to the experts where they rest, or, where these are divided by columns, to everyone;
the experts are computed again there, and the gradients of tokens and gate weights return.

Gradients of an expert are those of the sum of all ranks' losses; all other parameters have their own rank's.

T tokens of this device, M rows here, D model, K top-k.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ...spec.errors import MoeplanError
from ...spec.plan import LayerPlan
from ..collectives import all_gather, all_to_all, exchange_counts
from ..strategies.ep import fan_out, phases, served
from ..strategies.layer import LayerContext
from ..strategies.serving import serving
from .compute import experts_from
from .form import Form

Run = Callable[[Tensor, Tensor, Tensor], Tensor]
Local = Callable[[Tensor, Tensor, Tensor, Tensor], list[Tensor]]
"""x [M, D], ids [M, K], weights [M, K], dy [M, D] -> gradients of x, of the weights and of the parameters."""


class Backward:
    """Of one layer: where gradients are computed."""

    def __init__(self, plan: LayerPlan, context: LayerContext) -> None:
        self._sharded, self._group, self._devices = plan.split is not None, context.group, len(plan.slots)
        experts = context.moe.num_experts
        slots = tuple(map(tuple, plan.resting())) if plan.strategy == "gathered" else plan.slots
        self._copies = not self._sharded and sum(map(len, slots)) > experts
        if not self._sharded and not self._copies:
            alone = LayerPlan(strategy="ep", slots=slots)
            self._table = serving(alone, context.hosts, experts, context.rank, context.device)

    def __call__(self, x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor, local: Local) -> list[Tensor]:
        """Gradients of x [T, D], of the weights [T, K], and of this device's parameters. All devices together."""
        if self._copies:
            raise MoeplanError(
                "the plan has copies of experts, which would learn different things: fine-tune with a plan without"
            )
        return (
            self._by_columns(x, ids, weights, dy, local) if self._sharded else self._by_rows(x, ids, weights, dy, local)
        )

    def _by_rows(self, x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor, local: Local) -> list[Tensor]:
        destination, slot = served(ids, self._table, phases(0, len(x), x.device))
        target, token, counts = fan_out(destination, self._devices)
        here = destination.index_select(0, token) == target.unsqueeze(1)
        places = torch.where(here, slot.index_select(0, token), -1)
        sent, came = torch.stack([counts, exchange_counts(counts, self._group)]).tolist()
        rows, gates, back = (
            all_to_all(part.index_select(0, token), sent, came, self._group) for part in (x, weights, dy)
        )
        dx, dweights, *rest = local(rows, all_to_all(places, sent, came, self._group), gates, back)
        sums = []
        for part, like in ((dx, x), (dweights, weights)):
            returned = all_to_all(part, came, sent, self._group)
            sums.append(
                torch.zeros_like(like, dtype=torch.float32).index_add_(0, token, returned.float()).to(like.dtype)
            )
        return [*sums, *rest]

    def _by_columns(self, x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor, local: Local) -> list[Tensor]:
        own = len(x)
        held = exchange_counts(torch.full((self._devices,), own, device=x.device), self._group).tolist()
        dx, dweights, *rest = local(
            *(all_gather(part.contiguous(), held, self._group) for part in (x, ids, weights, dy))
        )
        sums = []
        for part in (dx, dweights):
            partial = all_to_all(part, held, [own] * self._devices, self._group)
            sums.append(partial.view(self._devices, own, part.shape[1]).sum(0))
        return [*sums, *rest]


class Planned(Function):
    """A layer's experts for autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        backward: Backward,
        module: nn.Module,
        form: Form,
        ids: Tensor,
        x: Tensor,
        weights: Tensor,
        *own: Tensor,
    ) -> Tensor:
        """own: the experts' tensors in the order of ``Form.names``, then the module's other parameters."""
        ctx.back, ctx.module, ctx.form = backward, module, form
        ctx.save_for_backward(ids, x, weights, *own)
        return run(x, ids, weights)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        ids, x, weights, *own = ctx.saved_tensors

        def local(x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor) -> list[Tensor]:
            return local_gradients(ctx.module, ctx.form, own, x, ids, weights, dy)

        dx, dweights, *rest = ctx.back(x, ids, weights, dy.contiguous(), local)
        return (None, None, None, None, None, dx, dweights, *rest)


def local_gradients(
    module: nn.Module, form: Form, own: Sequence[Tensor], x: Tensor, ids: Tensor, weights: Tensor, dy: Tensor
) -> list[Tensor]:
    """Of x, of the weights and of ``own``; letters and order as in ``Local`` and ``Planned``."""
    count = len(form.names)
    with torch.enable_grad():
        leaves = [part.detach().requires_grad_() for part in (x, weights, *own[:count])]
        others = [part for part in own[count:] if part.requires_grad]
        y = experts_from(module, form, leaves[2:])(leaves[0], ids, leaves[1])
        inputs = [*leaves, *others]
        found: tuple[Tensor | None, ...] = (None,) * len(inputs)  # where no expert was asked for anything here
        if y.requires_grad:
            found = torch.autograd.grad(y, inputs, dy.to(y.dtype), allow_unused=True)
    given = [torch.zeros_like(part) if grad is None else grad for part, grad in zip(inputs, found, strict=True)]
    rest = iter(given[len(leaves) :])
    return [
        *given[: len(leaves)],
        *(next(rest) if part.requires_grad else torch.zeros_like(part) for part in own[count:]),
    ]
