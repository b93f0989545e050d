// Few rows times a weight's rows: each row of the weight is read once and added, times its factor, to sums that stay in
// the cache.
#pragma once
#include "dot.h"

namespace moeplan::VARIANT {

constexpr int64_t DEEP = 4;         // rows of the weight at a time

// k rows, at most DEEP; `more`: DEEP others come after them.
template <int N>
inline void spread_block(const float factors[FEW][DEEP], const Real* w, int64_t ldw, int64_t k, int64_t n, float* c,
                         int64_t ldc, bool more) {
    for (int64_t i = 0; i < n; i += LANES) {
        vf rows[DEEP];
#pragma GCC unroll 4
        for (int64_t j = 0; j < DEEP; j++) {
            const Real* from = w + j * ldw + i;
            if (more) _mm_prefetch(from + DEEP * ldw, _MM_HINT_T0);
            rows[j] = j >= k ? zero() : n - i >= LANES ? load(from) : load(from, n - i);
        }
#pragma GCC unroll 8
        for (int r = 0; r < N; r++) {
            vf sum = load(c + r * ldc + i);
#pragma GCC unroll 4
            for (int64_t j = 0; j < DEEP; j++) sum = fma(splat(factors[r][j]), rows[j], sum);
            store(c + r * ldc + i, sum);
        }
    }
}

// c [m, n] = a [m, k] w, w's k rows `ldw` apart, n of its columns; m at most FEW, c's rows are whole vectors.
inline void spread_few(const Op* a, int64_t lda, int64_t m, const Real* w, int64_t ldw, int64_t k, int64_t n, float* c,
                       int64_t ldc) {
    for (int64_t r = 0; r < m; r++) clear(c + r * ldc, sizeof(float) * round_up(n, LANES));
    for (int64_t k0 = 0; k0 < k; k0 += DEEP) {
        int64_t depth = least(DEEP, k - k0);
        float factors[FEW][DEEP] = {};
        for (int64_t r = 0; r < m; r++) {
            for (int64_t j = 0; j < depth; j++) factors[r][j] = scalar(a[r * lda + k0 + j]);
        }
        const Real* rows = w + k0 * ldw;
        bool more = k0 + 2 * DEEP <= k;
        switch (m) {
            case 1: spread_block<1>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 2: spread_block<2>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 3: spread_block<3>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 4: spread_block<4>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 5: spread_block<5>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 6: spread_block<6>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 7: spread_block<7>(factors, rows, ldw, depth, n, c, ldc, more); break;
            case 8: spread_block<8>(factors, rows, ldw, depth, n, c, ldc, more); break;
        }
    }
}

}  // namespace moeplan::VARIANT
