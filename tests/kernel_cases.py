"""Problems for the expert kernels, what they should give, and who can compute them here.

Letters: T tokens, D model, E experts, K top-k, H ffn columns, M 2 for a gated FFN or 1.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moeplan.runtime.kernels import expert_ffn, implementations, weights_of
from moeplan.runtime.kernels.registry import obstacle

GATED = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}
FFNS = ((2, "silu"), (1, "relu"), (2, "gelu"), (2, "swiglu_clamped"))
MORE_FFNS = ((1, "relu2"), (2, "gelu_tanh"), (1, "gelu_tanh"), (2, "relu2"), (2, "swiglu_clamped(1.25, 0.75, 0.5)"))
# Of weights_of: transposed, interleaved.
LAYOUTS = ((False, True), (True, False), (True, True))


class Problem(NamedTuple):
    """Arguments of ``expert_ffn``; the biases are None together."""

    x: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    ids: Tensor
    weights: Tensor

    def to(self, dtype: torch.dtype) -> "Problem":
        """All of ``dtype`` but the ids, and the gate weights, which are float64 only beside float64."""
        gates = self.weights.double() if dtype == torch.float64 else self.weights.float()
        return self._replace(**{n: t.to(dtype) for n, t in self.floats().items()})._replace(weights=gates)

    def floats(self) -> dict[str, Tensor]:
        return {n: t for n, t in self._asdict().items() if t is not None and t.is_floating_point()}

    def lying(self, transposed: bool, interleaved: bool) -> "Problem":
        """The same with weights and bias that lie as ``weights_of`` takes them: views, no more contiguous."""
        interleaved = interleaved and self.gate_up.shape[1] == 2

        def stored(t: Tensor) -> Tensor:
            return (t.transpose(1, 2) if interleaved else t).flatten(1, 2)

        up, down = stored(self.gate_up), self.down
        if transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        bias = None if self.gate_up_bias is None else stored(self.gate_up_bias).contiguous()
        gated = self.gate_up.shape[1] == 2
        views = weights_of(
            up.contiguous(), down.contiguous(), bias, gated=gated, transposed=transposed, interleaved=interleaved
        )
        return self._replace(gate_up=views.gate_up, down=views.down, gate_up_bias=views.gate_up_bias)

    def run(self, activation: str, implementation: str) -> Tensor:
        return expert_ffn(
            self.x,
            self.gate_up,
            self.down,
            self.ids,
            self.weights,
            activation=activation,
            gate_up_bias=self.gate_up_bias,
            down_bias=self.down_bias,
            implementation=implementation,
        )

    def results(self, activation: str, implementation: str, path=None) -> dict[str, Tensor]:
        """The output, and the gradients of everything for a fixed gradient of it; ``path`` computes instead."""
        leaves = self._replace(**{n: t.detach().clone().requires_grad_() for n, t in self.floats().items()})
        y = (path or Problem.run)(leaves, activation, implementation)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        names, inputs = zip(*leaves.floats().items(), strict=True)
        gradients = torch.autograd.grad(y, inputs, dy, materialize_grads=True)
        return {"y": y.detach()} | dict(zip(names, gradients, strict=True))


def problem(
    tokens=13, experts=5, top_k=3, model=16, ffn=24, matrices=2, *, dtype=torch.float32, biases=False, seed=0
) -> Problem:
    """About a third of the ids are -1, expert 1 is idle, and a token may name an expert twice."""
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int, of: int = 1) -> Tensor:
        return torch.randn(*shape, generator=g) / max(of, 1) ** 0.5

    ids = torch.randint(-1, max(experts, 1), (tokens, top_k), generator=g) if experts else torch.zeros(tokens, top_k)
    ids[torch.rand(ids.shape, generator=g) < 0.2] = -1
    ids[ids == 1] = -1
    ids = ids.long() if experts else torch.full((tokens, top_k), -1)
    return Problem(
        draw(tokens, model),
        draw(experts, matrices, ffn, model, of=model),
        draw(experts, matrices, ffn) if biases else None,
        draw(experts, model, ffn, of=ffn),
        draw(experts, model) if biases else None,
        ids,
        torch.rand(ids.shape, generator=g),
    ).to(dtype)


def torch_path(p: Problem, activation: str, _: str) -> Tensor:
    """What a user writes today: a loop over the experts in the type of x, as Transformers has it."""
    y = torch.zeros_like(p.x)
    for e in range(len(p.gate_up)):
        token, choice = torch.where(p.ids == e)
        bias = None if p.gate_up_bias is None else p.gate_up_bias[e].flatten()
        h = F.linear(p.x[token], p.gate_up[e].flatten(0, 1), bias)
        if activation == "swiglu_clamped":
            gate, up = h.chunk(2, -1)
            gate, up = gate.clamp(max=7), up.clamp(-7, 7)
            h = (up + 1) * gate * torch.sigmoid(1.702 * gate)
        elif p.gate_up.shape[1] == 2:
            gate, up = h.chunk(2, -1)
            h = GATED[activation](gate) * up
        else:
            h = GATED[activation](h)
        out = F.linear(h, p.down[e], None if p.down_bias is None else p.down_bias[e])
        y = y.index_add(0, token, (out * p.weights[token, choice, None]).to(y.dtype))
    return y


def available(dtype: torch.dtype = torch.float32) -> list[str]:
    """Implementations that compute with ``dtype`` on this machine's CPU."""
    return [name for name in implementations() if obstacle(name, "cpu", dtype) is None]


def error(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of what is wanted, in float64; absolute where that is 0."""
    assert got.shape == want.shape
    want = want.double()
    return ((got.double() - want).norm() / (want.norm() or 1)).item()
