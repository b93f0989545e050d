// Vectors of 8 floats.
#pragma once
#include <immintrin.h>

#include "common.h"

namespace moeplan::VARIANT {

using vf = __m256;
constexpr int64_t LANES = 8;

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

inline vf zero() { return _mm256_setzero_ps(); }
inline vf splat(float x) { return _mm256_set1_ps(x); }
inline vf fma(vf a, vf b, vf c) { return _mm256_fmadd_ps(a, b, c); }
// NaN in the second operand stays.
inline vf upper(vf bound, vf x) { return _mm256_min_ps(bound, x); }
inline vf lower(vf bound, vf x) { return _mm256_max_ps(bound, x); }
inline vf if_less(vf a, vf b, vf x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NGE_UQ), x); }
inline vf if_not_above(vf a, vf b, vf x) { return _mm256_and_ps(_mm256_cmp_ps(a, b, _CMP_NGT_UQ), x); }
inline vf magnitude(vf x) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), x); }
inline vf copy_sign(vf size, vf sign) {
    const vf bit = _mm256_set1_ps(-0.0f);
    return _mm256_or_ps(_mm256_and_ps(bit, sign), _mm256_andnot_ps(bit, size));
}
inline vf round(vf x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// x 2^n for a whole n of -126 to 127.
inline vf scale(vf x, vf n) {
    __m256i exponent = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    return _mm256_mul_ps(x, _mm256_castsi256_ps(exponent));
}
inline float sum(vf x) {
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_movehdup_ps(h)));
}

inline __m256i first(int64_t n) {
    __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(least(n, 8))), lane);
}
inline vf load(const float* p) { return _mm256_loadu_ps(p); }
inline vf load(const float* p, int64_t n) {
    touch(p, least(n, 8) * 4);
    return _mm256_maskload_ps(p, first(n));
}
inline void store(float* p, vf x) { _mm256_storeu_ps(p, x); }
inline void store(float* p, vf x, int64_t n) {
    touch(p, least(n, 8) * 4);
    _mm256_maskstore_ps(p, first(n), x);
}
// Past the caches, to a line of which the rest follows at once.
inline void stream(float* p, vf x) {
    touch(p, 32);
    _mm256_stream_ps(p, x);
}
inline void stream16(void* p, __m128i x) {
    touch(p, 16);
    _mm_stream_si128(static_cast<__m128i*>(p), x);
}

inline __m128i load16(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
inline __m128i load16(const void* p, int64_t n) {
    if (n >= 8) return load16(p);
    uint16_t part[8] = {};
    memcpy(part, p, sizeof(uint16_t) * n);
    return load16(part);
}
inline void store16(void* p, __m128i x) { _mm_storeu_si128(static_cast<__m128i*>(p), x); }
inline void store16(void* p, __m128i x, int64_t n) {
    if (n >= 8) return store16(p, x);
    uint16_t part[8];
    store16(part, x);
    memcpy(p, part, sizeof(uint16_t) * n);
}

inline vf widen_bf16(__m128i x) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16)); }
// To nearest, ties to even; NaN stays NaN.
inline __m128i narrow_bf16(vf x) {
    __m256i bits = _mm256_castps_si256(x);
    __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7FFF)));
    __m256i nan = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
    __m256i is_nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
    __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, nan, is_nan), 16);
    return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
// a then b, 16 values. NaNs, which are rare, are looked for in both at once.
__attribute__((always_inline)) inline __m256i narrow_bf16(vf a, vf b) {
    if (__builtin_expect(_mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_UNORD_Q)), 0)) {
        return _mm256_set_m128i(narrow_bf16(b), narrow_bf16(a));
    }
    const auto high = [](vf x) __attribute__((always_inline)) {
        __m256i bits = _mm256_castps_si256(x);
        __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
        __m256i half = _mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF));
        return _mm256_srli_epi32(_mm256_add_epi32(half, odd), 16);
    };
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(high(a), high(b)), 0xD8);
}
inline __m128i narrow_f16(vf x) { return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }

inline vf load(const bf16* p) { return widen_bf16(load16(p)); }
inline vf load(const bf16* p, int64_t n) { return widen_bf16(load16(p, n)); }
inline vf load(const f16* p) { return _mm256_cvtph_ps(load16(p)); }
inline vf load(const f16* p, int64_t n) { return _mm256_cvtph_ps(load16(p, n)); }
inline void store(bf16* p, vf x) { store16(p, narrow_bf16(x)); }
inline void store(bf16* p, vf x, int64_t n) { store16(p, narrow_bf16(x), n); }
inline void store(f16* p, vf x) { store16(p, narrow_f16(x)); }
inline void store(f16* p, vf x, int64_t n) { store16(p, narrow_f16(x), n); }
inline void stream(bf16* p, vf x) { stream16(p, narrow_bf16(x)); }
inline void stream(f16* p, vf x) { stream16(p, narrow_f16(x)); }
// Two vectors in a row.
template <class T>
inline void store(T* p, vf a, vf b) {
    store(p, a);
    store(p + LANES, b);
}
template <class T>
inline void stream(T* p, vf a, vf b) {
    stream(p, a);
    stream(p + LANES, b);
}
inline void store(bf16* p, vf a, vf b) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a, b)); }
inline void stream(bf16* p, vf a, vf b) {
    touch(p, 32);
    _mm256_stream_si256(reinterpret_cast<__m256i*>(p), narrow_bf16(a, b));
}

// 8 x 8 in place.
__attribute__((always_inline)) inline void transpose(vf r[8]) {
    vf t[8];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        t[2 * i] = _mm256_unpacklo_ps(r[2 * i], r[2 * i + 1]);
        t[2 * i + 1] = _mm256_unpackhi_ps(r[2 * i], r[2 * i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
        r[4 * i] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0x44);
        r[4 * i + 1] = _mm256_shuffle_ps(t[4 * i], t[4 * i + 2], 0xEE);
        r[4 * i + 2] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0x44);
        r[4 * i + 3] = _mm256_shuffle_ps(t[4 * i + 1], t[4 * i + 3], 0xEE);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        t[j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x20);
        t[4 + j] = _mm256_permute2f128_ps(r[j], r[4 + j], 0x31);
    }
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) r[i] = t[i];
}

}  // namespace moeplan::VARIANT
