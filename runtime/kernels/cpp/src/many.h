// Many rows of an expert, by the vendor's product where it is the faster one: float32, wide matrices. It has larger
// blocks than ours, and packs both operands at every call, so the blocks that it is given are large too.
#pragma once
#include "products.h"
#include "vendor.h"

namespace moeplan::VARIANT {

// Rows of an expert from which on it pays: where the weight's rows are multiplied, and where its columns are.
constexpr int64_t MANY = 128, MANY_BACKWARD = 256;
constexpr int64_t MANY_ROWS = 512, MANY_COLUMNS = 512;  // of a block of sums

// A row-major matrix; `turned`: what lies there is the transpose.
template <class X>
struct Matrix {
    const X* base;
    int64_t stride;
    bool turned = false;
};

// Of other types no expert counts as having many rows.
constexpr bool vendor_multiplies = __is_same(Real, float);

// c [m, n] = a [m, k] b [k, n].
template <class A, class B, class C>
inline void multiply_many(const Matrix<A>& a, const Matrix<B>& b, int64_t m, int64_t n, int64_t k, Scratch& scratch,
                          C* c, int64_t ldc) {
    if constexpr (__is_same(B, float) && __is_same(C, float) && __is_same(A, float)) {
        scratch.multiply_adds += m * n * k;
        vendor_product(a.base, a.stride, a.turned, b.base, b.stride, b.turned, m, n, k, c, ldc);
    }
}

// Columns of a result in a task: as many as a block has, fewer where threads would go without, a quarter at least.
inline int64_t many_columns(int64_t width, int64_t threads) {
    int64_t each = round_up(ceil_div(width, 2 * threads), PANEL);
    return most(MANY_COLUMNS / 4, least(MANY_COLUMNS, each));
}

// to [n] += from [n].
inline void add_row(const float* from, int64_t n, float* to) {
    for (int64_t c = 0; c < n; c += LANES) store(to + c, load(to + c, n - c) + load(from + c, n - c), n - c);
}

}  // namespace moeplan::VARIANT
