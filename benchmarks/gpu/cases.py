"""Layers and routings that the stages try, and the layer in float64 as plain PyTorch computes it.

Letters: T tokens, D model, E experts, K top-k, H ffn columns, M 2 for a gated FFN or 1, n rows of one expert.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.benchmarks.kernels_alternatives import Layer, Shape, make_layer

# DeepSeek-V3's with the experts that one of four devices holds; Mixtral 8x7B and gpt-oss-20b whole.
SHAPES = {
    "mixtral": Shape("mixtral", 4096, 14336, 8, 2),
    "deepseek": Shape("deepseek", 7168, 2048, 64, 8),
    "gpt-oss": Shape("gpt-oss", 2880, 2880, 32, 4, "swiglu_clamped"),
}
DRY_SHAPES = {
    "mixtral": Shape("mixtral", 64, 96, 3, 2),
    "deepseek": Shape("deepseek", 64, 32, 5, 3),
    "gpt-oss": Shape("gpt-oss", 40, 40, 3, 2, "swiglu_clamped"),
}
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}
SKEW = 1.2  # the power law's exponent: of 8 experts the busiest has a third of the tokens as its first choice


class Inputs(NamedTuple):
    """x, dy: [T, D]; ids: [T, K] int64, -1 for an expert that is elsewhere; gates: [T, K] float32."""

    x: Tensor
    ids: Tensor
    gates: Tensor
    dy: Tensor


def layer_on(shape: Shape, dtype: torch.dtype, device: torch.device) -> Layer:
    return make_layer(shape, dtype, device)


def inputs(
    shape: Shape, dtype: torch.dtype, device: torch.device, tokens: int, skewed: bool, elsewhere: bool = True
) -> Inputs:
    """Distinct experts of each token, all alike or by a power law; with a skew a tenth of them elsewhere if allowed."""
    g = torch.Generator().manual_seed(tokens + skewed)
    popularity = torch.arange(1, shape.experts + 1) ** (-SKEW if skewed else 0.0)
    # The K largest of log-weights with Gumbel noise: a draw without replacement.
    noise = -torch.log(-torch.log(torch.rand(tokens, shape.experts, generator=g).clamp(1e-9, 1 - 1e-7)))
    ids = (popularity.log() + noise).topk(shape.top_k, dim=1).indices
    gates = torch.rand(tokens, shape.top_k, generator=g) + 0.1
    gates /= gates.sum(1, keepdim=True)
    if skewed and elsewhere:
        ids[torch.rand(ids.shape, generator=g) < 0.1] = -1
    x, dy = (torch.randn(tokens, shape.model, generator=g).to(device, dtype) for _ in range(2))
    return Inputs(x, ids.to(device), gates.to(device), dy)


def activate(projected: Tensor, shape: Shape) -> Tensor:
    """[n, M H] -> [n, H], from the models' papers, not from our code."""
    if shape.matrices == 1:
        return F.relu(projected) if shape.activation == "relu" else F.silu(projected)
    gate, up = projected.chunk(2, -1)
    if shape.activation == "swiglu_clamped":
        gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
        return (up + 1) * gate * torch.sigmoid(1.702 * gate)
    return F.silu(gate) * up


class Expected(NamedTuple):
    """Of the whole call, float64: y [T, D] and the gradients of x [T, D] and of the gates [T, K]."""

    y: Tensor
    x: Tensor
    gates: Tensor


def expected(layer: Layer, given: Inputs) -> Iterator[tuple[int, dict[str, Tensor]] | Expected]:
    """Expert by expert, for a float64 layer is four times as large: the gradients of each expert's weights, in the
    end what is of the whole call. By autograd."""
    x, ids, gates, dy = given
    y = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    dx, dgates = torch.zeros_like(y), torch.zeros(ids.shape, dtype=torch.float64, device=x.device)
    for e in range(layer.shape.experts):
        token, choice = torch.where(ids == e)
        rows, gate = (t.double().requires_grad_() for t in (x[token], gates[token, choice]))
        weights = {"gate_up": layer.gate_up[e].flatten(0, 1), "down": layer.down[e]}
        if layer.gate_up_bias is not None and layer.down_bias is not None:
            weights |= {"gate_up_bias": layer.gate_up_bias[e].flatten(), "down_bias": layer.down_bias[e]}
        wide = {name: w.double().requires_grad_() for name, w in weights.items()}
        hidden = activate(F.linear(rows, wide["gate_up"], wide.get("gate_up_bias")), layer.shape)
        out = F.linear(hidden, wide["down"], wide.get("down_bias")) * gate[:, None]
        found = torch.autograd.grad(out, [rows, gate, *wide.values()], dy[token].double())
        y.index_add_(0, token, out.detach())
        dx.index_add_(0, token, found[0])
        dgates[token, choice] = found[1]
        yield e, dict(zip(wide, found[2:], strict=True))
    yield Expected(y, dx, dgates)


class Error:
    """Norm of a difference over the norm of what is wanted, of tensors that come in parts; infinite for a NaN."""

    def __init__(self) -> None:
        self._wrong = self._norm = 0.0

    def add(self, got: Tensor, want: Tensor) -> None:
        want = want.double()
        self._wrong += float((got.double() - want).square().sum())
        self._norm += float(want.square().sum())

    @property
    def relative(self) -> float:
        value = (self._wrong / (self._norm or 1.0)) ** 0.5
        return value if value == value else float("inf")
