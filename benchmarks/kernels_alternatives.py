"""What the kernels are measured beside: the same layer on the same weights, as others compute it today.

Letters: T tokens, D model, E experts, K top-k, H ffn columns, M 2 for a gated FFN or 1. Every alternative is a function
of (x [T, D], ids [T, K] int64, weights [T, K] float32) -> [T, D] and the parameters that it differentiates.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moeplan.runtime.kernels import expert_ffn
from moeplan.runtime.kernels.activation import activate

Run = Callable[[Tensor, Tensor, Tensor], Tensor]

GROUPED_MM = F.grouped_mm if hasattr(F, "grouped_mm") else torch._grouped_mm


class Shape(NamedTuple):
    """The experts of one model's layer."""

    name: str
    model: int
    ffn: int
    experts: int
    top_k: int
    activation: str = "silu"
    matrices: int = 2

    @property
    def biases(self) -> bool:
        return self.activation == "swiglu_clamped"


@dataclass(frozen=True)
class Layer:
    """Weights of one layer, as ``expert_ffn`` takes them."""

    shape: Shape
    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None

    @property
    def parameters(self) -> list[Tensor]:
        return [t for t in (self.gate_up, self.down, self.gate_up_bias, self.down_bias) if t is not None]

    @cached_property
    def transposed(self) -> dict[str, Tensor]:
        """gpt-oss's own form, [E, D, 2 H] with gate and up interleaved: a copy, which those who want it share."""
        gate_up, bias, e = self.gate_up, self.gate_up_bias, self.shape.experts
        assert bias is not None
        assert self.down_bias is not None
        return {
            "gate_up_proj": gate_up.permute(0, 3, 2, 1).reshape(e, self.shape.model, -1),
            "gate_up_proj_bias": bias.transpose(1, 2).reshape(e, -1),
            "down_proj": self.down.transpose(1, 2).contiguous(),
            "down_proj_bias": self.down_bias,
        }


class Method(NamedTuple):
    run: Run
    parameters: list[Tensor]


class UnavailableError(Exception):
    """The alternative is not installed, or has no form of this layer."""


def make_layer(shape: Shape, dtype: torch.dtype, device: torch.device | str = "cpu") -> Layer:
    """Random weights, of fan-in variance; a drawn tile is repeated, as drawing gigabytes takes minutes."""
    tile = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).to(device, dtype)

    def draw(*size: int, of: int) -> Tensor:
        out = torch.empty(size, dtype=dtype, device=device)
        flat, scaled = out.view(-1), tile / of**0.5
        for first in range(0, len(flat), len(tile)):
            part = flat[first : first + len(tile)]
            part.copy_(scaled[: len(part)])
        return out

    s = shape
    gate_up = draw(s.experts, s.matrices, s.ffn, s.model, of=s.model)
    down = draw(s.experts, s.model, s.ffn, of=s.ffn)
    if not s.biases:
        return Layer(s, gate_up, down, None, None)
    return Layer(s, gate_up, down, draw(s.experts, s.matrices, s.ffn, of=1), draw(s.experts, s.model, of=1))


def ours(layer: Layer) -> Method:
    return _ours(layer, None)


def triton(layer: Layer) -> Method:
    """moeplan's kernels for GPUs, also where Triton's interpreter runs them."""
    return _ours(layer, "triton")


def vendor(layer: Layer) -> Method:
    """moeplan's own other implementation: one vendor product after the other, where there is no compiler."""
    return _ours(layer, "grouped")


def _ours(layer: Layer, implementation: str | None) -> Method:
    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return expert_ffn(
            x,
            layer.gate_up,
            layer.down,
            ids,
            weights,
            activation=layer.shape.activation,
            gate_up_bias=layer.gate_up_bias,
            down_bias=layer.down_bias,
            implementation=implementation,
        )

    return Method(run, layer.parameters)


