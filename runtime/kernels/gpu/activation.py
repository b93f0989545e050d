"""Activations and their derivatives, in float32: those of ``..activation``, where swiglu_clamped is explained.

Comparisons are written so that a NaN stays one.
"""

import triton
import triton.language as tl

ROOT_HALF = tl.constexpr(0.7071067811865476)
ROOT_TWO_PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _value_and_slope(gate, ACTIVATION: tl.constexpr):
    """act(gate) and its derivative; the compiler drops what is not used."""
    tl.static_assert(ACTIVATION == "silu" or ACTIVATION == "gelu" or ACTIVATION == "relu")
    if ACTIVATION == "silu":
        sigmoid = tl.sigmoid(gate)
        value = gate * sigmoid
        slope = sigmoid + value * (1 - sigmoid)
    elif ACTIVATION == "gelu":
        below = 0.5 + 0.5 * tl.erf(gate * ROOT_HALF)
        value = gate * below
        slope = below + gate * ROOT_TWO_PI * tl.exp(-0.5 * gate * gate)
    else:
        value = tl.where(gate <= 0, 0.0, gate)
        slope = tl.where(gate <= 0, 0.0, 1.0)
    return value, slope


@triton.jit
def value(gate, up, ACTIVATION: tl.constexpr, MATRICES: tl.constexpr):
    """act(gate) up, or act(gate) with MATRICES 1, where ``up`` is not looked at."""
    if ACTIVATION == "swiglu_clamped":
        gate = tl.where(gate > 7.0, 7.0, gate)
        up = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        joined = (up + 1) * gate * tl.sigmoid(1.702 * gate)
    else:
        joined, _ = _value_and_slope(gate, ACTIVATION)
        if MATRICES == 2:
            joined = joined * up
    return joined


@triton.jit
def derivatives(gate, up, ACTIVATION: tl.constexpr, MATRICES: tl.constexpr):
    """What ``value`` gives, and its derivatives in gate and in up (the last 0 with MATRICES 1)."""
    if ACTIVATION == "swiglu_clamped":
        low = tl.where(gate > 7.0, 7.0, gate)
        mid = tl.where(up > 7.0, 7.0, tl.where(up < -7.0, -7.0, up))
        sigmoid = tl.sigmoid(1.702 * low)
        by_up = low * sigmoid
        joined = (mid + 1) * by_up
        by_gate = tl.where(gate > 7.0, 0.0, (mid + 1) * (sigmoid + 1.702 * by_up * (1 - sigmoid)))
        by_up = tl.where((up > 7.0) | (up < -7.0), 0.0, by_up)
    else:
        joined, by_gate = _value_and_slope(gate, ACTIVATION)
        by_up = joined
        if MATRICES == 2:
            joined = joined * up
            by_gate = by_gate * up
    return joined, by_gate, by_up
