// c [m, n] (+)= a [m, k] b [k, n] on the matrix tiles: 16 rows of 32 bf16 of a, straight from where they lie, times 16
// units of a panel, float32 sums.
#pragma once
#include "pack.h"

namespace moeplan::VARIANT {

// Tile registers of this thread, from here until the end of the scope.
class Tiles {
public:
    Tiles() {
        struct alignas(64) { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; } shape = {};
        shape.palette = 1;
        for (int i = 0; i < 8; i++) {
            shape.bytes[i] = 64;
            shape.rows[i] = 16;
        }
        _tile_loadconfig(&shape);
    }
    ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
};

static inline void touch_rows([[maybe_unused]] const void* p, [[maybe_unused]] int64_t stride) {
#ifdef __SANITIZE_ADDRESS__
    for (int r = 0; r < 16; r++) touch(static_cast<const char*>(p) + r * stride, 64);
#endif
}

// 0 to 3 sums, 4 and 5 rows of a, 6 and 7 panels of b.
template <int M, int N, class Next>
inline void micro(const Op* a, int64_t lda, Next next, const float* b, int64_t panel_stride, int64_t units,
                  float* c, int64_t ldc, bool add) {
    int64_t row = lda * 2, line = ldc * 4;
    for (int r = 0; r < M; r++) {
        for (int p = 0; p < N; p++) touch_rows(c + 16 * r * ldc + PANEL * p, line);
    }
    if (add) {
        _tile_loadd(0, c, line);
        if constexpr (N > 1) _tile_loadd(1, c + PANEL, line);
        if constexpr (M > 1) _tile_loadd(2, c + 16 * ldc, line);
        if constexpr (M > 1 && N > 1) _tile_loadd(3, c + 16 * ldc + PANEL, line);
    } else {
        _tile_zero(0);
        if constexpr (N > 1) _tile_zero(1);
        if constexpr (M > 1) _tile_zero(2);
        if constexpr (M > 1 && N > 1) _tile_zero(3);
    }
    for (int64_t u = 0; u < units; u += 16) {
        const Op* from = a + u * PAIR;
        next.template fetch<16 * M>();
        for (int r = 0; r < M; r++) touch_rows(from + 16 * r * lda, row);
        for (int p = 0; p < N; p++) touch(b + p * panel_stride + u * PANEL, 1024);
        _tile_loadd(4, from, row);
        _tile_loadd(6, b + u * PANEL, 64);
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (N > 1) {
            _tile_loadd(7, b + panel_stride + u * PANEL, 64);
            _tile_dpbf16ps(1, 4, 7);
        }
        if constexpr (M > 1) {
            _tile_loadd(5, from + 16 * lda, row);
            _tile_dpbf16ps(2, 5, 6);
            if constexpr (N > 1) _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, line);
    if constexpr (N > 1) _tile_stored(1, c + PANEL, line);
    if constexpr (M > 1) _tile_stored(2, c + 16 * ldc, line);
    if constexpr (M > 1 && N > 1) _tile_stored(3, c + 16 * ldc + PANEL, line);
}

template <int N, class Next>
inline void multiply_rows(const Op* a, int64_t lda, int64_t m, Next next, const float* b, int64_t panel_stride,
                          int64_t units, float* c, int64_t ldc, bool add) {
    int64_t r = 0;
    for (; r + 32 <= m; r += 32) {
        micro<2, N>(a + r * lda, lda, next, b, panel_stride, units, c + r * ldc, ldc, add);
    }
    if (r < m) micro<1, N>(a + r * lda, lda, next, b, panel_stride, units, c + r * ldc, ldc, add);
}

// m and n are multiples of 16, units is too.
template <class Next>
inline void multiply(const Op* a, int64_t lda, int64_t m, Next next, const float* b, int64_t panel_stride, int64_t n,
                     int64_t units, float* c, int64_t ldc, bool add) {
    for (int64_t p = 0, count = n / PANEL; p < count; p += 2) {
        const float* from = b + p * panel_stride;
        float* to = c + p * PANEL;
        const auto go = [&](auto ahead) {
            if (p + 1 == count) return multiply_rows<1>(a, lda, m, ahead, from, panel_stride, units, to, ldc, add);
            multiply_rows<2>(a, lda, m, ahead, from, panel_stride, units, to, ldc, add);
        };
        if (p == 0 || Next::EVERY) {
            go(next);
        } else {
            go(NothingNext{});
        }
    }
}

}  // namespace moeplan::VARIANT
