"""What the operators ask of their arguments; errors are one line that names argument, expected and got.

Letters as in ``interface``. Shapes, types, devices and layouts only, so that fake tensors pass through here too, and
one value where it costs no wait for a device: a gate weight that is NaN. ``ids`` is looked at by the implementations,
which read it anyway. Weights lie in one of the layouts of ``stored``: a copy of a layer's experts at every call would
go unseen.
"""

import torch
from torch import Tensor

from ...spec import MoeplanError
from .activation import check_activation
from .stored import layout_of

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_expert_ffn(
    x: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    ids: Tensor,
    weights: Tensor,
    activation: str,
) -> None:
    """The arguments of ``expert_ffn``; raises MoeplanError."""
    function = "expert_ffn"
    if x.ndim != 2 or x.dtype not in TYPES:
        raise _wrong(function, "x", "floating [tokens, model]", x)
    model = x.shape[1]
    if gate_up.ndim != 4 or gate_up.shape[1] not in (1, 2) or gate_up.shape[3] != model or gate_up.dtype != x.dtype:
        raise _wrong(function, "gate_up", f"{x.dtype} [experts, 1 or 2, ffn, {model}]", gate_up)
    experts, matrices, ffn, _ = gate_up.shape
    _like(function, "down", down, x, (experts, model, ffn))
    if gate_up_bias is not None:
        _like(function, "gate_up_bias", gate_up_bias, x, (experts, matrices, ffn))
    if down_bias is not None:
        _like(function, "down_bias", down_bias, x, (experts, model))
    _lies(gate_up, down, x)
    _ids(function, ids, x)
    _like(function, "weights", weights, x, tuple(ids.shape), weights_type(x.dtype, weights.dtype))
    check_activation(activation, matrices)


def check_backward(dy: Tensor, x: Tensor, gate_up: Tensor, ids: Tensor, saved: Tensor) -> None:
    """What ``expert_ffn_backward`` takes beyond the arguments of ``expert_ffn``; raises MoeplanError."""
    _like("expert_ffn_backward", "dy", dy, x, tuple(x.shape))
    _like("expert_ffn_backward", "saved", saved, x, (ids.numel(), gate_up.shape[1] * gate_up.shape[2]))


def check_finite(weights: Tensor) -> None:
    """Raises MoeplanError where a gate weight [T, K] is NaN; not looked at on a GPU, which would have to be waited for.

    NaN compares false: the least of some numbers is NaN if any is.
    """
    if weights.device.type == "cpu" and weights.numel() and (least := weights.min().item()) != least:
        raise MoeplanError("expert_ffn: weights: expected numbers, got NaN")


def weights_type(dtype: torch.dtype, got: torch.dtype) -> torch.dtype:
    """Type of gate weights beside x of ``dtype``: float32, or float64 too beside float64."""
    return got if dtype == got == torch.float64 else torch.float32


def check_projection(
    function: str, x: Tensor, weight: Tensor, ids: Tensor, dy: Tensor | None = None, bias: Tensor | None = None
) -> None:
    """The arguments of ``esmm`` and, with dy, of ``esfk``; raises MoeplanError."""
    _rows(function, "x", x, ids)
    if weight.ndim != 3 or weight.shape[2] != x.shape[-1] or weight.dtype != x.dtype:
        raise _wrong(function, "weight", f"{x.dtype} [experts, outputs, {x.shape[-1]}]", weight)
    _weight(function, "weight", weight, x)
    if bias is not None:
        _like(function, "bias", bias, x, tuple(weight.shape[:2]))
    if dy is not None:
        _like(function, "dy", dy, x, (*ids.shape, weight.shape[1]))
    _ids(function, ids, x)


def check_reduction(function: str, x: Tensor | None, dy: Tensor, ids: Tensor, experts: int) -> None:
    """The arguments of ``ess`` and, with x, of ``estmm``; raises MoeplanError."""
    if x is not None:
        _rows(function, "x", x, ids)
    if dy.ndim != 3 or dy.shape[:2] != ids.shape or dy.dtype not in TYPES or (x is not None and dy.dtype != x.dtype):
        kind = "floating" if x is None else x.dtype
        raise _wrong(function, "dy", f"{kind} [tokens, top_k, outputs] for ids {list(ids.shape)}", dy)
    if x is not None and dy.device != x.device:
        raise _elsewhere(function, "dy", dy, x)
    if experts < 0:
        raise MoeplanError(f"{function}: experts: expected 0 or more, got {experts}")
    _ids(function, ids, dy)


def _rows(function: str, name: str, x: Tensor, ids: Tensor) -> None:
    fits = x.ndim == 2 or (x.ndim == 3 and x.shape[:2] == ids.shape)
    if not fits or x.dtype not in TYPES:
        raise _wrong(function, name, f"floating [tokens, inputs] or {[*ids.shape, 'inputs']}".replace("'", ""), x)


def _ids(function: str, ids: Tensor, x: Tensor) -> None:
    """``x`` gives the tokens and the device."""
    if ids.ndim != 2 or ids.shape[0] != x.shape[0] or ids.dtype not in (torch.int32, torch.int64):
        raise _wrong(function, "ids", f"int32 or int64 [{x.shape[0]}, top_k]", ids)
    if ids.device != x.device:
        raise _elsewhere(function, "ids", ids, x)


def _lies(gate_up: Tensor, down: Tensor, x: Tensor) -> None:
    """The layouts of ``stored``, which the kernels read in place."""
    if layout_of(gate_up, down) is None:
        name, weight = (
            ("gate_up", gate_up) if layout_of(gate_up, down.new_empty(down.shape)) is None else ("down", down)
        )
        raise MoeplanError(
            f"expert_ffn: {name}: expected contiguous {list(weight.shape)}, or a view that weights_of gives, got "
            f"strides {list(weight.stride())}: lay it out once, when it is loaded"
        )
    for name, weight in (("gate_up", gate_up), ("down", down)):
        if weight.device != x.device:
            raise _elsewhere("expert_ffn", name, weight, x)


def _weight(function: str, name: str, weight: Tensor, x: Tensor) -> None:
    if not weight.is_contiguous():
        raise MoeplanError(
            f"{function}: {name}: expected contiguous {list(weight.shape)}, got strides {list(weight.stride())}: "
            "lay it out once, when it is loaded"
        )
    if weight.device != x.device:
        raise _elsewhere(function, name, weight, x)


def _like(
    function: str, name: str, got: Tensor, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None
) -> None:
    """Of this shape, of x's type unless another is named, on x's device."""
    if got.shape != shape or got.dtype != (dtype or x.dtype):
        raise _wrong(function, name, f"{dtype or x.dtype} {list(shape)}", got)
    if got.device != x.device:
        raise _elsewhere(function, name, got, x)


def _wrong(function: str, name: str, expected: str, got: Tensor) -> MoeplanError:
    return MoeplanError(f"{function}: {name}: expected {expected}, got {got.dtype} {list(got.shape)}")


def _elsewhere(function: str, name: str, got: Tensor, x: Tensor) -> MoeplanError:
    return MoeplanError(f"{function}: {name}: expected on {x.device}, got on {got.device}")