def grouped_mm(layer: Layer) -> Method:
    """torch's grouped product over rows sorted by expert, with the sorted copy of the tokens that it needs."""
    s = layer.shape

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        projections, bias = _flat(layer)
        experts, order = ids.flatten().sort()
        token = order // s.top_k
        ends = torch.bincount(experts, minlength=s.experts).cumsum(0, dtype=torch.int32)
        hidden = GROUPED_MM(x[token], projections.transpose(1, 2), offs=ends)
        hidden = activate(hidden if bias is None else hidden + bias[experts], s.matrices, s.activation)
        out = GROUPED_MM(hidden, layer.down.transpose(1, 2), offs=ends)
        out = out if layer.down_bias is None else out + layer.down_bias[experts]
        y = x.new_zeros(x.shape, dtype=torch.float32)
        return y.index_add(0, token, out * weights.flatten()[order].unsqueeze(1)).to(x.dtype)

    return Method(run, layer.parameters)


def loop(layer: Layer) -> Method:
    """One expert after the other, rows found by one sort."""
    s = layer.shape

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        projections, bias = _flat(layer)
        experts, order = ids.flatten().sort()
        token = order // s.top_k
        counts = torch.bincount(experts, minlength=s.experts).tolist()
        gates = weights.flatten()[order].unsqueeze(1).split(counts)
        y = x.new_zeros(x.shape, dtype=torch.float32)
        # Taken apart at once: the gradient of each single expert would be a whole layer of zeros but for its part.
        none = [None] * s.experts
        each = zip(
            token.split(counts),
            gates,
            projections.unbind(),
            none if bias is None else bias.unbind(),
            layer.down.unbind(),
            none if layer.down_bias is None else layer.down_bias.unbind(),
            strict=True,
        )
        for rows, gate, up, up_bias, down, down_bias in each:
            if len(rows):
                hidden = activate(F.linear(x[rows], up, up_bias), s.matrices, s.activation)
                y = y.index_add_(0, rows, F.linear(hidden, down, down_bias) * gate)
        return y.to(x.dtype)

    return Method(run, layer.parameters)


def padded_bmm(layer: Layer) -> Method:
    """Every expert's rows padded to the busiest one's, then batched products: dropless capacity."""
    s = layer.shape

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        projections, bias = _flat(layer)
        experts, order = ids.flatten().sort()
        counts = torch.bincount(experts, minlength=s.experts)
        first = counts.cumsum(0) - counts
        slot = experts * int(counts.max()) + torch.arange(len(experts)) - first[experts]
        token = order // s.top_k
        padded = x.new_zeros(s.experts * int(counts.max()), s.model).index_copy(0, slot, x[token])
        hidden = torch.bmm(padded.view(s.experts, -1, s.model), projections.transpose(1, 2))
        hidden = activate(hidden if bias is None else hidden + bias.unsqueeze(1), s.matrices, s.activation)
        out = torch.bmm(hidden, layer.down.transpose(1, 2))
        out = (out if layer.down_bias is None else out + layer.down_bias.unsqueeze(1)).flatten(0, 1)[slot]
        y = x.new_zeros(x.shape, dtype=torch.float32)
        return y.index_add(0, token, out * weights.flatten()[order].unsqueeze(1)).to(x.dtype)

    return Method(run, layer.parameters)


def transformers_eager(layer: Layer) -> Method:
    return _transformers(layer, "eager")


def transformers_grouped(layer: Layer) -> Method:
    if layer.shape.matrices == 1:
        raise UnavailableError("Switch's experts have one form")
    return _transformers(layer, "grouped_mm")


def transformers_batched(layer: Layer) -> Method:
    return _transformers(layer, "batched_mm")


