// Vectors of float32 for the instruction set that the file is compiled for, and the storage type of its variant.
#pragma once
#ifdef __AVX512F__
#include "simd_avx512.h"
#else
#include "simd_avx2.h"
#endif

namespace moeplan::VARIANT {

using Real = MOEPLAN_REAL;

inline float scalar(float x) { return x; }
inline float scalar(f16 x) { return _cvtsh_ss(x.bits); }
inline float scalar(bf16 x) {
    uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

}  // namespace moeplan::VARIANT
