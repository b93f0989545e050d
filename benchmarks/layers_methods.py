"""One mixture-of-experts layer on several ranks, by moeplan's strategies and by what others offer.

T tokens of all ranks, D model, H FFN columns, E experts, K top-k, M matrices into the FFN, G ranks. Everyone gets the
same routing, holds experts of the same numbers where it holds whole ones (E / G consecutive ones), and adds the layer's
output to the residual stream. Weights are shared: a method's are views of the layer's, where it needs no other form.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from moeplan.runtime.layout import Layout
from moeplan.runtime.strategies import LayerContext, Region, strategy_of
from moeplan.spec.layout import even
from moeplan.spec.model import Block, Model, Moe
from moeplan.spec.plan import LayerPlan, Strategy
from moeplan.tests.plans import hand_made_plan

HOT_EXPERTS, HOT_SHARE = 0.1, 0.6  # skewed: a tenth of the experts are chosen so often
ROUTINGS = ("balanced", "skewed")


class UnavailableError(Exception):
    """A method cannot run here, or not this shape."""


@dataclass(frozen=True)
class Shape:
    """E, K, D, H; ``matrices``: 2 gated (silu), 1 plain (relu); ``family``: whose module Transformers' methods are."""

    experts: int
    top_k: int
    hidden: int
    ffn: int
    matrices: int = 2
    family: str = "mixtral"

    @property
    def activation(self) -> str:
        return "silu" if self.matrices == 2 else "relu"

    def moe(self) -> Moe:
        return Moe(
            num_experts=self.experts,
            top_k=self.top_k,
            ffn_size=self.ffn,
            gated=self.matrices == 2,
            activation=self.activation,
        )


class Weights(NamedTuple):
    """gate_up [E, M, H, D], down [E, D, H]."""

    gate_up: Tensor
    down: Tensor


class Batch(NamedTuple):
    """x, residual [T, D], ids [T, K] int64, weights [T, K] f32 and, as a router gives them, ``gates`` in x's dtype."""

    x: Tensor
    residual: Tensor
    ids: Tensor
    weights: Tensor
    gates: Tensor
    layout: Layout

    def own(self) -> "Batch":
        """This rank's tokens."""
        x, residual, ids, weights, gates = (t[self.layout.own] for t in self[:5])
        return Batch(x, residual, ids, weights, gates, self.layout)


Method = Callable[[Batch], Tensor]
"""Output for this rank's tokens, or for all where every rank has the same batch."""


def make_weights(shape: Shape, dtype: torch.dtype, seed: int) -> Weights:
    g, s = torch.Generator().manual_seed(seed), shape
    sizes = (s.experts, s.matrices, s.ffn, s.hidden), (s.experts, s.hidden, s.ffn)
    limits = (3 / s.hidden) ** 0.5, (3 / s.ffn) ** 0.5
    drawn = (torch.empty(size, dtype=dtype).uniform_(-a, a, generator=g) for size, a in zip(sizes, limits, strict=True))
    return Weights(*drawn)


def make_batch(shape: Shape, dtype: torch.dtype, tokens: int, routing: str, rank: int, world: int) -> Batch:
    """The same on every rank; tokens are divided evenly."""
    g = torch.Generator().manual_seed(tokens)
    x, residual = torch.randn(2, tokens, shape.hidden, generator=g).to(dtype).unbind()
    popularity = torch.ones(shape.experts)
    if routing == "skewed":
        hot = max(1, round(HOT_EXPERTS * shape.experts))
        popularity[torch.randperm(shape.experts, generator=g)[:hot]] = (
            HOT_SHARE / (1 - HOT_SHARE) * (shape.experts - hot) / hot
        )
    ids = torch.multinomial(popularity.expand(tokens, -1), shape.top_k, generator=g)
    weights = torch.rand(tokens, shape.top_k, generator=g).softmax(1)
    counts = even(tokens, world)
    return Batch(x, residual, ids, weights, weights.to(dtype), Layout(rank, 1, counts, counts, 1))


