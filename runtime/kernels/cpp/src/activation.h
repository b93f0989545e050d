// Activations between the two products, and their derivatives, on vectors of float32. NaN stays NaN.
#pragma once
#include "simd.h"

namespace moeplan::VARIANT {

// Within 2 units in the last place from -87 to 88; beyond, the value at the end.
inline vf exp(vf x) {
    x = upper(splat(88.0f), lower(splat(-87.0f), x));
    vf n = round(x * splat(1.44269504088896341f));
    vf r = fma(n, splat(-0.693359375f), x);
    r = fma(n, splat(2.12194440e-4f), r);
    vf p = splat(1.9875691500e-4f);
    p = fma(p, r, splat(1.3981999507e-3f));
    p = fma(p, r, splat(8.3334519073e-3f));
    p = fma(p, r, splat(4.1665795894e-2f));
    p = fma(p, r, splat(1.6666665459e-1f));
    p = fma(p, r, splat(5.0000001201e-1f));
    p = fma(p, r * r, r + splat(1.0f));
    return scale(p, n);
}

inline vf sigmoid(vf x) { return splat(1.0f) / (splat(1.0f) + exp(zero() - x)); }

// The share of a normal distribution below x, within 1e-7, and `bell` = exp(-x^2 / 2).
inline vf normal_below(vf x, vf& bell) {
    // erf by Abramowitz and Stegun 7.1.26.
    vf size = magnitude(x) * splat(0.70710678118654752f);
    bell = exp(zero() - size * size);
    vf t = splat(1.0f) / fma(splat(0.3275911f), size, splat(1.0f));
    vf p = splat(1.061405429f);
    p = fma(p, t, splat(-1.453152027f));
    p = fma(p, t, splat(1.421413741f));
    p = fma(p, t, splat(-0.284496736f));
    p = fma(p, t, splat(0.254829592f));
    vf erf = splat(1.0f) - p * t * bell;
    return splat(0.5f) + splat(0.5f) * copy_sign(erf, x);
}

// The same by its approximation: the sigmoid of 2 sqrt(2 / pi) (x + 0.044715 x^3), and the derivative of what it is of.
inline vf normal_below_tanh(vf x, vf& inner_slope) {
    const vf one = splat(1.0f), twice = splat(1.5957691216057308f), cube = splat(0.044715f);
    x = upper(splat(30.0f), lower(splat(-30.0f), x));  // beyond, nothing changes any more
    vf square = x * x;
    inner_slope = twice * fma(splat(3.0f) * cube, square, one);
    return sigmoid(twice * x * fma(cube, square, one));
}

// act(g) u, or act(g) where the FFN is not gated.
inline vf activate(const Activation& act, bool gated, vf g, vf u) {
    vf extra, a;
    switch (act.kind) {
        case SILU: a = g * sigmoid(g); break;
        case GELU: a = g * normal_below(g, extra); break;
        case GELU_TANH: a = g * normal_below_tanh(g, extra); break;
        case RELU: a = lower(zero(), g); break;
        case RELU2: a = lower(zero(), g); a = a * a; break;
        default:
            g = upper(splat(act.limit), g);
            u = upper(splat(act.limit), lower(splat(-act.limit), u));
            return (u + splat(act.shift)) * g * sigmoid(splat(act.slope) * g);
    }
    return gated ? a * u : a;
}

// With d the gradient of the result: the result, and gradients of g and u.
inline void activate_backward(const Activation& act, bool gated, vf g, vf u, vf d, vf& result, vf& dg, vf& du) {
    const vf one = splat(1.0f);
    vf a, slope, s, extra;
    switch (act.kind) {
        case SILU:
            s = sigmoid(g);
            a = g * s;
            slope = s * (one + g * (one - s));
            break;
        case GELU:
            s = normal_below(g, extra);
            a = g * s;
            slope = fma(g * splat(0.39894228040143268f), extra, s);
            break;
        case GELU_TANH:
            s = normal_below_tanh(g, extra);
            a = g * s;
            slope = s + a * (one - s) * extra;
            break;
        case RELU:
            a = lower(zero(), g);
            slope = if_less(zero(), g, one);
            break;
        case RELU2:
            a = lower(zero(), g);
            slope = a + a;
            a = a * a;
            break;
        default: {
            vf h = upper(splat(act.limit), g), v = upper(splat(act.limit), lower(splat(-act.limit), u)) + splat(act.shift);
            s = sigmoid(splat(act.slope) * h);
            a = h * s;
            result = v * a;
            dg = if_not_above(g, splat(act.limit), d * v * s * (one + splat(act.slope) * h * (one - s)));
            du = if_not_above(magnitude(u), splat(act.limit), d * a);
            return;
        }
    }
    result = gated ? a * u : a;
    dg = (gated ? d * u : d) * slope;
    du = d * a;
}

}  // namespace moeplan::VARIANT
