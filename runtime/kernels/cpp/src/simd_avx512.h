// Vectors of 16 floats.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace moeplan::VARIANT {

using vf = __m512;
constexpr int64_t LANES = 16;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vf zero() { return _mm512_setzero_ps(); }
inline vf splat(float x) { return _mm512_set1_ps(x); }
inline vf fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
// NaN in the second operand stays.
inline vf upper(vf bound, vf x) { return _mm512_min_ps(bound, x); }
inline vf lower(vf bound, vf x) { return _mm512_max_ps(bound, x); }
inline vf if_less(vf a, vf b, vf x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGE_UQ), x); }
inline vf if_not_above(vf a, vf b, vf x) { return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(a, b, _CMP_NGT_UQ), x); }
inline vf copy_sign(vf magnitude, vf sign) {
    const __m512i bit = _mm512_set1_epi32(static_cast<int>(0x80000000u));
    return _mm512_castsi512_ps(
        _mm512_ternarylogic_epi32(bit, _mm512_castps_si512(sign), _mm512_castps_si512(magnitude), 0xCA));
}
inline vf magnitude(vf x) { return _mm512_abs_ps(x); }
inline vf round(vf x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for a whole n of -150 to 128.
inline vf scale(vf x, vf n) { return _mm512_scalef_ps(x, n); }
inline float sum(vf x) { return _mm512_reduce_add_ps(x); }

inline __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : static_cast<__mmask16>((1u << n) - 1); }

inline vf load(const float* p) { return _mm512_loadu_ps(p); }
inline vf load(const float* p, int64_t n) {
    touch(p, least(n, 16) * 4);
    return _mm512_maskz_loadu_ps(first(n), p);
}
inline void store(float* p, vf x) { _mm512_storeu_ps(p, x); }
inline void store(float* p, vf x, int64_t n) {
    touch(p, least(n, 16) * 4);
    _mm512_mask_storeu_ps(p, first(n), x);
}
// Past the caches, to a line of which the rest follows at once.
inline void stream(float* p, vf x) {
    touch(p, 64);
    _mm512_stream_ps(p, x);
}
inline void stream16(void* p, __m256i x) {
    touch(p, 32);
    _mm256_stream_si256(static_cast<__m256i*>(p), x);
}

inline __m256i load16(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
inline __m256i load16(const void* p, int64_t n) {
    touch(p, least(n, 16) * 2);
    return _mm256_maskz_loadu_epi16(first(n), p);
}
inline void store16(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
inline void store16(void* p, __m256i x, int64_t n) {
    touch(p, least(n, 16) * 2);
    _mm256_mask_storeu_epi16(p, first(n), x);
}

inline vf widen_bf16(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline vf load(const bf16* p) { return widen_bf16(load16(p)); }
inline vf load(const bf16* p, int64_t n) { return widen_bf16(load16(p, n)); }
inline vf load(const f16* p) { return _mm512_cvtph_ps(load16(p)); }
inline vf load(const f16* p, int64_t n) { return _mm512_cvtph_ps(load16(p, n)); }

inline __m256i narrow_f16(vf x) { return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline void store(f16* p, vf x) { store16(p, narrow_f16(x)); }
inline void store(f16* p, vf x, int64_t n) { store16(p, narrow_f16(x), n); }
inline void stream(f16* p, vf x) { stream16(p, narrow_f16(x)); }

#ifdef __AVX512BF16__
inline __m256i narrow_bf16(vf x) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(x)); }
inline void store(bf16* p, vf x) { store16(p, narrow_bf16(x)); }
inline void store(bf16* p, vf x, int64_t n) { store16(p, narrow_bf16(x), n); }
inline void stream(bf16* p, vf x) { stream16(p, narrow_bf16(x)); }

// Pairs of bf16 as the units of an operand: `n` values, of which the rest is zero.
inline vf load_pairs(const bf16* p, int64_t n) {
    touch(p, least(n, 32) * 2);
    __mmask32 mask = n >= 32 ? 0xFFFFFFFFu : (1u << n) - 1;
    return _mm512_castsi512_ps(_mm512_maskz_loadu_epi16(mask, p));
}
// Units whose low half is from a and whose high half is from b.
inline vf interleave(__m256i a, __m256i b) {
    __m512i low = _mm512_cvtepu16_epi32(a), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16);
    return _mm512_castsi512_ps(_mm512_or_si512(low, high));
}
inline vf interleave(vf a, vf b) { return interleave(narrow_bf16(a), narrow_bf16(b)); }
// Units of the 32 values that follow a and b: of the first 16, and of the others.
inline void interleave(const bf16* a, const bf16* b, vf& low, vf& high) {
    const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0), second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b);
    // The instructions interleave within each 128 bits: of every 8 values, the first 4 and the last 4.
    __m512i even = _mm512_unpacklo_epi16(x, y), odd = _mm512_unpackhi_epi16(x, y);
    low = _mm512_castsi512_ps(_mm512_permutex2var_epi64(even, first, odd));
    high = _mm512_castsi512_ps(_mm512_permutex2var_epi64(even, second, odd));
}
inline vf dot_pairs(vf sum, vf a, vf b) {
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#endif

// 16 x 16 in place.
__attribute__((always_inline)) inline void transpose(vf r[16]) {
    vf t[16];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
    // r[4 i + j]: element j of each group of four columns, of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        __m512d a = _mm512_castps_pd(t[4 * i]), b = _mm512_castps_pd(t[4 * i + 1]);
        __m512d c = _mm512_castps_pd(t[4 * i + 2]), d = _mm512_castps_pd(t[4 * i + 3]);
        r[4 * i] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, c));
        r[4 * i + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, c));
        r[4 * i + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(b, d));
        r[4 * i + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(b, d));
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        vf a = _mm512_shuffle_f32x4(r[j], r[4 + j], 0x88), b = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0x88);
        vf c = _mm512_shuffle_f32x4(r[j], r[4 + j], 0xDD), d = _mm512_shuffle_f32x4(r[8 + j], r[12 + j], 0xDD);
        t[j] = _mm512_shuffle_f32x4(a, b, 0x88);
        t[8 + j] = _mm512_shuffle_f32x4(a, b, 0xDD);
        t[4 + j] = _mm512_shuffle_f32x4(c, d, 0x88);
        t[12 + j] = _mm512_shuffle_f32x4(c, d, 0xDD);
    }
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) r[i] = t[i];
}

}  // namespace moeplan::VARIANT
