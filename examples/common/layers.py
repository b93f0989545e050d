"""Parts of a transformer with experts, in plain PyTorch: initial values, rotary attention, gated FFNs, top-k routing.

Shapes: T tokens, D hidden size, E experts, K top-k, H FFN columns; no biases. Nothing of moeplan's runtime is used.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

INITIAL_STD = 0.06
Rope = tuple[Tensor, Tensor]  # cos and sin: [length, head_dim]


def matrix(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape) * INITIAL_STD)


def rope_tables(length: int, head_dim: int, theta: float) -> Rope:
    frequency = theta ** (-torch.arange(0, head_dim, 2) / head_dim)
    angle = torch.outer(torch.arange(length), frequency).repeat(1, 2)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, rope: Rope) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rope[0] + torch.cat((-second, first), -1) * rope[1]


def attend(x: Tensor, projections: tuple[Tensor, Tensor, Tensor, Tensor], head_dim: int, rope: Rope) -> Tensor:
    """Causal grouped-query attention. x [sequences, length, D]; projections: q, k, v, o -> [sequences, length, D]."""
    *into, o = projections
    q, k, v = ((x @ projection.T).unflatten(-1, (-1, head_dim)).transpose(1, 2) for projection in into)
    out = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2).flatten(2) @ o.T


def gated_ffn(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x [..., D]; gate_up [2H, D]: H rows of gate, H of up; down [D, H]."""
    gate, up = (x @ gate_up.T).chunk(2, -1)
    return (F.silu(gate) * up) @ down.T


def choose(x: Tensor, router: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], router [E, D] -> expert ids [T, K], gate weights [T, K], load-balancing loss (scalar)."""
    experts = len(router)
    probabilities = (x @ router.T).softmax(-1)
    weights, ids = probabilities.topk(top_k)
    weights = weights / weights.sum(-1, keepdim=True)
    # Switch Transformer, equation 4: E * sum_e (share of the choices) * (mean probability); 1 when even.
    load = torch.bincount(ids.flatten(), minlength=experts) / ids.numel()
    return ids, weights, experts * (load * probabilities.mean(0)).sum()


def experts(x: Tensor, ids: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Dropless: (token, choice) pairs sorted by expert, one dense FFN per contiguous segment.

    x [T, D]; ids, weights [T, K]; gate_up [E, 2H, D]; down [E, D, H] -> [T, D].
    """
    order = ids.flatten().argsort(stable=True)
    token = order // ids.shape[1]
    counts = torch.bincount(ids.flatten(), minlength=len(gate_up)).tolist()
    segments = zip(x.index_select(0, token).split(counts), gate_up.unbind(), down.unbind(), strict=True)
    outputs = [gated_ffn(*segment) for segment in segments]
    return torch.zeros_like(x).index_add(0, token, torch.cat(outputs) * weights.flatten()[order, None])