def ours(strategy: Strategy, shape: Shape, w: Weights, hosts: list[int]) -> Method:
    """One of moeplan's, with experts and columns divided evenly."""
    rank, world = dist.get_rank(), dist.get_world_size()
    bounds = [0, *torch.tensor(even(shape.experts, world)).cumsum(0).tolist()]
    slots = tuple(tuple(range(bounds[g], bounds[g + 1])) for g in range(world))
    if strategy == "sharded":
        plan = LayerPlan(strategy=strategy, slots=((),) * world, split=even(shape.ffn, world))
    else:
        plan = LayerPlan(strategy=strategy, slots=slots)
    device = w.down.device
    region = Region(w.down.dtype, device)
    layer = strategy_of(plan, LayerContext(rank, hosts, shape.moe(), shape.hidden, device, region))
    experts, (first, end), _ = layer.stored
    here = slice(experts[0], experts[-1] + 1)
    layer.prepare(w.gate_up[here, :, first:end].contiguous(), w.down[here, :, first:end].contiguous())

    def call(batch: Batch) -> Tensor:
        own = batch.own()
        layer.start()
        return layer.forward(own.x, own.ids, own.weights, own.residual, batch.layout, lambda part: None)

    return call


FAMILIES = {
    "mixtral": ("Mixtral", "num_local_experts", "intermediate_size"),
    "qwen3_moe": ("Qwen3Moe", "num_experts", "moe_intermediate_size"),
    "deepseek_v3": ("DeepseekV3", "n_routed_experts", "moe_intermediate_size"),
}
"""Prefix of its classes, and the names of E and H in its configuration."""


def family_module(shape: Shape) -> nn.ModuleDict:
    """The experts module of the family under the name ``experts``, without memory, its implementation grouped_mm."""
    if shape.matrices == 1:
        raise UnavailableError("Switch's experts do not use its interface for experts")
    prefix, experts, ffn = FAMILIES[shape.family]
    module = import_module(f"transformers.models.{shape.family}.modeling_{shape.family}")
    sizes: dict[str, Any] = {"hidden_size": shape.hidden, ffn: shape.ffn, experts: shape.experts}
    sizes |= {"experts_implementation": "grouped_mm", "hidden_act": shape.activation}
    config = import_module(f"transformers.models.{shape.family}.configuration_{shape.family}")
    with torch.device("meta"):
        return nn.ModuleDict(
            {"experts": getattr(module, f"{prefix}Experts")(getattr(config, f"{prefix}Config")(**sizes))}
        )


def hold(experts: nn.Module, w: Weights) -> None:
    """All of the layer's weights, as views."""
    for name, view in (("gate_up_proj", w.gate_up.flatten(1, 2)), ("down_proj", w.down)):
        experts._parameters[name] = nn.Parameter(view, requires_grad=False)


def planned(kind: str, shape: Shape, w: Weights, hosts: list[int]) -> Method:
    """The family's module under a plan; ``whole``: every rank has a copy of every expert."""
    from moeplan.transformers import apply_plan

    world, everything = dist.get_world_size(), tuple(range(shape.experts))
    bounds = [0, *torch.tensor(even(shape.experts, world)).cumsum(0).tolist()]
    layer = {
        "ep": LayerPlan(strategy="ep", slots=tuple(everything[bounds[g] : bounds[g + 1]] for g in range(world))),
        "sharded": LayerPlan(strategy="sharded", slots=((),) * world, split=even(shape.ffn, world)),
        "whole": LayerPlan(strategy="ep", slots=(everything,) * world),
    }[kind]
    block = Block(hidden_size=shape.hidden, moe=shape.moe())
    model = Model(name=shape.family, family=shape.family, vocab_size=0, blocks=(block,), dtype="f32")
    names = [f"host{host}" for host in hosts]
    plan = hand_made_plan(model, f"prefill:{world}@1", [layer], tokens=(1,) * world, hosts=names)
    net = family_module(shape)
    hold(net["experts"], w)
    apply_plan(net, plan)
    return _module_method(net["experts"])


def whole(shape: Shape, w: Weights, hosts: list[int]) -> Method:
    """Transformers' ``grouped_mm`` with every expert on every rank."""
    net = family_module(shape)
    hold(net["experts"], w)
    return _module_method(net["experts"])


def _module_method(experts: nn.Module) -> Method:
    def call(batch: Batch) -> Tensor:
        own = batch.own()
        return own.residual + experts(own.x, own.ids, own.gates)

    return call


