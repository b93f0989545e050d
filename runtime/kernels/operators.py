"""The kernels as operators of torch, ``moeplan::…``: what a traced or compiled graph holds.

Letters as in ``interface``. ``implementation`` is an argument, so that a graph is fixed to one. A bias's gradient that
is not there is an empty tensor [0], as an operator cannot return None. Activations and gradients may be strided; they
are small, and made contiguous.

They are defined on a ``torch.library.Library``: a call costs 8 microseconds in ``inference_mode``, 21 without; the
``custom_op`` decorator takes 36.
"""

import torch
from torch import Tensor

from .registry import load
from .validation import check_backward, check_expert_ffn, check_finite, check_projection, check_reduction

LIBRARY = torch.library.Library("moeplan", "FRAGMENT")

_FFN = "Tensor x, Tensor gate_up, Tensor? gate_up_bias, Tensor down, Tensor? down_bias, Tensor ids, Tensor weights"
_TAGS = (torch.Tag.pt2_compliant_tag,)

LIBRARY.define(f"expert_ffn({_FFN}, str activation, str implementation, bool save) -> (Tensor, Tensor)", tags=_TAGS)
LIBRARY.define(
    f"expert_ffn_backward(Tensor dy, {_FFN}, Tensor saved, str activation, str implementation) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=_TAGS,
)
LIBRARY.define("esmm(Tensor x, Tensor weight, Tensor? bias, Tensor ids, str implementation) -> Tensor", tags=_TAGS)
LIBRARY.define("ess(Tensor dy, Tensor ids, SymInt experts, str implementation) -> Tensor", tags=_TAGS)
LIBRARY.define("estmm(Tensor x, Tensor dy, Tensor ids, SymInt experts, str implementation) -> Tensor", tags=_TAGS)
LIBRARY.define(
    "esfk(Tensor x, Tensor weight, Tensor dy, Tensor ids, bool with_bias, str implementation) -> "
    "(Tensor, Tensor, Tensor)",
    tags=_TAGS,
)


@torch.library.impl(LIBRARY, "expert_ffn", "CompositeExplicitAutograd")
def _expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    implementation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_expert_ffn(x, gate_up, gate_up_bias, down, down_bias, ids, weights, activation)
    check_finite(weights)
    return load(implementation).forward(
        x.contiguous(),
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        ids.contiguous(),
        weights.contiguous(),
        activation,
        save,
    )


@torch.library.register_fake("moeplan::expert_ffn", lib=LIBRARY)
def _fake_expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
    implementation: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    check_expert_ffn(x, gate_up, gate_up_bias, down, down_bias, ids, weights, activation)
    _, matrices, ffn, _ = gate_up.shape
    return x.new_empty(x.shape), x.new_empty(ids.numel() if save else 0, matrices * ffn)


@torch.library.impl(LIBRARY, "expert_ffn_backward", "CompositeExplicitAutograd")
def _expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    saved: Tensor,
    activation: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    check_expert_ffn(x, gate_up, gate_up_bias, down, down_bias, ids, weights, activation)
    check_backward(dy, x, gate_up, ids, saved)
    found = load(implementation).backward(
        dy.contiguous(),
        x.contiguous(),
        gate_up,
        gate_up_bias,
        down,
        down_bias,
        ids.contiguous(),
        weights.contiguous(),
        saved.contiguous(),
        activation,
    )
    given = x, gate_up, gate_up_bias, down, down_bias, weights
    return tuple(
        x.new_empty(0) if gradient is None or like is None else _lying_as(like, gradient)
        for like, gradient in zip(given, found, strict=True)
    )


def _lying_as(like: Tensor, gradient: Tensor) -> Tensor:
    """The gradient with the strides of what it belongs to, which a compiled graph counts on; of weights they are."""
    strides = torch.empty_like(like, device="meta").stride()
    lies = all(n < 2 or a == b for n, a, b in zip(like.shape, strides, gradient.stride(), strict=True))
    return gradient if lies or not gradient.numel() else torch.empty_like(like).copy_(gradient)


@torch.library.register_fake("moeplan::expert_ffn_backward", lib=LIBRARY)
def _fake_expert_ffn_backward(
    dy: Tensor,
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    saved: Tensor,
    activation: str,
    implementation: str,
) -> tuple[Tensor, ...]:
    check_expert_ffn(x, gate_up, gate_up_bias, down, down_bias, ids, weights, activation)
    check_backward(dy, x, gate_up, ids, saved)
    given = x, gate_up, gate_up_bias, down, down_bias, weights
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in given)


@torch.library.impl(LIBRARY, "esmm", "CompositeExplicitAutograd")
def _esmm(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, implementation: str) -> Tensor:
    check_projection("esmm", x, weight, ids, bias=bias)
    return load(implementation).esmm(x.contiguous(), weight, bias, ids.contiguous())


@torch.library.register_fake("moeplan::esmm", lib=LIBRARY)
def _fake_esmm(x: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, implementation: str) -> Tensor:
    check_projection("esmm", x, weight, ids, bias=bias)
    return x.new_empty(*ids.shape, weight.shape[1])


@torch.library.impl(LIBRARY, "ess", "CompositeExplicitAutograd")
def _ess(dy: Tensor, ids: Tensor, experts: int, implementation: str) -> Tensor:
    check_reduction("ess", None, dy, ids, experts)
    return load(implementation).ess(dy.contiguous(), ids.contiguous(), experts)


@torch.library.register_fake("moeplan::ess", lib=LIBRARY)
def _fake_ess(dy: Tensor, ids: Tensor, experts: int, implementation: str) -> Tensor:
    check_reduction("ess", None, dy, ids, experts)
    return dy.new_empty(experts, dy.shape[2])


@torch.library.impl(LIBRARY, "estmm", "CompositeExplicitAutograd")
def _estmm(x: Tensor, dy: Tensor, ids: Tensor, experts: int, implementation: str) -> Tensor:
    check_reduction("estmm", x, dy, ids, experts)
    return load(implementation).estmm(x.contiguous(), dy.contiguous(), ids.contiguous(), experts)


@torch.library.register_fake("moeplan::estmm", lib=LIBRARY)
def _fake_estmm(x: Tensor, dy: Tensor, ids: Tensor, experts: int, implementation: str) -> Tensor:
    check_reduction("estmm", x, dy, ids, experts)
    return x.new_empty(experts, dy.shape[2], x.shape[-1])


@torch.library.impl(LIBRARY, "esfk", "CompositeExplicitAutograd")
def _esfk(
    x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_projection("esfk", x, weight, ids, dy)
    kernels = load(implementation)
    dx, dweight, dbias = kernels.esfk(x.contiguous(), weight, dy.contiguous(), ids.contiguous(), with_bias)
    return dx, dweight, x.new_empty(0) if dbias is None else dbias


@torch.library.register_fake("moeplan::esfk", lib=LIBRARY)
def _fake_esfk(
    x: Tensor, weight: Tensor, dy: Tensor, ids: Tensor, with_bias: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    check_projection("esfk", x, weight, ids, dy)
    dbias = x.new_empty(weight.shape[:2] if with_bias else 0)
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias
