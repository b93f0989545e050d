"""One entry for the expert FFN, and the one place where implementations plug in.

Letters: T tokens, D model, E experts held here, K top-k, H ffn columns held here, M 2 for a gated FFN or 1.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from ...spec import MoeplanError
from .grouped import grouped_expert_ffn
from .reference import reference_expert_ffn

ENVIRONMENT = "MOEPLAN_KERNEL"

# (x, gate_up, down, ids, weights, activation) -> y
Implementation = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str], Tensor]

_IMPLEMENTATIONS: dict[str, Implementation] = {"reference": reference_expert_ffn, "grouped": grouped_expert_ffn}


def register(name: str, implementation: Implementation) -> None:
    """Add an implementation under a name; it may replace one."""
    _IMPLEMENTATIONS[name] = implementation


def implementations() -> tuple[str, ...]:
    return tuple(_IMPLEMENTATIONS)


def choose(name: str | None) -> Implementation:
    """The implementation of this name, else the one that MOEPLAN_KERNEL names, else the grouped one."""
    name = name or os.environ.get(ENVIRONMENT) or "grouped"
    try:
        return _IMPLEMENTATIONS[name]
    except KeyError:
        known = ", ".join(sorted(_IMPLEMENTATIONS))
        raise MoeplanError(f"expert_ffn: implementation: expected one of {known}, got {name!r}") from None


def expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    ids: Tensor,
    weights: Tensor,
    *,
    activation: str,
    implementation: str | None = None,
) -> Tensor:
    """Gate-weighted sum of the chosen experts' FFNs: y[t] = sum over k of weights[t, k] * FFN_{ids[t, k]}(x[t]).

    x: [T, D]; gate_up: [E, M, H, D]; down: [E, D, H]; ids: [T, K] int32 or int64, local expert numbers, -1 for an
    expert that is not here; weights: [T, K] float32 -> [T, D] in x.dtype, accumulated in float32 (float64 stays).
    Dropless: every id counts. Raises MoeplanError naming the argument, what was expected and what came.
    """
    _validate(x, gate_up, down, ids, weights)
    return choose(implementation)(x, gate_up, down, ids, weights, activation)


def _validate(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> None:
    """Shapes and types only: implementations that read the values of ids check them."""
    if x.ndim != 2:
        raise _wrong("x", "[tokens, model]", x)
    tokens, model = x.shape
    if gate_up.ndim != 4 or gate_up.shape[1] not in (1, 2) or gate_up.shape[3] != model or gate_up.dtype != x.dtype:
        raise _wrong("gate_up", f"{x.dtype} [experts, 1 or 2, ffn, {model}]", gate_up)
    experts, _, ffn, _ = gate_up.shape
    if down.shape != (experts, model, ffn) or down.dtype != x.dtype:
        raise _wrong("down", f"{x.dtype} [{experts}, {model}, {ffn}]", down)
    if ids.ndim != 2 or ids.shape[0] != tokens or ids.dtype not in (torch.int32, torch.int64):
        raise _wrong("ids", f"int32 or int64 [{tokens}, top_k]", ids)
    if weights.shape != ids.shape or weights.dtype not in (torch.float32, torch.float64):
        raise _wrong("weights", f"float32 {list(ids.shape)}", weights)


def _wrong(name: str, expected: str, got: Tensor) -> MoeplanError:
    return MoeplanError(f"expert_ffn: {name}: expected {expected}, got {got.dtype} {list(got.shape)}")
