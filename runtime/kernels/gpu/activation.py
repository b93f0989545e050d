"""Activations and their derivatives, in float32: those of ``..activation``, where swiglu_clamped is explained, whose
numbers are SLOPE, LIMIT and SHIFT.

Comparisons are written so that a NaN stays one.
"""

from typing import Any

import triton
import triton.language as tl

from ..activation import parse_activation

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI = tl.constexpr(0.3989422804014327)
TWICE_ROOT = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
CUBE = tl.constexpr(0.044715)


def constants(activation: str) -> dict[str, Any]:
    """What a kernel with an activation is specialised for."""
    kind, slope, limit, shift = parse_activation(activation)
    return {"ACTIVATION": kind, "SLOPE": slope, "LIMIT": limit, "SHIFT": shift}


@triton.jit
def _value_and_slope(gate, ACTIVATION: tl.constexpr):
    """act(gate) and its derivative; the compiler drops what is not used."""
    tl.static_assert(
        ACTIVATION == "silu"
        or ACTIVATION == "gelu"
        or ACTIVATION == "gelu_tanh"
        or ACTIVATION == "relu"
        or ACTIVATION == "relu2"
    )
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(gate * ROOT_HALF)
        value = gate * below
        slope = below + gate * ROOT_TWO_PI * tl.exp(-0.5 * gate * gate)
    elif ACTIVATION == "gelu_tanh":
        # Beyond, nothing changes any more.
        near = tl.where(gate > 30.0, 30.0, tl.where(gate < -30.0, -30.0, gate))
        square = near * near
        below = tl.sigmoid(near * TWICE_ROOT * (1 + square * CUBE))
        value = gate * below
        slope = below + value * (1 - below) * TWICE_ROOT * (1 + square * CUBE * 3)
    elif ACTIVATION == "relu2":
        value = tl.where(gate <= 0, 0.0, gate)
        slope = 2 * value
        value = value * value
    else:
        value = tl.where(gate <= 0, 0.0, gate)
        slope = tl.where(gate <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def value(
    gate, up, ACTIVATION: tl.constexpr, MATRICES: tl.constexpr,
    SLOPE: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """act(gate) up, or act(gate) with MATRICES 1, where ``up`` is not looked at."""
    if ACTIVATION == "swiglu_clamped":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        joined = (up + SHIFT) * gate * tl.sigmoid(SLOPE * gate)
    else:
        joined, _ = _value_and_slope(gate, ACTIVATION)
        if MATRICES == 2:
            joined = joined * up
    return joined


@triton.jit
def derivatives(
    gate, up, ACTIVATION: tl.constexpr, MATRICES: tl.constexpr,
    SLOPE: tl.constexpr, LIMIT: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    """What ``value`` gives, and its derivatives in gate and in up (the last 0 with MATRICES 1)."""
    if ACTIVATION == "swiglu_clamped":
        low = tl.where(gate > LIMIT, LIMIT, gate)
        mid = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        sigmoid = tl.sigmoid(SLOPE * low)
        by_up = low * sigmoid
        joined = (mid + SHIFT) * by_up
        by_gate = tl.where(gate > LIMIT, 0.0, (mid + SHIFT) * (sigmoid + SLOPE * by_up * (1 - sigmoid)))
        by_up = tl.where((up > LIMIT) | (up < -LIMIT), 0.0, by_up)
    else:
        joined, by_gate = _value_and_slope(gate, ACTIVATION)
        by_up = joined
        if MATRICES == 2:
            joined = joined * up
            by_gate = by_gate * up
    return joined, by_gate, by_up