def _transformers(layer: Layer, form: str) -> Method:
    """The experts module of the model that the shape is like; its parameters are views of the layer's, or gpt-oss's
    ``transposed``."""
    try:
        from transformers.models.gpt_oss.modeling_gpt_oss import GptOssConfig, GptOssExperts
        from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralExperts
        from transformers.models.switch_transformers import modeling_switch_transformers as switch
    except ImportError as error:
        raise UnavailableError(f"transformers: {error}") from None
    s, (projections, _) = layer.shape, _flat(layer)
    sizes: dict[str, Any] = {"hidden_size": s.model, "intermediate_size": s.ffn, "num_local_experts": s.experts}
    sizes["experts_implementation"] = form
    with torch.device("meta"):
        if s.matrices == 1:
            config = switch.SwitchTransformersConfig(
                d_model=s.model, d_ff=s.ffn, num_experts=s.experts, dropout_rate=0.0, dense_act_fn=s.activation
            )
            module: nn.Module = switch.SwitchTransformersExperts(config)
        elif s.biases:
            module = GptOssExperts(GptOssConfig(**sizes))
        else:
            module = MixtralExperts(MixtralConfig(**sizes, hidden_act=s.activation))
    named: dict[str, Tensor] = {"gate_up_proj": projections, "down_proj": layer.down}
    if s.matrices == 1:
        named = {f"expert_{e}.wi.weight": projections[e] for e in range(s.experts)}
        named |= {f"expert_{e}.wo.weight": layer.down[e] for e in range(s.experts)}
    elif s.biases:
        named = layer.transposed
    for name, tensor in named.items():
        owner, _, leaf = name.rpartition(".")
        setattr(module.get_submodule(owner), leaf, nn.Parameter(tensor))

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return module(x, F.one_hot(ids, s.experts) if s.matrices == 1 else ids, weights.to(x.dtype))

    return Method(run, list(module.parameters()))


def deepspeed(layer: Layer) -> Method:
    """DeepSpeed-MoE's layer, dropless; its gate is replaced by one that hands on the routing that everyone gets.

    It is no dependency. To measure it, in an environment of its own with the project's:
    DS_BUILD_OPS=0 DS_ACCELERATOR=cpu pip install --no-build-isolation deepspeed
    """
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        from deepspeed.moe.experts import Experts
        from deepspeed.moe.sharded_moe import MOELayer
    except ImportError as error:
        raise UnavailableError(f"not installed ({error})") from None
    s, (projections, bias) = layer.shape, _flat(layer)

    class Expert(nn.Module):
        def __init__(self, e: int) -> None:
            super().__init__()
            self.up, self.down = nn.Parameter(projections[e]), nn.Parameter(layer.down[e])
            self.up_bias = None if bias is None else nn.Parameter(bias[e])
            self.down_bias = None if layer.down_bias is None else nn.Parameter(layer.down_bias[e])

        def forward(self, x: Tensor) -> Tensor:
            hidden = activate(F.linear(x, self.up, self.up_bias), s.matrices, s.activation)
            return F.linear(hidden, self.down, self.down_bias)

    class Gate(nn.Module):
        def forward(self, x: Tensor, routing: tuple[Tensor, Tensor], *_: object) -> tuple[object, ...]:
            ids, weights = routing
            experts, order = ids.flatten().sort(stable=True)
            counts = torch.bincount(experts, minlength=s.experts)
            place = torch.empty_like(order)
            place[order] = torch.arange(len(order)) - (counts.cumsum(0) - counts)[experts]
            capacity = counts.max()
            return 0.0, capacity, s.experts, ids.t(), place.view_as(ids).t(), weights.t(), counts

    experts = Experts(nn.Identity(), s.experts)
    experts.deepspeed_experts = nn.ModuleList(Expert(e) for e in range(s.experts))
    module = MOELayer(Gate(), experts, "", 1, s.experts)

    def run(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return module(x, (ids, weights))

    return Method(run, list(experts.parameters()))


def _flat(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """[E, M H, D] and [E, M H]."""
    return layer.gate_up.flatten(1, 2), None if layer.gate_up_bias is None else layer.gate_up_bias.flatten(1)


METHODS: dict[str, Callable[[Layer], Method]] = {
    "moeplan": ours,
    "moeplan grouped": vendor,
    "grouped_mm": grouped_mm,
    "loop": loop,
    "padded bmm": padded_bmm,
    "Transformers": transformers_eager,
    "Transformers grouped": transformers_grouped,
    "DeepSpeed-MoE": deepspeed,
}
OURS = {"moeplan", "moeplan grouped"}