def transformers(implementation: str, shape: Shape, w: Weights, hosts: list[int]) -> Method:
    """Its own expert parallelism with ``grouped_mm`` experts, through ``apply_expert_parallelism``."""
    from torch.distributed.tensor import DTensor, Shard
    from transformers.distributed.expert_parallel import apply_expert_parallelism

    world, model = dist.get_world_size(), family_module(shape)
    both = init_device_mesh("cpu", (world, 1), mesh_dim_names=("ep", "tp"))
    mesh = both["ep"]
    plan = {f"experts.{name}": "grouped_gemm" for name in ("gate_up_proj", "down_proj")}
    shared = mesh if implementation == "all_reduce" else both["tp"]
    apply_expert_parallelism(model, mesh, shared, plan | {"experts": "ep_dispatch_experts"}, implementation)
    experts, here = model["experts"], w.down.chunk(world)[dist.get_rank()]
    views = {"gate_up_proj": w.gate_up.chunk(world)[dist.get_rank()].flatten(1, 2), "down_proj": here}
    for name, view in views.items():
        local = DTensor.from_local(view, mesh, [Shard(0)], run_check=False)
        experts._parameters[name] = nn.Parameter(local, requires_grad=False)

    def call(batch: Batch) -> Tensor:
        given = batch if implementation == "all_reduce" else batch.own()
        return given.residual + experts(given.x, given.ids, given.gates)

    return call


def deepspeed(shape: Shape, w: Weights, hosts: list[int]) -> Method:
    """DeepSpeed-MoE's layer, dropless; its gate is replaced by one that hands on the routing that everyone gets, and
    agrees on the capacity as its own does."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed.comm
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from None
    rank, world, group = dist.get_rank(), dist.get_world_size(), dist.group.WORLD
    deepspeed.comm.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)

    class Expert(nn.Module):
        def __init__(self, gate_up: Tensor, down: Tensor) -> None:
            super().__init__()
            self.up, self.down = (nn.Parameter(t, requires_grad=False) for t in (gate_up.flatten(0, 1), down))

        def forward(self, x: Tensor) -> Tensor:
            hidden = F.linear(x, self.up)
            if shape.matrices == 2:
                gate, up = hidden.chunk(2, -1)
                return F.linear(F.silu(gate) * up, self.down)
            return F.linear(F.relu(hidden), self.down)

    class Gate(nn.Module):
        def _set_ep_group(self, ep_group: object) -> None:
            """The layer tells its gate."""

        def forward(self, x: Tensor, routing: tuple[Tensor, Tensor], *_: object) -> tuple[object, ...]:
            ids, weights = routing
            experts, order = ids.flatten().sort(stable=True)
            counts = torch.bincount(experts, minlength=shape.experts)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[experts]
            capacity = counts.max()
            deepspeed.comm.all_reduce(capacity, op=deepspeed.comm.ReduceOp.MAX, group=group)
            return 0.0, capacity, shape.experts, ids.t(), place.view_as(ids).t(), weights.t(), counts

    each = shape.experts // world
    experts = Experts(nn.Identity(), each)
    mine = range(rank * each, (rank + 1) * each)
    experts.deepspeed_experts = nn.ModuleList(Expert(w.gate_up[e], w.down[e]) for e in mine)
    layer = MOELayer(Gate(), experts, "", world, each)
    layer._set_ep_group(group)

    def call(batch: Batch) -> Tensor:
        own = batch.own()
        return own.residual + layer(own.x, (own.ids, own.weights))

    return call


METHODS: dict[str, Callable[[Shape, Weights, list[int]], Method]] = {
    "ep": lambda *given: ours("ep", *given),
    "sharded": lambda *given: ours("sharded", *given),
    "gathered": lambda *given: ours("gathered", *given),
    "apply_plan ep": lambda *given: planned("ep", *given),
    "apply_plan sharded": lambda *given: planned("sharded", *given),
    "apply_plan whole": lambda *given: planned("whole", *given),
    "Transformers all_to_all": lambda *given: transformers("all_to_all", *given),
    "Transformers all_reduce": lambda *given: transformers("all_reduce", *given),
    "Transformers whole": whole,
    "DeepSpeed-MoE": deepspeed,
}
OURS = ("ep", "sharded", "gathered", "apply_plan ep", "apply_plan sharded", "apply_plan whole")
