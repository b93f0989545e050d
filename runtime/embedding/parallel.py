"""Transformers' own expert parallelism with moeplan's exchange and kernels.

A user calls ``register`` once and names it: ``DistributedConfig(ep_size=N, ep_implementation="moeplan")``.

Transformers loads every rank its even and contiguous share of the experts, and says neither a plan nor a layer: copies,
uneven numbers and other placements are ``apply_plan``'s. A token crosses once to every rank that has experts of it.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from ...spec.errors import MoeplanError
from ...spec.layout import even
from ...spec.model import Moe
from ...spec.plan import LayerPlan
from ..collectives import all_gather
from ..strategies.layer import LayerContext, Region
from .form import form_of, tensors_of
from .layer import NAME, PlannedLayer
from .package import transformers_package


def register() -> None:
    """Make ``ep_implementation="moeplan"`` known to Transformers. Raises MoeplanError where its version has no such
    implementations."""
    package = transformers_package()
    try:
        theirs: Any = import_module("transformers.distributed.expert_parallel")
    except ImportError:
        theirs = None
    if not hasattr(theirs, "EPImplementationInterface"):
        raise MoeplanError(
            f"Transformers {package.__version__} takes no implementations of expert parallelism: install 5.23, or use "
            "apply_plan"
        )

    class MoeplanExpertParallel(theirs.EPImplementation):
        """See the module; one for each layer."""

        def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
            super().__init__(experts, ep_mesh, tp_mesh)
            self._shared = Shared(experts, ep_mesh, tp_mesh)

        def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
            return self._shared(hidden_states, top_k_index, top_k_weights)

    theirs.EPImplementationInterface.register(NAME, MoeplanExpertParallel)


class Shared:
    """One layer of a model that Transformers has split, every rank an even run of experts.

    Ranks of a tensor group hold the same tokens: each sends its part of them, and the outputs are gathered.
    """

    def __init__(self, experts: nn.Module, ep_mesh: Any, tp_mesh: Any) -> None:
        self._module, self._group, self._tensor = experts, ep_mesh.get_group(), tp_mesh
        self._rank, self._devices = ep_mesh.get_local_rank(), ep_mesh.size()
        self._layer: PlannedLayer | None = None

    def __call__(self, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """hidden [T, D], ids, weights [T, K] -> [T, D]."""
        if self._layer is None:
            self._layer = self._made(ids.shape[1])
        size = self._tensor.size()
        if size == 1:
            return self._layer(self._module, hidden, ids, weights)
        if torch.is_grad_enabled() and hidden.requires_grad:
            raise MoeplanError(f'ep_implementation="{NAME}" with tensor parallelism does not train: use "all_to_all"')
        held = even(len(hidden), size)
        first = sum(held[: self._tensor.get_local_rank()])
        own = slice(first, first + held[self._tensor.get_local_rank()])
        y = self._layer(self._module, hidden[own], ids[own], weights[own])
        return all_gather(y.contiguous(), held, self._tensor.get_group())

    def _made(self, top_k: int) -> PlannedLayer:
        """At the first call, when the weights are there; the module's tensors are then this rank's own."""
        form = form_of(type(self._module).__name__, self._module)
        total = form.experts * self._devices
        slots = tuple(tuple(range(g * form.experts, (g + 1) * form.experts)) for g in range(self._devices))
        plan = LayerPlan(strategy="ep", slots=slots)
        moe = Moe(num_experts=total, top_k=top_k, ffn_size=form.ffn, gated=form.gated, bias=form.bias)
        tensor = next(tensors_of(self._module, form))
        region = Region(tensor.dtype, tensor.device)
        context = LayerContext(
            self._rank, [0] * self._devices, moe, form.hidden, tensor.device, region, group=self._group
        )
        layer = PlannedLayer(plan, context, form)
        layer.hold(self._module)
        return layer
