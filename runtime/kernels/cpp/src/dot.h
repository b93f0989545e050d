// Few columns: rows of a weight, read once from where they lie, times a handful of rows that stay in the cache.
#pragma once
#if MOEPLAN_AMX
#include "multiply_amx.h"
#else
#include "multiply.h"
#endif

namespace moeplan::VARIANT {

// More rows than this run faster as a packed product: on tiles 16 take no longer than 3.
constexpr int64_t FEW = MOEPLAN_AMX ? 2 : LANES == 8 ? 12 : 8;
constexpr int64_t AHEAD = 1024 / sizeof(Real);  // values of a row that are asked for before they are read
// Rows of x at a time. More of them come from the second-level cache again for every few rows of the weight, which where
// registers are few is slower than to take them in parts.
constexpr int column_parts(int n) { return LANES == 8 ? (n + 4) / 5 : 1; }
// Rows of the weight at a time: sums and operands fit the registers.
constexpr int weight_rows(int n) {
    int fit = ((LANES == 16 ? 30 : 16) - 1) / (n + 1);
    return fit >= 8 ? 8 : fit >= 4 ? 4 : fit >= 1 ? fit : 1;
}

inline vf load_units_whole(const Real* p) {
#if MOEPLAN_PAIRS
    return _mm512_loadu_ps(p);
#else
    return load(p);
#endif
}

// R rows times N. `next`: the row after them. PART of PARTS: which pass over the rows this is.
template <int R, int N, int PART, int PARTS>
inline void dots(const Real* w, int64_t ldw, const Real* next, const Op* x, int64_t ldx, int64_t k, float* c,
                 int64_t ldc) {
    vf sums[R][N];
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
#pragma GCC unroll 8
        for (int n = 0; n < N; n++) sums[r][n] = zero();
    }
    int64_t whole = k / BLOCK * BLOCK, turn = whole > AHEAD ? whole - AHEAD : 0, i = 0;
    const auto run = [&](int64_t end, const Real* ahead) __attribute__((always_inline)) {
        for (; i < end; i += BLOCK) {
            vf rows[R];
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                _mm_prefetch(ahead + r * ldw + i / PARTS, _MM_HINT_T0);
                rows[r] = load_units_whole(w + r * ldw + i);
            }
#pragma GCC unroll 8
            for (int n = 0; n < N; n++) {
                vf column = load(reinterpret_cast<const float*>(x + n * ldx + i));
#pragma GCC unroll 8
                for (int r = 0; r < R; r++) sums[r][n] = step(sums[r][n], rows[r], column);
            }
        }
    };
    if constexpr (PARTS == 1) {
        // Up to `turn` the rows themselves are asked for ahead, after it the start of the next ones.
        run(turn, w + AHEAD);
        run(whole, next - turn);
    } else {
        run(whole, next + PART * (k / PARTS));  // as large a part of the next ones
    }
    if (i < k) {
        for (int r = 0; r < R; r++) {
            vf row = load_units(w + r * ldw + i, k - i);
            for (int n = 0; n < N; n++) {
                sums[r][n] = step(sums[r][n], row, load(reinterpret_cast<const float*>(x + n * ldx + i)));
            }
        }
    }
    for (int r = 0; r < R; r++) {
        for (int n = 0; n < N; n++) c[r * ldc + n] = sum(sums[r][n]);
    }
}

template <int N>
inline void dots_rows(const Real* w, int64_t ldw, int64_t m, const Op* x, int64_t ldx, int64_t k, float* c,
                      int64_t ldc) {
    constexpr int PARTS = column_parts(N), EACH = (N + PARTS - 1) / PARTS, R = weight_rows(EACH);
    int64_t r = 0;
    const auto take = [&](auto rows) {
        constexpr int COUNT = decltype(rows)::value;
        for (; r + COUNT <= m; r += COUNT) {
            const Real *from = w + r * ldw, *next = from + COUNT * ldw;
            const auto part = [&](auto which) {
                constexpr int PART = decltype(which)::value, FIRST = PART * EACH, LEFT = N - FIRST;
                if constexpr (PART < PARTS) {
                    constexpr int HERE = LEFT < EACH ? LEFT : EACH;
                    dots<COUNT, HERE, PART, PARTS>(from, ldw, next, x + FIRST * ldx, ldx, k, c + r * ldc + FIRST, ldc);
                }
            };
            part(Count<0>());
            part(Count<1>());
            part(Count<2>());
        }
    };
    take(Count<R>());
    if constexpr (R > 1) take(Count<1>());
}

// c [m, n] = w [m, k] x [n, k]^T, n at most FEW; rows of x are padded with zeros to whole vectors.
inline void multiply_few(const Real* w, int64_t ldw, int64_t m, const Op* x, int64_t ldx, int64_t n, int64_t k,
                         float* c, int64_t ldc) {
    switch (n) {
        case 1: return dots_rows<1>(w, ldw, m, x, ldx, k, c, ldc);
        case 2: return dots_rows<2>(w, ldw, m, x, ldx, k, c, ldc);
        case 3: return dots_rows<3>(w, ldw, m, x, ldx, k, c, ldc);
        case 4: return dots_rows<4>(w, ldw, m, x, ldx, k, c, ldc);
        case 5: return dots_rows<5>(w, ldw, m, x, ldx, k, c, ldc);
        case 6: return dots_rows<6>(w, ldw, m, x, ldx, k, c, ldc);
        case 7: return dots_rows<7>(w, ldw, m, x, ldx, k, c, ldc);
        case 8: return dots_rows<8>(w, ldw, m, x, ldx, k, c, ldc);
    }
    if constexpr (FEW > 8) {
        switch (n) {
            case 9: return dots_rows<9>(w, ldw, m, x, ldx, k, c, ldc);
            case 10: return dots_rows<10>(w, ldw, m, x, ldx, k, c, ldc);
            case 11: return dots_rows<11>(w, ldw, m, x, ldx, k, c, ldc);
            case 12: return dots_rows<12>(w, ldw, m, x, ldx, k, c, ldc);
        }
    }
}

}  // namespace moeplan::VARIANT
