// c [m, n] (+)= a [m, k] b [k, n], float32 sums: a's rows broadcast against vectors of b's panels.
#pragma once
#include "pack.h"

namespace moeplan::VARIANT {

// Rows at once beside this many panels: sums and operands fill the registers, of which there are 32 or 16.
constexpr int rows_beside(int panels) { return LANES == 8 ? 6 : panels == 3 ? 8 : 12; }

// M rows times N panels.
template <int M, int N, class Next>
inline void micro(const Op* a, int64_t lda, Next next, const float* b, int64_t panel_stride, int64_t units,
                  float* c, int64_t ldc, bool add) {
    constexpr int V = N * PANEL_VECTORS;
    vf sums[M][V];
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) sums[r][v] = add ? load(c + r * ldc + v * LANES) : zero();
    }
    // A pointer for every three rows: with one for each the integer registers run out.
    const Op* group[(M + 2) / 3];
    for (int g = 0; g < (M + 2) / 3; g++) group[g] = a + 3 * g * lda;
    for (int64_t u = 0; u < units; u++) {
        if (u % PANEL == 0) next.template fetch<M>();
        vf columns[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) {
            columns[v] = load(b + (v / PANEL_VECTORS) * panel_stride + u * PANEL + (v % PANEL_VECTORS) * LANES);
        }
#pragma GCC unroll 16
        for (int r = 0; r < M; r++) {
            vf x = broadcast(group[r / 3] + (r % 3) * lda + u * PAIR);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) sums[r][v] = step(sums[r][v], x, columns[v]);
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < M; r++) {
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sums[r][v]);
    }
}

template <int N, class Next>
inline void multiply_rows(const Op* a, int64_t lda, int64_t m, Next next, const float* b, int64_t panel_stride,
                          int64_t units, float* c, int64_t ldc, bool add) {
    int64_t r = 0;
    const auto take_rows = [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        for (; r + M <= m; r += M) {
            micro<M, N>(a + r * lda, lda, next, b, panel_stride, units, c + r * ldc, ldc, add);
        }
    };
    take_rows(Count<rows_beside(N)>());
    if constexpr (rows_beside(N) > 8) take_rows(Count<8>());
    take_rows(Count<4>());
    take_rows(Count<2>());
    take_rows(Count<1>());
}

// n is a multiple of 16; c is written 16 columns at a time.
template <class Next>
inline void multiply(const Op* a, int64_t lda, int64_t m, Next next, const float* b, int64_t panel_stride, int64_t n,
                     int64_t units, float* c, int64_t ldc, bool add) {
    for (int64_t p = 0, left = n / PANEL; left > 0;) {
        const float* from = b + p * panel_stride;
        float* to = c + p * PANEL;
        // Four panels go as two and two: a single one leaves little to do for each value of a.
        int64_t taken = LANES == 8 ? 1 : left == 4 ? 2 : least(left, 3);
        const auto go = [&](auto panels) {
            constexpr int N = decltype(panels)::value;
            if (p == 0 || Next::EVERY) {
                multiply_rows<N>(a, lda, m, next, from, panel_stride, units, to, ldc, add);
            } else {
                multiply_rows<N>(a, lda, m, NothingNext{}, from, panel_stride, units, to, ldc, add);
            }
        };
        if (taken == 1) go(Count<1>());
        if constexpr (LANES == 16) {
            if (taken == 2) go(Count<2>());
            if (taken == 3) go(Count<3>());
        }
        p += taken;
        left -= taken;
    }
}

// These instructions have no state to set up.
struct Tiles {
    Tiles() {}
};

}  // namespace moeplan::VARIANT
