// Rows times a weight's rows, straight from where those lie: a few of them at a time wait in the registers, and every
// row of the sums takes its part. Nothing is packed, and long stretches of the weight are read, which come faster than
// short ones; the sums stay in the second-level cache.
#pragma once
#include "dot.h"

namespace moeplan::VARIANT {

constexpr int DEEP_UNITS = LANES == 16 ? 8 : 4;  // units of k at a time
constexpr int WIDE = 2;                          // vectors of columns at a time
constexpr int64_t DEEP = DEEP_UNITS * PAIR;      // rows of the weight at a time
constexpr int64_t SPREAD_SUMS = 16384;           // of all rows, that stay in the cache meanwhile

// V vectors of columns, the last of `last` values, of DEEP rows of the weight, or of the k that are left. c [m, V LANES]
// is set, or added to. `next`: the rows of the weight after these, or null.
template <int V>
inline void spread_strip(const Op* a, int64_t lda, int64_t m, const Real* w, int64_t ldw, int64_t k, int64_t last,
                         const Real* next, float* c, int64_t ldc, bool add) {
    vf weight[DEEP_UNITS][V];
#pragma GCC unroll 8
    for (int u = 0; u < DEEP_UNITS; u++) {
        int64_t j = u * PAIR;
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            int64_t count = v + 1 < V ? LANES : last;
            const Real* from = w + j * ldw + v * LANES;
            weight[u][v] = j < k ? load_across(from, j + 1 < k ? from + ldw : nullptr, count) : zero();
        }
    }
    if (next) {
        for (int64_t j = 0; j < DEEP; j++) {
            for (int64_t i = 0; i < V * LANES; i += LINE_VALUES) _mm_prefetch(next + j * ldw + i, _MM_HINT_T1);
        }
    }
    for (int64_t r = 0; r < m; r++) {
        vf sums[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[v] = add ? load(c + r * ldc + v * LANES) : zero();
#pragma GCC unroll 8
        for (int u = 0; u < DEEP_UNITS; u++) {
            vf x = broadcast(a + r * lda + u * PAIR);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[v] = step(sums[v], x, weight[u][v]);
        }
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sums[v]);
    }
}

// c [m, n] = a [m, k] w, w's k rows `ldw` apart, n of its columns. Rows of a are padded with zeros (row_length), rows
// of c are whole vectors.
inline void spread(const Op* a, int64_t lda, int64_t m, const Real* w, int64_t ldw, int64_t k, int64_t n, float* c,
                   int64_t ldc) {
    int64_t width = most(1, SPREAD_SUMS / most(m, 1) / (WIDE * LANES)) * WIDE * LANES;
    for (int64_t first = 0; first < n; first += width) {
        int64_t end = least(n, first + width), k0 = 0;
        do {
            int64_t i = first;
            const auto strip = [&](auto vectors) __attribute__((always_inline)) {
                constexpr int V = decltype(vectors)::value;
                const Real* from = w + k0 * ldw + i;
                const Real* next = k0 + 2 * DEEP <= k ? from + DEEP * ldw : nullptr;
                spread_strip<V>(a + k0, lda, m, from, ldw, k - k0, least(LANES, end - i - (V - 1) * LANES), next, c + i,
                                ldc, k0 > 0);
                i += V * LANES;
            };
            while (i + WIDE * LANES <= end) strip(Count<WIDE>());
            while (i < end) strip(Count<1>());
            k0 += DEEP;
        } while (k0 < k);
    }
}

}  // namespace moeplan::VARIANT
